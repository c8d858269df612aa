"""Evaluate: measure a release again, on the features it was published with."""

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.utilities.annotations import opaque

from flows.begin import begin_flow
from reports.html import markdown_table
from schemas.reports import Evaluation
from schemas.settings import EvaluationSettings, PipelineSettings, checked
from storage.features import features_table
from storage.location import Location
from storage.releases import Releases
from storage.tombstones import Tombstones
from tasks.stages import evaluate_task


@flow(name="evaluate")
def evaluate(
    store: str, release: str | None = None, pairs: str | None = None, resamples: int | None = None
) -> Evaluation:
    """Measure `release` (the one served by default) with the settings it was made with.

    Args:
        store: local path or s3://…
        release: a release by name.
        pairs: a pairs file; overrides that of the settings.
        resamples: bootstrap resamples; overrides the settings.

    Raises:
        SettingsError: no such store, release or pairs file.
        StoreError: nothing is served yet, or its features are damaged or vacuumed.
    """
    begin_flow()
    history = Releases.of(Location(store))
    record = history.servable(release) if release else history.serving()
    Tombstones.proven(history.store, history.all())
    settings = checked(PipelineSettings, {**record.settings, "store": store})
    given = {name: value for name, value in {"pairs": pairs, "resamples": resamples}.items() if value is not None}
    evaluation = checked(EvaluationSettings, {**dict(settings.evaluation), **given})
    features = features_table(history.store).snapshot(record.features_version)
    result: Evaluation = evaluate_task(
        history.store, record.release, opaque(features), record.models, evaluation, settings.index
    ).replaced(indexes={mode: index.audit for mode, index in record.indexes.items()})
    create_markdown_artifact(
        markdown=f"# {record.release}\n\n{markdown_table(result)}",
        key="frontalis-evaluation",
        description=f"verification per mode of {record.release}",
    )
    return result
