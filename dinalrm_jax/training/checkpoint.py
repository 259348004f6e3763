"""Training checkpoints: everything that a resumed run needs to continue as if never stopped."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from dinalrm_jax.training.step import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint directory that this run cannot continue from."""


class Checkpoints:
    """The checkpoints of one training stage.

    Each holds the train state (trainable parameters, optimizer, EMA, step) and the loader's
    position; the frozen weights are not in it. Orbax writes to a temporary directory and renames
    it, so an interrupted save leaves the previous checkpoint the latest.

    Args:
        directory: of the stage.
        keep: how many of the latest checkpoints stay.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 2):
        self.directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, state: TrainState, loader_state: Mapping[str, Any]) -> None:
        """Starts saving in the background; the arrays are copied before this returns."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                loader=ocp.args.JsonSave(dict(loader_state)),
            ),
        )

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest whole checkpoint's state and loader position, or None where there is none.

        Arrays come back as those of `like` lie, on whatever mesh the checkpoint was written.

        Raises:
            CheckpointError: the checkpoint is damaged, or of a model with other parameters.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target), loader=ocp.args.JsonRestore()),
            )
        except Exception as error:  # orbax raises many kinds for a damaged or foreign directory
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is damaged or of another model: {error}\n"
                "Remove that directory to continue from the checkpoint before it, or choose another --workdir"
            ) from error
        return restored["state"], restored["loader"]

    def close(self) -> None:
        """Returns when every started save is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
