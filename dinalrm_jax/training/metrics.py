"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and, where asked for, wandb."""

import collections
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import psutil

from dinalrm_jax.devices import processes
from dinalrm_jax.devices.chips import peak_flops
from dinalrm_jax.disk import AnyPath, Mirror

PUBLISHED_EVERY = 30.0  # seconds, in a bucket: each time the whole files are uploaded


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; nothing after the last good checkpoint was saved.

    Attributes:
        metrics: of the step.
    """

    def __init__(self, message: str, metrics: Mapping[str, np.ndarray]):
        super().__init__(message)
        self.metrics = metrics


class MetricsLog:
    """Averages metrics between two writes, and refuses a loss that is not finite.

    Every process keeps one, so that all stop where a loss is not finite; the first one writes.

    Args:
        directory: of the run; gets `metrics.jsonl` and `tensorboard/`.
        stage: named in every line, and the TensorBoard run's name.
        project: also log to this Weights & Biases project; None: do not.
        run: the workdir's own name, which no other has.
        config: what wandb shows as the run's configuration.
    """

    def __init__(
        self,
        directory: AnyPath,
        stage: str,
        *,
        project: str | None = None,
        run: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self.stage = stage
        self._pending: dict[int, Mapping[str, jax.Array]] = {}
        self._units: collections.Counter[str] = collections.Counter()
        self._waited, self._flops, self._since = 0.0, 0.0, time.perf_counter()
        self._writes, self._wandb = processes.is_first(), None
        if not self._writes:
            return
        self._files = Mirror(directory, kept=["metrics.jsonl"])
        self._path = self._files.local / "metrics.jsonl"
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("a") as file:
                file.write("\n")  # ends a line that a kill tore, which must not swallow the next one
        self._board = _TensorBoard(self._files.local / "tensorboard" / stage)
        if project is not None:
            import wandb  # optional, and only where it is asked for

            name = f"{directory.name}/{stage}"
            self._wandb = wandb.init(
                project=project, name=name, id=f"{run}-{stage}", resume="allow", config=dict(config or {})
            )

    def add(
        self, step: int, metrics: Mapping[str, jax.Array], units: Mapping[str, float], *, waited: float, flops: float
    ) -> None:
        """Takes one step's metrics without waiting for the device.

        Args:
            step: optimizer steps done.
            metrics: of the step.
            units: what the batch holds, for rates: {"pairs": 32, "images": 64}.
            waited: seconds the step waited for its data.
            flops: of the step, each device's share; 0 where unknown.
        """
        self._pending[step] = metrics
        self._units.update(units)
        self._waited, self._flops = self._waited + waited, self._flops + flops

    def start(self) -> None:
        """Rates count from here."""
        self._since = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leaves time that was not training (an evaluation, a save) out of the rates."""
        self._since += seconds

    def check_finite(self) -> None:
        """Waits for the steps added since the last write.

        Raises:
            NonFiniteLoss: naming the first step whose loss, or whose new parameters, are not finite.
        """
        for step, metrics in self._pending.items():
            loss = float(metrics["loss"])
            if not np.isfinite(loss) or not metrics["finite"]:
                what = f"the loss of step {step} is {loss}" + (
                    "" if metrics["finite"] else ", its update is not finite"
                )
                raise NonFiniteLoss(
                    f"{self.stage}: {what}; stopped, and the last good checkpoint is kept. "
                    "Lower the learning rate, or look at the data of that step",
                    {name: np.asarray(value) for name, value in metrics.items()},
                )

    def write(self, step: int, extra: Mapping[str, float]) -> dict[str, float]:
        """Averages what was added since the last call, waits for it, writes and returns it.

        Raises:
            NonFiniteLoss: see `check_finite`.
        """
        self.check_finite()
        pending = jax.device_get(list(self._pending.values()))
        means = {name: np.mean([row[name] for row in pending], axis=0) for name in pending[0]}
        values = {name: float(mean) for name, mean in means.items() if mean.ndim == 0} | _by_sigma(means)
        seconds, steps = time.perf_counter() - self._since, len(pending)
        values |= {
            **{f"{unit}_per_second": count / seconds for unit, count in self._units.items()},
            "step_seconds": seconds / steps,
            "data_wait_seconds": self._waited / steps,
        }
        if self._flops:
            values["tflops_per_second_per_device"] = self._flops / seconds / 1e12
            if (peak := peak_flops(jax.devices()[0].device_kind)) is not None:
                values["model_flop_utilisation"] = self._flops / seconds / peak
        values |= memory()
        self._pending, self._waited, self._flops = {}, 0.0, 0.0
        self._units.clear()
        self._since = time.perf_counter()
        values |= extra
        self._write(step, values)
        if self._writes:
            self._files.publish(every=PUBLISHED_EVERY)
        return values

    def write_values(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers as they are."""
        self._write(step, values)
        self.publish()

    def publish(self) -> None:
        """Returns once what was written is where the run's directory is."""
        if self._writes:
            self._files.publish()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        self._board.write(step, values)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        if self._writes:
            self._board.close()
            self._files.close()
        if self._wandb is not None:
            self._wandb.finish()


class _TensorBoard:
    """Scalars for TensorBoard, written where they are told.

    (tensorboardX's `SummaryWriter` leaves that to a thread; where the disk is full the thread ends, and the run waits
    for it for ever.)
    """

    def __init__(self, directory: pathlib.Path):
        from tensorboardX.event_file_writer import EventsWriter  # brings torch with it, where that is installed

        directory.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(directory / "events"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def _by_sigma(means: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means within each bin of the noise level that rows fell into: "accuracy/sigma_0.1_0.2"."""
    if "share_by_sigma" not in means:
        return {}
    share = means["share_by_sigma"]
    edges = np.linspace(0, 1, len(share) + 1)
    return {
        f"{name.removesuffix('_by_sigma')}/sigma_{edges[i]:.1f}_{edges[i + 1]:.1f}": float(mean[i] / share[i])
        for name, mean in means.items()
        if name.endswith("_by_sigma") and name != "share_by_sigma"
        for i in np.flatnonzero(share)
    }


def memory() -> dict[str, float]:
    """Peak bytes in use on the first local device, where it says, and the process's resident bytes; GiB."""
    values = {"host_memory_gib": psutil.Process().memory_info().rss / 2**30}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        values["device_peak_memory_gib"] = stats["peak_bytes_in_use"] / 2**30
    return values


def read_metrics(directory: AnyPath, stage: str) -> list[dict[str, float]]:
    """The lines of a stage in step order; after a resume, the later line of a step counts."""
    by_step: dict[int, dict[str, float]] = {}
    if not (directory / "metrics.jsonl").exists():
        return []
    for text in (directory / "metrics.jsonl").read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # torn by a kill in the middle of a write; the resumed run wrote that step again
        if line["stage"] == stage:
            by_step[line["step"]] = {**by_step.get(line["step"], {}), **line}
    return [by_step[step] for step in sorted(by_step)]
