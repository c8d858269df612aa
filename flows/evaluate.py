"""Evaluate: measure a release again, on the features it was published with, as a Prefect flow."""

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.begin import begin_flow, named, store_of
from flows.runner import PrefectStages
from reports.html import markdown_table
from schemas.reports import Evaluation
from tasks.evaluation.released import evaluate_release


@flow(name="evaluate", flow_run_name=named("evaluate", "release"))
def evaluate(
    store: str, release: str | None = None, pairs: str | None = None, resamples: int | None = None
) -> Evaluation:
    """Measure `release` (the one served by default) with the settings it was made with.

    Args:
        store: local path, s3://…, or a pipeline.toml that names it.
        release: a release by name.
        pairs: a pairs file; overrides that of the settings.
        resamples: bootstrap resamples; overrides the settings.

    Raises:
        SettingsError: no such store, release or pairs file.
        StoreError: nothing is served yet, or its features are damaged or vacuumed.
    """
    begin_flow()
    measured = evaluate_release(store_of(store), release, pairs=pairs, resamples=resamples, stages=PrefectStages())
    create_markdown_artifact(
        markdown=f"# {measured.release}\n\n{markdown_table(measured)}",
        key="frontalis-evaluation",
        description=f"verification per mode of {measured.release}",
    )
    return measured
