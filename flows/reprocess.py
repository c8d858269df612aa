"""Reprocess: bring the store up to date with the source and the models, measure, and serve the result if it is good.

The recipe: prepare the models, plan, reweight, publish, index, evaluate, judge, record. A run that is interrupted at
any point leaves the served release untouched; the next one finds what is done by name and finishes the rest.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from prefect.utilities.annotations import opaque
from pydantic import BaseModel, Field

from flows.progress import show_progress
from flows.runner import check_runner, reweight_all
from reports.html import markdown_table
from schemas.errors import ExitCode, FrontalisError, SettingsError, StoreError
from schemas.features import digest_of
from schemas.metrics import measured_modes
from schemas.releases import ModelRef, Release, release_name
from schemas.reports import DataQuality, Estimate, Evaluation, GateDecision, ShardFault
from schemas.settings import PipelineSettings, load_pipeline
from storage.features import DamagedFilesError, features_table
from storage.location import Location
from storage.lock import store_lock
from storage.releases import Releases
from storage.shards import refuse_nested
from storage.tables import Snapshot
from storage.tombstones import Tombstones
from tasks.evaluation.pairs import read_pairs
from tasks.gate import decide, gated
from tasks.index import Previous
from tasks.maintenance.erased_releases import mark_erased_releases
from tasks.plan import Plan
from tasks.publish import Published
from tasks.release import write_report
from tasks.stages import evaluate_task, index_task, models_task, plan_task, publish_task

log = logging.getLogger("frontalis.reprocess")


class Outcome(BaseModel):
    """What a run came to, for the person or program that started it."""

    status: Literal["promoted", "rejected", "unchanged"]
    release: str
    store: str
    reason: str
    shards_computed: int = 0
    shards_reused: int = 0
    rows_computed: int = 0
    seconds: float = 0.0
    data: DataQuality
    gated_name: str = ""
    gated: dict[str, Estimate] = Field(default_factory=dict)
    evaluation: Evaluation | None = None
    report: str | None = None
    warnings: list[str] = Field(default_factory=list)


class CompletedWithBadShardsError(FrontalisError):
    """All work is done but for shards that cannot be used; `outcome` tells what came of the others."""

    exit_code = ExitCode.BAD_SHARDS

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        faults = outcome.data.bad_shards
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        super().__init__(
            f"completed with bad shards: {', '.join(fault.shard for fault in faults[:5])}{more}; {outcome.release} "
            f"({outcome.status}) holds the others. Mend them and run again."
        )


@flow(name="reprocess", validate_parameters=True)
def reprocess(config: str | None = None, settings: PipelineSettings | None = None) -> State[Outcome] | Outcome:
    """Run the whole job as `pipeline.toml` (`config`) or `settings` say; the state tells what became of it.

    Raises:
        SettingsError: neither or both are given, or something in them cannot be used.
        CompletedWithBadShardsError: some shards cannot be used; the work on the others is done.
    """
    show_progress()
    if (config is None) == (settings is None):
        raise SettingsError("reprocess: pass either config (a pipeline.toml) or settings.")
    outcome = run(load_pipeline(config) if config is not None else settings)  # type: ignore[arg-type]
    if outcome.data.bad_shards:
        error = CompletedWithBadShardsError(outcome)
        return Failed(message=str(error), data=error, name="CompletedWithBadShards")
    if outcome.status == "rejected":
        return Completed(message=outcome.reason, data=outcome, name="Rejected")
    return outcome


def run(settings: PipelineSettings) -> Outcome:
    """Do the work of `reprocess`, inside its flow run. A file that turns out damaged is removed and computed again."""
    check_runner(settings.runner)
    refuse_nested(Location(settings.source), Location(settings.store))
    pairs = read_pairs(settings.evaluation.pairs).digest if settings.evaluation.pairs else None
    store = Location(settings.store)
    with store_lock(store, "reprocess", settings.wait):
        removed = set[str]()
        while True:
            try:
                return _run(settings, store, pairs)
            except DamagedFilesError as error:
                damaged = {place.uri for place in error.places}
                if damaged <= removed:  # written anew and damaged again: not for us to mend
                    raise
                log.warning("%s", error)
                removed |= damaged
                for place in error.places:
                    place.delete()


def _run(settings: PipelineSettings, store: Location, pairs: str | None) -> Outcome:
    started = time.monotonic()
    history, tombstones = Releases(store), Tombstones(store)
    models = models_task(settings)
    plan = plan_task(settings, models)
    releases = mark_erased_releases(history, tombstones)
    content = release_content(settings, plan.wanted, [fault.shard for fault in plan.faults], pairs)
    latest = releases[-1] if releases and _is_indexed(store, releases[-1]) else None
    if not plan.groups and latest and latest.content == content:
        return _unchanged(settings, latest, plan.faults, time.monotonic() - started)
    work = plan.work
    log.info("plan: %d shards to compute, %d files to reuse, %d shards bad", len(work), len(plan.reused),
             len(plan.faults))  # fmt: skip
    results = reweight_all(settings, plan, models) if work else []
    published = publish_task(settings, opaque(plan), opaque(results))
    # A shard may turn out bad only while it is read; the name of the release must not promise it.
    faults = published.data.bad_shards
    content = release_content(settings, published.features.files, [fault.shard for fault in faults], pairs)
    if latest and latest.content == content:
        return _unchanged(settings, latest, faults, time.monotonic() - started)
    release = _release(settings, plan, published, releases, content, models)
    release = release.model_copy(update={"tombstones": tombstones.digest})
    outcome = _measure_and_record(settings, release, published, history, releases)
    mark_erased_releases(
        history, tombstones
    )  # the release served until now may hold a person whose forgetting was interrupted
    warnings = [warning for result in results for warning in result.warnings]
    for warning in warnings:
        log.warning("%s", warning)
    return outcome.model_copy(
        update={
            "shards_computed": len(work),
            "shards_reused": len({file.shard for file in plan.reused}),
            "rows_computed": sum(item.rows for item in work),
            "seconds": time.monotonic() - started,
            "warnings": warnings,
        }
    )


def release_content(
    settings: PipelineSettings, paths: Iterable[str], bad_shards: Sequence[str], pairs: str | None
) -> str:
    """Return the digest of all that a release depends on: the same content needs no new release.

    Args:
        settings: of them, those that shape index, evaluation and gate.
        paths: names of the feature files.
        bad_shards: shards that could not be used.
        pairs: digest of the pairs file, if there is one.
    """
    chosen = settings.model_dump(
        mode="json", include={"index", "evaluation", "gate"}, exclude={"evaluation": {"device"}}
    )
    return digest_of(
        *(path.encode() for path in sorted(paths)),
        repr(sorted(chosen.items())).encode(),
        repr(sorted(bad_shards)).encode(),
        (pairs or "").encode(),
    )


def _measure_and_record(
    settings: PipelineSettings, release: Release, published: Published, history: Releases, releases: Sequence[Release]
) -> Outcome:
    served = next((old for old in releases if old.serving), None)
    previous = _previous(history, releases, release)
    indexes = {}
    for mode in measured_modes(release.models):
        indexes[mode] = index_task.with_options(task_run_name=f"index-{mode}")(
            history.store,
            release.release,
            mode,
            opaque(published.features),
            settings.index,
            opaque(previous.get(mode)),
        )
    features = _snapshot(history, served)
    before = Previous(served, features) if served is not None and features is not None else None
    evaluation = evaluate_task(
        settings.store,
        release.release,
        opaque(published.features),
        release.models,
        settings.evaluation,
        settings.index,
        opaque(before),
    ).model_copy(update={"indexes": {mode: index.audit for mode, index in indexes.items()}})
    decision = decide(evaluation, settings.gate, served)
    measured = gated(evaluation, settings.gate)
    release = release.model_copy(
        update={"indexes": indexes, "gate": decision, "gated": measured.figures, "gated_name": measured.name}
    )
    release = release.model_copy(update={"report": write_report(settings, release, evaluation, releases)})
    history.record(release, releases)
    log.info("%s: %s", release.release, decision.reason)
    _artifacts(settings, release, evaluation)
    return Outcome(
        status="promoted" if decision.promoted else "rejected",
        release=release.release,
        store=settings.store,
        reason=decision.reason,
        data=release.data,
        gated_name=measured.name,
        gated=measured.figures,
        evaluation=evaluation,
        report=f"{Location(settings.store).uri}/{release.report}" if release.report else None,
    )


def _release(
    settings: PipelineSettings,
    plan: Plan,
    published: Published,
    releases: Sequence[Release],
    content: str,
    models: Mapping[str, ModelRef],
) -> Release:
    number = releases[-1].number + 1 if releases else 1
    return Release(
        release=release_name(number, content),
        number=number,
        created=datetime.now(UTC),
        content=content,
        source=settings.source,
        features_version=published.features.version,
        quarantine_version=published.quarantine.version if published.quarantine.version >= 0 else None,
        models=dict(models),
        indexes={},
        data=published.data,
        gate=GateDecision(promoted=False, reason="not judged yet"),
        gated={},
        gated_name="",
        report=None,
        settings=settings.model_dump(mode="json"),
    )


def _previous(history: Releases, releases: Sequence[Release], release: Release) -> dict[str, Previous]:
    """Return, by mode, the latest release whose index the new one can be carried on from."""
    found: dict[str, Previous] = {}
    for old in reversed(releases[-10:]):
        known_clean = not old.erased and old.tombstones == release.tombstones  # else it was trained with the forgotten
        if not known_clean or set(old.indexes) <= set(found):
            continue
        snapshot = _snapshot(history, old)
        if snapshot is not None:
            for mode in old.indexes:
                same_model = mode not in release.models or old.models[mode].digest == release.models[mode].digest
                if same_model:
                    found.setdefault(mode, Previous(old, snapshot))
    return found


def _snapshot(history: Releases, release: Release | None) -> Snapshot | None:
    if release is None:
        return None
    try:
        return features_table(history.store).snapshot(release.features_version)
    except StoreError:
        return None


def _is_indexed(store: Location, release: Release) -> bool:
    """Return whether the index files of a release lie there; one that was lost is built again in a new release."""
    return all(
        (store / index.path).size() == index.size and (store / index.ids_path).size() is not None
        for index in release.indexes.values()
    )


def _unchanged(settings: PipelineSettings, release: Release, faults: Sequence[ShardFault], seconds: float) -> Outcome:
    """Return the outcome of a run without work: what was rejected yesterday is still rejected today."""
    log.info("nothing changed since %s: no shard was computed", release.release)
    rejected = not release.gate.promoted and not release.serving
    since = f"nothing changed since {release.release} of {release.created:%Y-%m-%d %H:%M} UTC"
    return Outcome(
        status="rejected" if rejected else "unchanged",
        release=release.release,
        store=settings.store,
        reason=f"{release.gate.reason} ({since})" if rejected else since,
        seconds=seconds,
        data=release.data.model_copy(update={"bad_shards": list(faults)}),
        gated_name=release.gated_name,
        gated=release.gated,
        report=f"{Location(settings.store).uri}/{release.report}" if release.report else None,
    )


def _artifacts(settings: PipelineSettings, release: Release, evaluation: Evaluation) -> None:
    key = "frontalis-modes"
    create_markdown_artifact(
        markdown=f"# {release.release}\n\n{release.gate.reason}\n\n{markdown_table(evaluation)}",
        key=key,
        description=f"verification per mode of {release.release}",
    )
    if release.report:
        place = Location(settings.store) / release.report
        create_link_artifact(
            link=Path(place.uri).as_uri() if place.is_local else place.uri,
            link_text=f"report of {release.release}",
            key="frontalis-report",
        )
