"""Measure a release again, on the features it was published with."""

from schemas.reports import Evaluation
from schemas.settings import EvaluationSettings, PipelineSettings, checked
from storage.features import features_table
from storage.location import Location
from storage.releases import Releases
from storage.tombstones import Tombstones
from tasks.evaluate import evaluate
from tasks.stages import Stages


def evaluate_release(
    store: str,
    release: str | None = None,
    *,
    pairs: str | None = None,
    resamples: int | None = None,
    stages: Stages | None = None,
) -> Evaluation:
    """Measure a release with the settings it was made with.

    Args:
        store: local path or s3://…
        release: its name; the one served by default.
        pairs: a pairs file; overrides that of the settings.
        resamples: bootstrap resamples; overrides the settings.
        stages: how the measurement is called.

    Raises:
        SettingsError: no such store, release or pairs file.
        StoreError: nothing is served yet, or its features are damaged or vacuumed.
    """
    history = Releases.of(Location(store))
    record = history.servable(release) if release else history.serving()
    Tombstones.proven(history.store, history.all())
    settings = checked(PipelineSettings, {**record.settings, "store": store})
    given = {name: value for name, value in {"pairs": pairs, "resamples": resamples}.items() if value is not None}
    evaluation = checked(EvaluationSettings, {**dict(settings.evaluation), **given})
    features = features_table(history.store).snapshot(record.features_version)
    measured = (stages or Stages()).call(
        "evaluate",
        evaluate,
        history.store,
        record.release,
        features,
        record.models,
        evaluation,
        settings.index,
        expand=settings.query.expand,
    )
    return measured.replaced(indexes={mode: index.audit for mode, index in record.indexes.items()})
