"""A window of training steps, recorded with JAX's profiler."""

import pathlib

import jax

from dinalrm_jax.config import ProfileConfig


class ProfileWindow:
    """Records the steps of `config` that the run does take. Close it, whatever happens."""

    def __init__(self, directory: pathlib.Path, config: ProfileConfig):
        self._directory = directory
        self._steps = range(config.start + 1, config.start + config.steps + 1)
        self._recording = False

    def before(self, step: int) -> None:
        """Call before a step: starts where the window does, or where a resumed run enters it."""
        if step in self._steps and not self._recording:
            jax.profiler.start_trace(str(self._directory))
            self._recording = True

    def after(self, step: int, results) -> None:
        """Call after a step with what it computes: ends the window after its last step."""
        if self._recording and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was recorded."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
