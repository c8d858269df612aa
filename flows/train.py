"""Train: one checkpoint for one mode, as a Prefect flow.

SIGINT and SIGTERM end the training early; the best model so far is then measured and written.
"""

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.begin import begin_flow
from schemas.settings import training
from tasks.training.model_card import card_markdown
from tasks.training.stop import stop_signals
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
    settings = training(
        sources=sources,
        out=out,
        mode=mode,
        augment=augment,
        architecture=architecture,
        loss=loss,
        seed=seed,
        steps=steps,
        validation=validation,
        test=test,
        columns=columns,
        skip_bad_rows=skip_bad_rows,
    )
    with stop_signals() as stop:
        trained: Trained = train_task(settings, should_stop=stop)
        create_markdown_artifact(
            markdown=card_markdown(trained.card), key=f"frontalis-model-{mode.replace('_', '-')}", description=out
        )
    return trained
