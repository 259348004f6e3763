"""What the server counts, for Prometheus."""

import functools

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dinalrm_jax.server.batcher import READY, Batcher
from dinalrm_jax.server.bodies import Bodies
from dinalrm_jax.server.connections import Connections

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

_compilations = 0


def _count_compilation(event: str, duration_secs: float, **attributes: str | int) -> None:
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


class Metrics:
    """The server's metrics, in a registry of their own.

    Args:
        batcher: whose queue and state are shown.
        bodies: whose bytes are shown.
        connections: whose number is shown.
    """

    def __init__(self, batcher: Batcher, bodies: Bodies, connections: Connections):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("dinalrm_requests", "Answered requests.", ["status"], registry=registry)
        self.errors = Counter("dinalrm_errors", "Requests without a score.", ["code"], registry=registry)
        self.rows = Counter("dinalrm_rows", "Rows scored.", registry=registry)
        self.seconds = Histogram("dinalrm_request_seconds", "From head to answer.", buckets=SECONDS, registry=registry)
        self.queued = Histogram("dinalrm_queue_seconds", "A row's wait.", buckets=SECONDS, registry=registry)
        self.computed = Histogram("dinalrm_batch_seconds", "A batch's time.", buckets=SECONDS, registry=registry)
        self.batch_size = Histogram(
            "dinalrm_batch_rows", "Rows a batch.", buckets=batcher.engine.buckets, registry=registry
        )
        for name, text, value in (
            ("dinalrm_queue_rows", "Rows waiting.", lambda: batcher.waiting),
            ("dinalrm_requests_reading", "Requests whose body is being read.", lambda: batcher.reading),
            ("dinalrm_held_bytes", "Of bodies being read, waiting or scored.", lambda: bodies.held),
            ("dinalrm_connections", "Open ones.", lambda: len(connections.open)),
            ("dinalrm_ready", "1 while rows are scored.", lambda: batcher.state == READY),
            ("dinalrm_xla_compilations", "Programs compiled by this process.", lambda: _compilations),
        ):
            Gauge(name, text, registry=registry).set_function(value)
        device = jax.devices()[0]
        if device.memory_stats() is not None:  # a CPU does not say
            for name, text, key in (
                ("dinalrm_device_memory_bytes", "In use on the device.", "bytes_in_use"),
                ("dinalrm_device_memory_peak_bytes", "The most that was in use.", "peak_bytes_in_use"),
            ):
                Gauge(name, text, registry=registry).set_function(functools.partial(_memory, device, key))

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


def _memory(device: jax.Device, key: str) -> float:
    return device.memory_stats().get(key, 0)
