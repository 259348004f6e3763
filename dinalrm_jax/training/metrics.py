"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, and the progress bar."""

import json
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from tensorboardX import SummaryWriter


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; nothing after the last good checkpoint was saved."""


class MetricsLog:
    """Averages metrics between two writes, and refuses a loss that is not finite.

    Args:
        directory: of the run; gets `metrics.jsonl` and `tensorboard/`.
        stage: named in every line, and the TensorBoard run's name.
    """

    def __init__(self, directory: pathlib.Path, stage: str):
        self.stage = stage
        self._path = directory / "metrics.jsonl"
        if self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("a") as file:
                file.write("\n")  # ends a line that a kill tore, which must not swallow the next one
        self._board = SummaryWriter(str(directory / "tensorboard" / stage))
        self._pending: dict[int, Mapping[str, jax.Array]] = {}
        self._rows, self._since = 0, time.perf_counter()

    def add(self, step: int, metrics: Mapping[str, jax.Array], rows: int) -> None:
        """Takes one step's metrics without waiting for the device."""
        self._pending[step] = metrics
        self._rows += rows

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
                    "Lower the learning rate, or look at the data of that step"
                )

    def write(self, step: int, extra: Mapping[str, float]) -> dict[str, float]:
        """Averages what was added since the last call, waits for it, writes and returns it.

        Raises:
            NonFiniteLoss: see `check_finite`.
        """
        self.check_finite()
        pending = jax.device_get(list(self._pending.values()))
        values = {name: float(np.mean([row[name] for row in pending])) for name in pending[0]}
        now = time.perf_counter()
        values["pairs_per_second"] = self._rows / (now - self._since)
        self._pending, self._rows, self._since = {}, 0, now
        values |= extra
        self.write_values(step, values)
        return values

    def write_values(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers as they are."""
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def read_metrics(directory: pathlib.Path, stage: str) -> list[dict[str, float]]:
    """The lines of a stage in step order; after a resume, the later line of a step counts."""
    by_step: dict[int, dict[str, float]] = {}
    for text in (directory / "metrics.jsonl").read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # torn by a kill in the middle of a write; the resumed run wrote that step again
        if line["stage"] == stage:
            by_step[line["step"]] = {**by_step.get(line["step"], {}), **line}
    return [by_step[step] for step in sorted(by_step)]
