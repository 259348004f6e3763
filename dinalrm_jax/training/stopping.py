"""Stopping a run from outside: all processes save and stop after the same step."""

import itertools
import signal

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """A signal asked to stop, and the state is saved; `number` is the signal's."""

    def __init__(self, number: int, stage: str, step: int):
        name = signal.Signals(number).name
        where = f"after {stage} step {step}" if step else f"before the {stage}'s first step"
        super().__init__(f"stopped by {name} {where}; the same command continues from there")
        self.number = number


class StopSignals:
    """While open, the first SIGTERM or Ctrl-C only asks to stop; a second one acts as ever.

    Among several processes SIGTERM belongs to JAX's preemption service, which finds the point at which
    all of them stop, whichever of them was asked. Points are counted over the life of the process,
    from 1, as the service expects them.
    """

    _points = itertools.count(1)

    def __enter__(self) -> "StopSignals":
        self._number: int | None = None
        self._alone = jax.process_count() == 1
        numbers = (signal.SIGTERM, signal.SIGINT) if self._alone else ()
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def asked(self) -> int | None:
        """The signal to stop for now, or None; every process calls it at the same points of its work."""
        if self._alone:
            return self._number
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(self._points)) else None

    def _receive(self, number, frame) -> None:
        self._number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception) -> None:
        self._restore()
