"""Reprocess as a Prefect flow: the job of `tasks.reprocess`, its stages as Prefect tasks and its outcome as a state."""

from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.begin import begin_flow, named
from flows.runner import PrefectStages
from reports.html import markdown_stages, markdown_table
from schemas.errors import SettingsError
from schemas.settings import PipelineSettings, load_pipeline
from tasks import reprocess as job
from tasks.outcome import CompletedWithBadShardsError, Outcome


@flow(name="reprocess", flow_run_name=named("reprocess"))
def reprocess(
    config: str | None = None, settings: PipelineSettings | None = None, allow_removal: bool = False
) -> State[Outcome] | Outcome:
    """Bring the store up to date, measure, and serve the result if the gate promotes it.

    The state of the run shows the decision.

    Args:
        config: a pipeline.toml on the worker's machine.
        settings: its content, in place of `config`.
        allow_removal: let this one run remove or quarantine more than [gate] allows.

    Raises:
        SettingsError: neither is given, or something in them cannot be used.
        CompletedWithBadShardsError: some shards cannot be used; the work on the others is done.
    """
    begin_flow()
    if settings is None:
        if config is None:
            raise SettingsError("reprocess: pass config (a pipeline.toml) or settings.")
        settings = load_pipeline(config)
    outcome = job.reprocess(settings, allow_removal=allow_removal, stages=PrefectStages())
    _show(outcome, settings.report.base_url)
    if outcome.data.bad_shards:
        error = CompletedWithBadShardsError(outcome)
        return Failed(message=str(error), data=error, name="CompletedWithBadShards")
    if outcome.status == "rejected":
        return Completed(message=f"rejected: {outcome.reason}", data=outcome, name="Rejected")
    return Completed(message=f"{outcome.status}: {outcome.reason}", data=outcome)


def _show(outcome: Outcome, base_url: str | None) -> None:
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
    key, name = "frontalis-report", f"report of {outcome.release}"
    if base_url is None:  # a browser refuses links from Prefect's page to files
        create_markdown_artifact(markdown=f"{name}: `{outcome.report}`", key=key, description=name)
    else:
        link = f"{base_url.rstrip('/')}/reports/{outcome.release}/index.html"
        create_link_artifact(link=link, link_text=name, key=key, description=name)
