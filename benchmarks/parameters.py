"""Parameter counts of the full-size reward model (SD3.5-M, 12 blocks), by abstract evaluation: no memory needed.

python -m benchmarks.parameters
"""

from collections import Counter

from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.reward import reward_functional


def main() -> None:
    counts: Counter[str] = Counter()
    for name, shape in reward_functional(RewardModelConfig(), ExecutionConfig()).shapes.items():
        if name.endswith("pos_embed.pos_embed"):
            continue  # a fixed table, not a parameter
        counts["LoRA" if ".lora_" in name else "head" if name.startswith("head.") else "frozen backbone"] += shape.size
    print(", ".join(f"{part} {count / 1e6:.1f}M" for part, count in counts.items()))


if __name__ == "__main__":
    main()
