"""A window of training steps, recorded with JAX's profiler."""

import jax

from dinalrm_jax.config import ProfileConfig
from dinalrm_jax.disk import AnyPath, Mirror


class ProfileWindow:
    """Records the steps of `config` that the run does take. Close it, whatever happens."""

    def __init__(self, directory: AnyPath, config: ProfileConfig):
        self._directory = directory
        self._steps = range(config.start + 1, config.start + config.steps + 1)
        self._recording: Mirror | None = None

    def before(self, step: int) -> None:
        """Call before a step: starts where the window does, or where a resumed run enters it."""
        if step in self._steps and self._recording is None:
            self._recording = Mirror(self._directory)
            jax.profiler.start_trace(str(self._recording.local))

    def after(self, step: int, results) -> None:
        """Call after a step with what it computes: ends the window after its last step."""
        if self._recording is not None and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was recorded."""
        if self._recording is not None:
            files, self._recording = self._recording, None
            jax.profiler.stop_trace()
            files.close()
