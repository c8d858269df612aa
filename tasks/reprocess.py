"""Reprocess: bring the store up to date with the source and the models, measure, and serve the result if it is good.

The stages: prepare the models, plan, reweight, publish, index, evaluate, gate, record. A run that is interrupted at any
point leaves the served release untouched; the next one finds by name what is done and finishes the rest.

Nothing here knows Prefect: `flows.reprocess` runs the same job with its stages as Prefect tasks.
"""

import logging
import time
from collections.abc import Sequence

from schemas.releases import IndexRef, ModelRef, Release, anchor_of
from schemas.reports import ShardFault
from schemas.settings import PipelineSettings
from storage.delta_log import DamagedFilesError
from storage.location import Location
from storage.lock import store_lock
from storage.permissions import restrict_new_files
from storage.releases import Releases, refuse_foreign_tables
from storage.shards import refuse_nested
from storage.tombstones import Tombstones
from tasks.changes import changes_since
from tasks.costs import Costs
from tasks.evaluate import evaluate
from tasks.evaluation.pairs import read_pairs
from tasks.gate import decide
from tasks.index import Previous, index_mode, is_indexed, previous_indexes, release_features
from tasks.maintenance.erased_releases import mark_erased_releases
from tasks.maintenance.lost_releases import is_published, mark_lost_releases
from tasks.maintenance.vacuum import apply_retention
from tasks.outcome import Outcome
from tasks.plan import Plan, make_plan, prepare_models
from tasks.publish import publish
from tasks.release import build_release, next_release_name, release_content, write_report
from tasks.removal import is_allowed_now, limit_removal
from tasks.reweight import ShardResult
from tasks.stages import Stages

log = logging.getLogger("frontalis.reprocess")


def reprocess(settings: PipelineSettings, *, allow_removal: bool = False, stages: Stages | None = None) -> Outcome:
    """Run the whole job. A file that turns out damaged is deleted and computed again.

    Args:
        settings: what to read, where to write, and how.
        allow_removal: this one run may remove or quarantine more than `[gate]` allows.
        stages: how the stages are called.

    Raises:
        SettingsError: something in the settings cannot be used.
        StoreBusyError: another run has the store.
        FrontalisError: as the stages. What is complete is kept.
    """
    restrict_new_files()
    stages = stages or Stages()
    stages.check(settings)
    store = Location(settings.store)
    refuse_nested(Location(settings.source), store)
    refuse_foreign_tables(store)
    pairs = read_pairs(settings.evaluation.pairs).digest if settings.evaluation.pairs else None
    with store_lock(store, "reprocess", settings.wait):
        deleted = set[str]()
        while True:
            try:
                with Costs() as costs:
                    return _run(settings, store, pairs, allow_removal, stages, costs)
            except DamagedFilesError as error:
                damaged = {place.uri for place in error.places}
                if damaged <= deleted:  # written again and damaged again: this disk cannot be relied on
                    raise
                log.warning("%s", error)
                deleted |= damaged
                for place in error.places:
                    place.delete()


def _run(
    settings: PipelineSettings,
    store: Location,
    pairs: str | None,
    allow_removal: bool,
    stages: Stages,
    costs: Costs,
) -> Outcome:
    started = time.monotonic()
    history = Releases(store)
    tombstones = Tombstones.proven(store, history.all())
    with costs.stage("plan") as stage:
        models = stages.call("models", prepare_models, settings)
        plan = stages.call("plan", make_plan, settings, models)
        stage.rows = sum(record.rows for record in plan.records.values())
    earlier = mark_erased_releases(history, tombstones)
    content = release_content(settings, plan.wanted, plan.faults, pairs)
    earlier = mark_lost_releases(history, earlier, content)
    latest = earlier[-1] if earlier and is_indexed(store, earlier[-1]) else None
    if latest and is_allowed_now(latest, settings.gate, allowed=allow_removal):
        latest = None  # what was rejected for what it removes is measured and decided again
    if not plan.groups and latest and latest.content == content and is_published(store, latest, plan.wanted):
        return _unchanged(settings, latest, plan.faults, started)
    log.info("plan: %d shards to compute, %d files to reuse, %d shards bad", len(plan.work), len(plan.reused),
             len(plan.faults))  # fmt: skip
    with costs.stage("reweight") as stage:
        final, results = _compute(settings, plan, models, stages)
        stage.rows = sum(work.rows for work in plan.work)
    with costs.stage("publish"):
        published = stages.call("publish", publish, settings, final, results)
    content = release_content(settings, published.features.files, published.data.bad_shards, pairs)
    if latest and latest.content == content and is_published(store, latest, published.features.files):
        return _unchanged(settings, latest, published.data.bad_shards, started)

    name = next_release_name(earlier, content)
    previous = previous_indexes(store, earlier, models, tombstones.digest)
    indexes: dict[str, IndexRef] = {}
    for mode in plan.modes:
        with costs.stage(f"index {mode}") as stage:
            indexes[mode] = stages.call(
                f"index-{mode}", index_mode, store, name, mode, published.features, settings.index, previous.get(mode)
            )
            stage.rows = indexes[mode].rows
    served = next((release for release in earlier if release.serving), None)
    anchor = anchor_of(earlier)
    features = release_features(store, served)
    with costs.stage("evaluate") as stage:
        evaluation = stages.call(
            "evaluate",
            evaluate,
            store,
            name,
            published.features,
            models,
            settings.evaluation,
            settings.index,
            Previous(served, features) if served and features else None,
            anchor,
            expand=settings.query.expand,
        ).replaced(indexes={mode: index.audit for mode, index in indexes.items()})
        stage.rows = sum(population.n_rows for population in evaluation.populations.values())
    modes = list(models)
    changes = changes_since(served, features, published.features, modes, store) if served else None
    gate = decide(evaluation, settings.gate, served, anchor)
    gate = limit_removal(gate, changes, published.data, served, settings.gate, allowed=allow_removal)
    release = build_release(
        settings,
        earlier,
        content=content,
        features=published.features,
        quarantine=published.quarantine,
        models=models,
        indexes=indexes,
        data=published.data,
        evaluation=evaluation,
        gate=gate,
        tombstones=tombstones,
        source_version=plan.source_version,
        stages=costs.stages,
    )
    with costs.stage("report"):
        write_report(store, release, evaluation, earlier)
    release = release.replaced(stages=costs.stages)
    history.record(release, earlier)
    log.info("%s: %s", release.release, release.gate.sentence)
    # The release that was served until now may hold a person whose erasure was interrupted.
    mark_erased_releases(history, tombstones)
    apply_retention(store, settings.retention)
    outcome = Outcome.measured(settings.store, release, evaluation, plan, results, time.monotonic() - started)
    for warning in outcome.warnings:
        log.warning("%s", warning)
    return outcome


def _compute(
    settings: PipelineSettings, plan: Plan, models: dict[str, ModelRef], stages: Stages
) -> tuple[Plan, list[ShardResult]]:
    """Reweight what is planned; return the results, and the plan as it is after all shards were read.

    A shard may turn out bad only while it is read. Its last good features then own their ids, which the rows of other
    shards may have taken over: the plan is made again, and those shards are computed without the rows.
    """
    results: list[ShardResult] = []
    bad: list[ShardFault] = []
    while plan.work:
        found = stages.reweight(settings, plan, models)
        results += found
        faults = [result.fault for result in found if result.fault is not None]
        if not faults:
            break
        bad += faults
        plan = stages.call("plan", make_plan, settings, models, bad)
    return plan, results


def _unchanged(settings: PipelineSettings, latest: Release, faults: Sequence[ShardFault], started: float) -> Outcome:
    log.info("nothing changed since %s: no shard was computed", latest.release)
    return Outcome.unchanged(settings.store, latest, faults, time.monotonic() - started)
