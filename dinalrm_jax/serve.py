"""Serves rewards over HTTP to training frameworks in other processes, verl-omni's latent reward client among them.

    python -m dinalrm_jax.serve --checkpoint C [--base-model B] [--port 8000]

Protocol v1 (`dinalrm_jax/server/protocol.py`) on POST /v1/score; GET /healthz (200 once every program
is compiled and a score was finite), /livez, /v1/info and /metrics (Prometheus). SIGTERM finishes what
waits and exits with 0. A device that fails for good, or hangs, ends the process with 70: run it under
something that starts it again.
"""

import asyncio
import dataclasses
import json
import logging
import sys

from absl import app, flags
from absl import logging as absl_logging

from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.server.app import RewardServer
from dinalrm_jax.server.config import ServerConfig
from dinalrm_jax.server.protocol import read_api_key
from dinalrm_jax.training.run_weights import open_checkpoint

DEFAULTS = ServerConfig()


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


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    configure_logging(values["log-json"].value)
    enable_compilation_cache()
    try:
        api_key = read_api_key(values["api-key-env"].value)
        given = {field.name: values[field.name.replace("_", "-")].value for field in dataclasses.fields(ServerConfig)}
        config = ServerConfig(**given | {"warmup": tuple(values.warmup)})
        execution = ExecutionConfig(dtype=values.dtype)
        server = RewardServer(
            open_checkpoint(values.checkpoint, values["base-model"].value, execution, revision=values.revision),
            config,
            values.checkpoint,
            api_key,
        )
        asyncio.run(server.serve())
    except (ValueError, OSError) as error:  # ours are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Checkpoint, released, native or of a training run: a directory or hub id.")
    flags.DEFINE_alias("model-path", "checkpoint")
    flags.DEFINE_string("base-model", None, "Base model in diffusers layout; needed for the released layout.")
    flags.DEFINE_alias("base-model-path", "base-model")
    flags.DEFINE_string("revision", None, "Commit, tag or branch of a checkpoint that is a hub id.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Compute dtype.")
    flags.DEFINE_string("host", DEFAULTS.host, "Address to listen on; 0.0.0.0 for all, on a trusted network.")
    flags.DEFINE_integer("port", DEFAULTS.port, "Port to listen on; 0 takes a free one.", 0, 65535)
    flags.DEFINE_integer("max-batch-size", DEFAULTS.max_batch_size, "Rows in one program.", 1)
    flags.DEFINE_float("max-wait-ms", DEFAULTS.max_wait_ms, "How long a batch waits for rows on a free device.", 0)
    flags.DEFINE_integer("max-queue", DEFAULTS.max_queue, "Rows that may wait; beyond, requests get 429.", 1)
    flags.DEFINE_integer(
        "max-body-mb", DEFAULTS.max_body_mb, "MiB a request may have; 64 rows of the largest shape if not given.", 1
    )
    flags.DEFINE_integer(
        "max-held-mb", DEFAULTS.max_held_mb, "MiB of all requests; --max-queue rows of the largest if not given.", 1
    )
    flags.DEFINE_integer("max-connections", DEFAULTS.max_connections, "Connections that may be open.", 1)
    flags.DEFINE_list(
        "warmup",
        DEFAULTS.warmup,
        "Shapes to compile at start, LATENT_HEIGHTxLATENT_WIDTHxTOKENS[,...]; 512 pixels and 333 tokens if not given.",
    )
    flags.DEFINE_float("deadline-s", DEFAULTS.deadline_s, "Seconds a request may take; verl-omni waits 120.", 0.001)
    flags.DEFINE_float("drain-s", DEFAULTS.drain_s, "Seconds for waiting rows at SIGTERM.", 0)
    flags.DEFINE_bool("allow-new-shapes", DEFAULTS.allow_new_shapes, "Compile up to 16 shapes that come.")
    flags.DEFINE_string("api-key-env", None, "Environment variable with a key that clients must send.")
    flags.DEFINE_bool("log-json", False, "Log lines of JSON.")
    flags.mark_flag_as_required("checkpoint")
    app.run(main)
