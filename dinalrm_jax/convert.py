"""Converts weights between the released, the native and the diffusers layout.

    python -m dinalrm_jax.convert released --checkpoint D --base-model B --output N [--verify]
    python -m dinalrm_jax.convert native --checkpoint WORKDIR/reward/best --output N
    python -m dinalrm_jax.convert export --checkpoint N --output D
    python -m dinalrm_jax.convert diffusers --base-model B --output N

D is a released checkpoint, B a base model in diffusers layout (directories or hub ids), N a native
checkpoint or backbone, WORKDIR that of a training run. An output that exists is never overwritten.
"""

import pathlib
import sys

from absl import app, flags, logging

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.training.run_weights import open_checkpoint
from dinalrm_jax.weights import pretrained
from dinalrm_jax.weights.torch_file import TorchFileError
from dinalrm_jax.weights.verify import VerificationError, check_torch, verify_against_released

NEEDED = {
    "released": ("checkpoint", "base-model", "output"),
    "native": ("checkpoint", "output"),
    "export": ("checkpoint", "output"),
    "diffusers": ("base-model", "output"),
}


def convert(
    direction: str,
    *,
    checkpoint: str | None,
    base_model: str | None,
    output: str,
    dtype: str,
    verify: bool,
    revision: str | None = None,
) -> None:
    """One conversion; see the module's docstring for the directions.

    Args:
        revision: of what is converted, where that is a hub id: a checkpoint, or with `diffusers` a base model.

    Raises:
        ConfigError, WeightsError, TorchFileError, FileNotFoundError, FileExistsError: before anything is written.
        VerificationError: our model and PyTorch disagree about the released files; nothing is written.
    """
    if pathlib.Path(output).exists():
        raise FileExistsError(f"{output} exists already; choose another output or remove it first")
    if verify:
        check_torch()
    execution = ExecutionConfig(dtype=dtype)
    if direction == "diffusers":
        base_model = pretrained.resolve(base_model, pretrained.TRANSFORMER_FILES, revision)
    else:
        checkpoint = pretrained.resolve(checkpoint, pretrained.CHECKPOINT_FILES, revision)
    if direction == "released":
        model = RewardModel.loaded(pretrained.open_reward_model(checkpoint, base_model, execution))
        if verify:
            print(verify_against_released(model.config, model.score_latents, checkpoint, base_model))
        model.save(output)
    elif direction == "native":
        RewardModel.loaded(open_checkpoint(checkpoint, base_model, execution)).save(output)
    elif direction == "export":
        RewardModel.from_pretrained(checkpoint, dtype="float32").export_released(output)
    else:
        pretrained.save_backbone(*pretrained.load_backbone(base_model, execution), output)
    print(f"wrote {output}")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    if len(argv) != 2 or argv[1] not in NEEDED:
        raise app.UsageError(f"expected one of {', '.join(NEEDED)}, got {argv[1:]}")
    missing = [name for name in NEEDED[argv[1]] if values[name].value is None]
    if missing:
        raise app.UsageError(f"{argv[1]} needs {', '.join('--' + name for name in missing)}")
    if values.verify and argv[1] != "released":
        raise app.UsageError("--verify goes with `released`: it compares with the released files")
    if values.verify and values.dtype != "float32":
        raise app.UsageError("--verify compares in float32; convert with --dtype float32, bfloat16 rounds the weights")
    try:
        convert(
            argv[1],
            checkpoint=values.checkpoint,
            base_model=values["base-model"].value,
            output=values.output,
            dtype=values.dtype,
            verify=values.verify,
            revision=values.revision,
        )
    except (ConfigError, WeightsError, TorchFileError, VerificationError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Checkpoint, released, native or of a training run: a directory or hub id.")
    flags.DEFINE_string("base-model", None, "Base model in diffusers layout: a directory or hub id.")
    flags.DEFINE_string("revision", None, "Commit, tag or branch of what is converted, where that is a hub id.")
    flags.DEFINE_string("output", None, "Directory to write; must not exist.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Stored dtype of the frozen weights.")
    flags.DEFINE_bool("verify", False, "Score with PyTorch from the released files too, and compare.")
    app.run(main)
