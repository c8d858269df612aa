"""Ctrl-C and SIGTERM during a training: the best model so far is measured and written before the process ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from schemas.settings import TrainingSettings
from tasks.training.train import Trained, train_model


class StopSignals:
    """A `should_stop` callback that returns True once SIGINT or SIGTERM came.

    Handlers are set by the first call: until the training begins, a signal ends the process at once. They go with the
    first signal, so that a second one interrupts measuring and writing, too.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._handlers: dict[int, signal._HANDLER] = {}

    def __call__(self) -> bool:
        """Return whether a signal came."""
        if not self._handlers and threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self.number is not None

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Give a `should_stop` callback. A signal that came takes effect at the end of the block."""
    stop = StopSignals()
    try:
        yield stop
    finally:
        stop.restore_handlers()
        if stop.number is not None:
            signal.raise_signal(stop.number)


def train_until_stopped(settings: TrainingSettings) -> Trained:
    """Train as `train_model`; the first signal ends the training early and takes effect after its model is written."""
    with stop_signals() as stop:
        return train_model(settings, should_stop=stop)
