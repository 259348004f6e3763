"""Serves rewards over HTTP to training frameworks in other processes, verl-omni's latent reward client among them.

    python -m dinalrm_jax.serve --checkpoint C [--base-model B] [--port 8000]

Protocol v1 (`dinalrm_jax/server/protocol.py`) on POST /v1/score; GET /healthz (200 once every program
is compiled and a score was finite), /livez, /v1/info and /metrics (Prometheus). SIGTERM finishes what
waits and exits with 0. A device that fails for good, or hangs, ends the process with 70: run it under
something that starts it again.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import ServeOptions

answer_help(__name__, __doc__, ServeOptions)  # before the imports that take a second

import asyncio
import json
import logging

from absl import logging as absl_logging

from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.model.execution import ExecutionConfig, Weights
from dinalrm_jax.model.reward import chosen_dtype
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.server.app import RewardServer
from dinalrm_jax.server.protocol import read_api_key
from dinalrm_jax.training.run_weights import open_checkpoint
from dinalrm_jax.weights.pretrained import PretrainedModel


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        values = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        values |= {name: getattr(record, name) for name in ("request_id", "status", "peer") if hasattr(record, name)}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values)


def configure_logging(as_json: bool) -> None:
    """The server's lines on standard error."""
    absl_logging.use_python_logging(quiet=True)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("dinalrm_jax").setLevel(logging.INFO)


def main(options: ServeOptions) -> None:
    """Serves until SIGTERM."""
    configure_logging(options.log_json)
    api_key = read_api_key(options.api_key_env)
    enable_compilation_cache()
    # int8 is made of weights that are there; others are on their way while programs are compiled.
    loading = RewardModel.from_pretrained if options.dtype == "int8" else _open
    model = loading(options.checkpoint, options.base_model, options.dtype, revision=options.revision)
    asyncio.run(RewardServer(model, options.server, options.checkpoint, api_key).serve())


def _open(checkpoint: str, base_model: str | None, dtype: Weights, revision: str | None) -> PretrainedModel:
    return open_checkpoint(checkpoint, base_model, ExecutionConfig(dtype=chosen_dtype(dtype)), revision=revision)


if __name__ == "__main__":
    # Ours are ValueErrors.
    run_command(main, ServeOptions, errors=(ValueError, OSError), interrupted="the server is down")
