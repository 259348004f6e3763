"""Training checkpoints: everything that a resumed run needs to continue as if never stopped."""

import contextlib
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from dinalrm_jax.devices import processes
from dinalrm_jax.disk import AnyPath, free_space, resolved
from dinalrm_jax.training.step import TrainState

DISK_FAILURES = ("No space left on device", "Disk quota exceeded", "File too large", "Input/output error")


TRIES = 2  # to read a checkpoint, before it counts as damaged: a file system may fail once
KEPT = "What was saved before is kept, and the same command goes on from there"


class CheckpointError(RuntimeError):
    """A checkpoint that this run cannot continue from, or cannot write."""


class Checkpoints:
    """The checkpoints of one training stage.

    Each holds the train state (trainable parameters, optimizer, EMA, step) and the loader's
    position; the frozen weights are not in it. Orbax writes to a temporary directory and renames
    it, or in a bucket marks it, so an interrupted save leaves the previous checkpoint the latest.

    Args:
        directory: of the stage.
        keep: how many of the latest checkpoints stay.
    """

    def __init__(self, directory: str | AnyPath, keep: int = 2):
        self.directory = resolved(directory)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, state: TrainState, loader_state: Mapping[str, Any]) -> None:
        """Starts saving in the background; the arrays are copied before this returns.

        Raises:
            CheckpointError: this or the last save failed, for lack of space above all.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        needed = sum(array.nbytes for array in jax.tree.leaves(state))
        free = free_space(self.directory)
        if not processes.all_agree(free > 1.1 * needed):  # orbax would say it with a thousand lines
            raise CheckpointError(
                f"cannot save a checkpoint in {self.directory}: No space left on device, {needed / 2**20:.1f} MiB are "
                f"needed and {free / 2**20:.1f} MiB free. {KEPT}"
            )
        with _failures_of_saving(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    loader=ocp.args.JsonSave(dict(loader_state)),
                ),
                force=True,  # when to save is ours to say: not after the latest only, and not by the preemption service
            )

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest whole checkpoint's state and loader position, or None where there is none.

        Arrays come back as those of `like` lie, on whatever mesh the checkpoint was written. A damaged checkpoint
        is said and put aside, as `damaged-STEP` beside the directory, and the one before it is taken.

        Raises:
            CheckpointError: no checkpoint can be read: all are damaged, or of a model with other parameters.
        """
        failures: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            restored, failure = self._restore(step, like)
            if processes.all_agree(failure is None):
                for damaged, error in failures.items():
                    self.put_aside(damaged, error)
                return restored
            failures[step] = failure or CheckpointError("another process could not read it")
        if not failures:
            return None
        step, error = next(iter(failures.items()))
        raise CheckpointError(
            f"checkpoint {self.directory / str(step)} is damaged or of another model, and so is every other one there: "
            f"{error}\nRemove {self.directory} to start this stage again, or choose another --workdir"
        ) from error

    def position(self) -> dict[str, Any] | None:
        """What was saved as the latest checkpoint's loader position; a damaged one is put aside."""
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(loader=ocp.args.JsonRestore()))["loader"]
            failure: Exception = ValueError("it has no state")
            whole = (self.directory / str(step) / "state").is_dir()
        except Exception as error:  # as in `_restore`
            whole, failure = False, error
        if processes.all_agree(whole):
            return found
        self.put_aside(step, failure)
        return None

    def wait(self) -> None:
        """Returns when every started save is on disk; errors as for `save`."""
        with _failures_of_saving(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """As `wait`, for good."""
        self.wait()
        self._manager.close()

    def _restore(
        self, step: int, like: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any]] | None, Exception | None]:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        failure = None
        for _ in range(TRIES if jax.process_count() == 1 else 1):  # orbax's own barriers forbid a try of one process
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(target), loader=ocp.args.JsonRestore()),
                )
                return (restored["state"], restored["loader"]), None
            except Exception as error:  # orbax raises many kinds for a damaged or foreign directory
                failure = error
        return None, failure

    def put_aside(self, step: int, error: Exception) -> None:
        """Says that a checkpoint is damaged, and renames it, so that its step can be saved again."""
        names = itertools.chain([f"damaged-{step}"], (f"damaged-{step}-{number}" for number in itertools.count(2)))
        aside = next(path for path in (self.directory.parent / name for name in names) if not path.exists())
        processes.barrier("damaged checkpoint")
        processes.say(
            f"checkpoint {self.directory / str(step)} is damaged; it is now {aside}, and the one before it is taken "
            f"({_first_line(error)})"
        )
        if processes.is_first():
            (self.directory / str(step)).rename(aside)
        processes.barrier("checkpoint put aside")
        self._manager.reload()

    def delete(self) -> None:
        """Removes the latest checkpoint."""
        self._manager.delete(self._manager.latest_step())


class BestCheckpoint:
    """The checkpoint with the highest held-out accuracy of a stage, in a directory of its own.

    Attributes:
        step, accuracy: of that checkpoint; None before there is one.
    """

    def __init__(self, directory: str | AnyPath):
        self._checkpoints = Checkpoints(directory, keep=1)
        position = self._checkpoints.position() or {}
        self.step, self.accuracy = position.get("step"), position.get("accuracy")

    def offer(self, state: TrainState, accuracy: float) -> None:
        """Saves the state if none so far is as good."""
        if self.accuracy is None or accuracy > self.accuracy:
            step = int(state.step)
            if step == self.step:  # the same step, computed again on another mesh, say
                self._checkpoints.delete()
            self._checkpoints.save(state, {"step": step, "accuracy": accuracy})
            self._checkpoints.wait()  # who finds this evaluation in the log finds the checkpoint too
            self.step, self.accuracy = step, accuracy

    def restore(self, like: TrainState) -> TrainState:
        """That checkpoint's state, its arrays where those of `like` lie; errors as for `Checkpoints.restore_latest`."""
        return self._checkpoints.restore_latest(like)[0]

    def close(self) -> None:
        """As `Checkpoints.close`."""
        self._checkpoints.close()


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].partition(" See full TensorStore details")[0]
    return f"{type(error).__name__}: {text[:300]}"


@contextlib.contextmanager
def _failures_of_saving(directory: AnyPath):
    """Whatever orbax and tensorstore raise, as one line that names the place and the reason."""
    try:
        yield
    except Exception as error:
        texts = []
        cause: BaseException | None = error
        while cause is not None:
            texts.append(str(cause))
            cause = cause.__cause__ or cause.__context__
        known = next((words for words in DISK_FAILURES if any(words in text for text in texts)), None)
        reason = known or _first_line(error)
        raise CheckpointError(f"cannot save a checkpoint in {directory}: {reason}. {KEPT}") from error
