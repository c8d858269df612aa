"""Reprocess as a Prefect flow: the job of `tasks.reprocess`, its stages as Prefect tasks and its outcome as a state."""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.begin import begin_flow
from flows.runner import PrefectStages
from reports.html import markdown_stages, markdown_table
from schemas.errors import SettingsError
from schemas.settings import PipelineSettings, load_pipeline
from tasks import reprocess as job
from tasks.outcome import CompletedWithBadShardsError, Outcome


@flow(name="reprocess", validate_parameters=True)
def reprocess(
    config: str | None = None, settings: PipelineSettings | None = None, allow_removal: bool = False
) -> State[Outcome] | Outcome:
    """Run the whole job as `pipeline.toml` (`config`) or `settings` say; the state of the run shows the outcome.

    With `allow_removal` this one run may remove or quarantine more than `[gate]` allows.

    Raises:
        SettingsError: neither or both are given, or something in them cannot be used.
        CompletedWithBadShardsError: some shards cannot be used; the work on the others is done.
    """
    begin_flow()
    if config is not None and settings is None:
        settings = load_pipeline(config)
    elif config is not None or settings is None:
        raise SettingsError("reprocess: pass either config (a pipeline.toml) or settings.")
    outcome = job.reprocess(settings, allow_removal=allow_removal, stages=PrefectStages())
    _show(outcome)
    if outcome.data.bad_shards:
        error = CompletedWithBadShardsError(outcome)
        return Failed(message=str(error), data=error, name="CompletedWithBadShards")
    if outcome.status == "rejected":
        return Completed(message=f"rejected: {outcome.reason}", data=outcome, name="Rejected")
    return outcome


def _show(outcome: Outcome) -> None:
    """Show a new release in Prefect: its decision, its table, a link to its report."""
    if outcome.evaluation is None or outcome.report is None:
        return
    create_markdown_artifact(
        markdown=f"# {outcome.release}\n\n{outcome.status}: {outcome.reason}\n\n{markdown_table(outcome.evaluation)}",
        key="frontalis-modes",
        description=f"verification per mode of {outcome.release}",
    )
    create_markdown_artifact(
        markdown=f"# {outcome.release}\n\n{markdown_stages(outcome.stages)}",
        key="frontalis-stages",
        description=f"time and memory of each stage that made {outcome.release}",
    )
    create_link_artifact(
        link=outcome.report if "://" in outcome.report else Path(outcome.report).as_uri(),
        link_text=f"report of {outcome.release}",
        key="frontalis-report",
    )
