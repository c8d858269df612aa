"""Train: one checkpoint for one mode, as a Prefect flow.

SIGINT and SIGTERM end the training early; the best model so far is then measured and written.
"""

import signal
import threading
from types import FrameType

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.begin import begin_flow
from schemas.settings import TrainingSettings, checked
from tasks.training.model_card import card_markdown
from tasks.training.train import Trained, train_model

train_task = task(name="train", tags=["frontalis"], cache_policy=NO_CACHE, persist_result=False)(train_model)


@flow(name="train")
def train(
    sources: list[str],
    out: str,
    mode: str = "per_sample",
    augment: list[str] | None = None,
    architecture: str | None = None,
    loss: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    validation: float | None = None,
    test: float | None = None,
    columns: dict[str, str] | None = None,
    skip_bad_rows: bool = False,
) -> Trained:
    """Train a model on labelled shards and write its checkpoint; see `tasks.training.train`. None means the default.

    `columns` maps a role of `schemas.settings.ColumnNames` to the column's name in the sources.

    Raises:
        SettingsError: an option cannot be used.
        TrainingError: the rows cannot support a model.
    """
    begin_flow()
    values = {
        "sources": tuple(sources),
        "out": out,
        "mode": mode,
        "augment": tuple(augment or ()),
        "architecture": architecture,
        "loss": loss,
        "seed": seed,
        "steps": steps,
        "validation": validation,
        "test": test,
        "columns": columns,
        "skip_bad_rows": skip_bad_rows,
    }
    given = {name: value for name, value in values.items() if value is not None}
    stop = StopSignals()
    try:
        trained = train_task(checked(TrainingSettings, given), should_stop=stop)
    finally:
        stop.restore_handlers()
    try:
        create_markdown_artifact(
            markdown=card_markdown(trained.card), key=f"frontalis-model-{mode.replace('_', '-')}", description=out
        )
    finally:
        if stop.number is not None:
            signal.raise_signal(stop.number)
    return trained


class StopSignals:
    """A `should_stop` callback that returns True once SIGINT or SIGTERM came.

    Handlers are set by the first call: until the training begins, a signal ends the flow at once. They go with the
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
