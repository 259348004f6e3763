"""Converts weights between the released, the native and the diffusers layout.

    python -m dinalrm_jax.convert released --checkpoint D --base-model B --output N [--verify]
    python -m dinalrm_jax.convert native --checkpoint WORKDIR/reward/best --output N
    python -m dinalrm_jax.convert export --checkpoint N --output D
    python -m dinalrm_jax.convert diffusers --base-model B --output N

D is a released checkpoint, B a base model in diffusers layout (directories or hub ids), N a native
checkpoint or backbone, WORKDIR that of a training run. An output that exists is never overwritten.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import ConvertOptions

answer_help(__name__, __doc__, ConvertOptions)  # before the imports that take a second

import pathlib

from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.execution import Dtype, ExecutionConfig
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.training.run_weights import open_checkpoint
from dinalrm_jax.weights import pretrained
from dinalrm_jax.weights.torch_file import TorchFileError
from dinalrm_jax.weights.verify import VerificationError, check_torch, verify_against_released


def convert(
    direction: str,
    *,
    checkpoint: str | None,
    base_model: str | None,
    output: str,
    dtype: Dtype,
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
        base_model = str(pretrained.resolve(base_model, pretrained.TRANSFORMER_FILES, revision))
    else:
        checkpoint = str(pretrained.resolve(checkpoint, pretrained.CHECKPOINT_FILES, revision))
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


def main(options: ConvertOptions) -> None:
    """The conversion that the options name."""
    convert(
        options.direction,
        checkpoint=options.checkpoint,
        base_model=options.base_model,
        output=options.output,
        dtype=options.dtype,
        verify=options.verify,
        revision=options.revision,
    )


if __name__ == "__main__":
    run_command(
        main,
        ConvertOptions,
        errors=(ConfigError, WeightsError, TorchFileError, VerificationError, OSError),
        interrupted="nothing was written",
    )
