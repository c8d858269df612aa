"""Train: one checkpoint for one mode, as a Prefect flow.

SIGINT and SIGTERM end the training early; the best model so far is then measured and written.
"""

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.begin import begin_flow, named
from schemas.choices import Architecture, Loss, Mode
from schemas.settings import training
from tasks.training.model_card import card_markdown
from tasks.training.stop import stop_signals
from tasks.training.train import Trained, train_model

train_task = task(name="train", tags=["frontalis"], cache_policy=NO_CACHE, persist_result=False)(train_model)


@flow(name="train", flow_run_name=named("train", "mode"))
def train(
    sources: list[str],
    out: str,
    mode: Mode = "per_sample",
    augment: list[str] | None = None,
    architecture: Architecture | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    steps: int | None = None,
    validation: float | None = None,
    test: float | None = None,
    columns: dict[str, str] | None = None,
    skip_bad_rows: bool = False,
) -> Trained:
    """Train a model on labelled shards, measure it on held-out subjects, and write its checkpoint.

    Args:
        sources: folders of labelled shards.
        out: the checkpoint to write, .safetensors; its card goes beside it.
        mode: how the squeeze statistic is formed.
        augment: further views of the same subjects, for training only.
        architecture: of the network; by default dual_branch_ensemble.
        loss: by default global_threshold.
        seed: of all random choices.
        steps: training steps; 360 by default.
        validation: share of subjects that choose the model; 0.1 by default.
        test: share of subjects that only measure it; 0.1 by default.
        columns: role (id, embedding, subject, pose, yaw, pitch, roll) → name of the column in the sources.
        skip_bad_rows: leave out rows that cannot be used, where the run would fail.

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
