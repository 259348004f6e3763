"""The training loop: any assembled step over any stream of batches, evaluated, logged, saved and resumed."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import jax

from dinalrm_jax.config import ProfileConfig, StageConfig
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.host_memory import return_freed_memory, stop_keeping
from dinalrm_jax.disk import AnyPath
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.training.ahead import compile_ahead
from dinalrm_jax.training.checkpoint import BestCheckpoint, Checkpoints
from dinalrm_jax.training.metrics import MetricsLog, read_metrics
from dinalrm_jax.training.objectives import Objective
from dinalrm_jax.training.optimizer import learning_rate_schedule
from dinalrm_jax.training.profiling import ProfileWindow
from dinalrm_jax.training.step import AssembledStep, TrainState
from dinalrm_jax.training.stopping import Stopped, StopSignals
from dinalrm_jax.training.stream import Stream

B = TypeVar("B")


class HeldOut(Protocol):
    """What a stage is judged by while it trains.

    Attributes:
        headline: which of its values says which state is the best.
    """

    headline: str

    def compile(self, trained: Params) -> None:
        """Makes its programs, beside the training state."""
        ...

    def __call__(self, trained: Params, step: int) -> dict[str, float]:
        """Named values of trained parameters, those of a step."""
        ...

    def enough(self, rows: Sequence[Mapping[str, float]]) -> str | None:
        """Why a stage with these evaluations, as its log has them, ends before its last step; None: it does not."""
        ...


def fit(
    name: str,
    stage: StageConfig,
    assembled: AssembledStep[B],
    stream: Stream[B],
    *,
    workdir: AnyPath,
    open_log: Callable[[str], MetricsLog],
    held_out: HeldOut | None = None,
    plain: Objective[B] | None = None,
    profile: ProfileConfig = ProfileConfig(),
) -> tuple[TrainState, BestCheckpoint | None]:
    """Trains one stage to its last step, continuing from its latest checkpoint in WORKDIR/NAME.

    Args:
        name: of the stage.
        stage: its length, and when it logs, evaluates and saves.
        assembled: the step, with the state to begin with.
        stream: the batches.
        workdir: of the run.
        open_log: opens the log of a stage.
        held_out: evaluates; the state with the highest headline is kept too.
        plain: see `compile_ahead`.
        profile: which steps are recorded.

    Raises:
        Stopped: on a signal, after saving.
        NonFiniteLoss, CheckpointError: the last good checkpoint is kept.
        ConfigError: the checkpoint is beyond the last step.
    """
    state, frozen, devices = assembled.state, assembled.frozen, assembled.mesh.size
    checkpoints = Checkpoints(workdir / name / "checkpoints")
    best = None if held_out is None else BestCheckpoint(workdir / name / "best")
    if (restored := checkpoints.restore_latest(state)) is not None:
        jax.tree.map(lambda array: array.delete(), state)  # `assembled` holds it; else the first step frees it
        state, position = restored
        stream.restore(position)
        processes.say(f"{name}: continuing from the checkpoint of step {int(state.step)}")
    first = int(state.step)
    if first > stage.steps:
        raise ConfigError(f"{name}: {workdir} is at step {first} already, beyond the {stage.steps} asked for")
    trained = sum(array.size for array in state.params.values())
    unit, rows = next(iter(stream.units.items()))
    processes.say(f"{name}: {trained:,} trainable parameters, {stage.steps - first} steps of {rows} {unit}")
    learning_rate = learning_rate_schedule(stage.optimizer, stage.steps * assembled.updates)
    with (
        contextlib.closing(checkpoints),  # whatever happens, a save that was started is finished
        contextlib.closing(best) if best else contextlib.nullcontext(),
        contextlib.closing(open_log(name)) as log,
        contextlib.closing(ProfileWindow(workdir / "profile", profile)) as window,
        StopSignals() as stop,
    ):
        programs = compile_ahead(assembled, stream.forms, plain) if first < stage.steps else {}
        if asked := stop.asked():
            raise Stopped(asked, name, first)

        def evaluate(step: int, state: TrainState) -> bool:
            if held_out is None or not step or (step % stage.evaluate_every and step != stage.steps):
                return False
            log.check_finite()
            started = time.perf_counter()
            values = held_out(state.result, step)
            best.offer(state, values[held_out.headline])
            log.write_values(step, values)
            return_freed_memory()  # what other programs than the step's kept
            log.pause(time.perf_counter() - started)
            return True

        if held_out is not None:
            held_out.compile(state.result)
            logged = any(row["step"] == first and held_out.headline in row for row in read_metrics(workdir, name))
            if first and not processes.all_agree(logged):
                evaluate(first, state)  # which a run that was killed after the save of this step did not get to

        def enough(step: int) -> bool:
            """Whether the evaluations up to this step end the stage."""
            if held_out is None:
                return False
            rows = [row for row in read_metrics(workdir, name) if held_out.headline in row and row["step"] <= step]
            reason = held_out.enough(rows) if processes.is_first() else None
            if reason is not None:
                processes.say(f"{name}: ended at step {step}: {reason}")
            return not processes.all_agree(reason is None)

        if len(programs) > 1:  # each would keep temporaries of its own
            stop_keeping()
        batches, metrics, done = iter(stream), None, enough(first)
        log.start()
        with processes.progress(total=stage.steps, initial=first, desc=name, unit="step") as bar:
            for step in range(first + 1, stage.steps + 1):
                if done:
                    break
                started = time.perf_counter()
                form, batch, position = next(batches)
                waited = time.perf_counter() - started
                window.before(step)
                program, flops = programs[form]
                before = metrics
                state, metrics = program(state, frozen, batch)
                jax.block_until_ready(before)  # one step runs, one waits for it: the devices never wait for the host
                log.add(step, metrics, stream.units, waited=waited, flops=flops / devices)
                window.after(step, state)
                bar.update()
                asked, last = stop.asked(), step == stage.steps
                if step % stage.log_every == 0 or last:
                    values = log.write(step, {"learning_rate": float(learning_rate((step - 1) * assembled.updates))})
                    bar.set_postfix({key: f"{values[key]:.3f}" for key in ("loss", "accuracy") if key in values})
                if step % stage.checkpoint_every == 0 or last or asked:
                    log.check_finite()
                    log.publish()  # what no other start will compute again
                    checkpoints.save(state, position)
                if asked:
                    raise Stopped(asked, name, step)
                if evaluate(step, state) and (done := enough(step)):
                    checkpoints.save(state, position)
    return state, best
