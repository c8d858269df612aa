"""Forget: take a person or a row out of the store, and keep them out while the source still has them.

One new release without the rows is served at once; older releases that held them can no longer be served, and
`tasks.maintenance.vacuum` removes their files. The source is not needed. What is left of a person afterwards is a
salted hash, and whatever a model learned from them: a model forgets by being trained again. This is no Prefect flow on
purpose: the server would keep the parameters of its run, and with them whom it was to forget.
"""

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel

from flows.reprocess import release_content
from schemas.errors import SettingsError, StoreBusyError
from schemas.releases import IndexRef, Release, release_name
from schemas.reports import DataQuality, GateDecision
from schemas.settings import ColumnNames, EvaluationSettings, PipelineSettings, checked
from storage.features import features_table, quarantine_table, read_table
from storage.layout import FORGET_LOG
from storage.location import Location
from storage.lock import store_lock
from storage.releases import Releases
from storage.tombstones import Tombstones
from tasks.evaluate import evaluate
from tasks.evaluation.pairs import read_pairs
from tasks.gate import gated
from tasks.index import Previous, index_mode
from tasks.maintenance.erase import Erased, erase
from tasks.maintenance.erased_releases import holds_forgotten
from tasks.release import write_report

log = logging.getLogger("frontalis.forget")


class Forgotten(BaseModel):
    """What forgetting came to. `release` is the one served from now on; None where nothing had to change."""

    kind: Literal["id", "subject"]
    rows: int
    quarantined: int
    shards: int
    release: str | None
    erased_releases: list[str]


def forget(store: str, *, subject: str | None = None, id_: str | None = None, wait: float = 0.0) -> Forgotten:
    """Remove all rows of a subject, or the rows of one id, and serve a release without them.

    Every earlier tombstone is applied again as well, so that running it once more completes what was interrupted.
    Forgetting somebody of whom there is no row keeps future rows out.

    Args:
        store: local path or s3://…
        subject: whom to forget; or
        id_: the one row to forget (an integer id as its digits).
        wait: seconds to wait for a run that holds the store.

    Raises:
        SettingsError: neither or both are given, or there is no store.
        StoreBusyError: another run holds the store or committed meanwhile.
        StoreError: a file of the served release is damaged.
    """
    kind: Literal["id", "subject"] = "subject" if subject is not None else "id"
    value = subject if subject is not None else id_
    if value is None or (subject is not None and id_ is not None):
        raise SettingsError("forget: pass either --subject or --id.")
    history = Releases.of(Location(store))
    place = history.store
    with store_lock(place, "forget", wait):
        before, tombstones = Tombstones(place), Tombstones(place)
        mark = tombstones.mark(kind, value)
        tombstones.add([mark])
        releases = history.all()
        result = _forget(place, kind, history, releases, tombstones, before)
        if mark not in Tombstones(place).marks:  # object storage has no lock: two at once may overwrite each other
            raise StoreBusyError(f"{place.uri}: another run forgot somebody at the same time; run this again.")
        return result


def _forget(
    store: Location,
    kind: Literal["id", "subject"],
    history: Releases,
    releases: Sequence[Release],
    tombstones: Tombstones,
    before: Tombstones,
) -> Forgotten:
    served = next((release for release in releases if release.serving), None)
    latest = releases[-1] if releases else None
    columns = _settings(store, served or latest).columns if latest else ColumnNames()
    erased = erase(store, served, tombstones, before, columns)
    open_ones = [old for old in releases if not (old.erased or old.vacuumed)]
    held = [old.release for old in open_ones if holds_forgotten(store, old, tombstones)]
    outcome = Forgotten(
        kind=kind,
        rows=erased.rows,
        quarantined=erased.quarantined,
        shards=erased.shards,
        release=None,
        erased_releases=held,
    )
    history_after = [
        old.model_copy(
            update={"erased": True, "serving": False} if old.release in held else {"tombstones": tombstones.digest}
        )
        for old in releases
    ]
    _write_log(store, outcome)
    if served is None or served.release not in held:
        if held:
            history.rewrite(history_after, releases)
        return outcome
    if not any(file.rows for file in erased.features.files.values()):
        log.warning("no row is left: nothing is served until the next `frontalis reprocess`")
        history.rewrite(history_after, releases)
        return outcome
    release = _release_without(store, served, releases, erased, tombstones)
    history_after = [old.model_copy(update={"serving": False}) for old in history_after]
    history.rewrite([*history_after, release], releases)
    return outcome.model_copy(update={"release": release.release})


def _release_without(
    store: Location, served: Release, releases: Sequence[Release], erased: Erased, tombstones: Tombstones
) -> Release:
    """Make the release that takes the place of the served one: indexed and measured as in `flows.reprocess`."""
    settings = _settings(store, served)
    bad_shards = [fault.shard for fault in served.data.bad_shards]
    pairs, notes = _pairs(settings.evaluation)
    content = release_content(settings, erased.features.files, bad_shards, pairs)
    number = releases[-1].number + 1
    name = release_name(number, content)
    indexes = {
        mode: index_mode(store, name, mode, erased.features, settings.index, _untrained(store, served, old))
        for mode, old in served.indexes.items()
    }
    chosen = settings.evaluation if pairs else settings.evaluation.model_copy(update={"pairs": None})
    evaluation = evaluate(store.uri, name, erased.features, served.models, chosen, settings.index)
    evaluation = evaluation.model_copy(update={"notes": [*evaluation.notes, *notes]})
    measured = gated(evaluation, settings.gate)
    release = served.model_copy(
        update={
            "release": name,
            "number": number,
            "created": datetime.now(UTC),
            "content": content,
            "features_version": erased.features.version,
            "quarantine_version": erased.quarantine.version if erased.quarantine.version >= 0 else None,
            "indexes": indexes,
            "data": _data(store, served.data, erased),
            "gate": GateDecision(
                promoted=True,
                reason=f"promoted without judgement: {served.release} less {erased.rows} forgotten rows",
                compared_with=served.release,
            ),
            "gated": measured.figures,
            "gated_name": measured.name,
            "report": None,
            "serving": True,
            "tombstones": tombstones.digest,
        }
    )
    return release.model_copy(update={"report": write_report(settings, release, evaluation, releases)})


def _pairs(chosen: EvaluationSettings) -> tuple[str | None, list[str]]:
    """Return the digest of the pairs file; out of reach none, and a note: forgetting must not wait for it."""
    try:
        return (read_pairs(chosen.pairs).digest if chosen.pairs else None), []
    except SettingsError as error:
        return None, [f"without the pairs file: {error}"]


def _untrained(store: Location, served: Release, old: IndexRef) -> Previous | None:
    """Return the served release to carry an index on from, where the index was not trained.

    Centroids and codebooks are made of the vectors they were trained on, in small lists of a single one; so an index
    that was trained with a forgotten person is built anew.
    """
    if old.factory != "Flat":
        return None
    return Previous(served, features_table(store).snapshot(served.features_version))


def _data(store: Location, before: DataQuality, erased: Erased) -> DataQuality:
    reasons = read_table(quarantine_table(store), erased.quarantine.files.values(), ["reason"])["reason"]
    counts = {one["values"]: one["counts"] for one in reasons.combine_chunks().value_counts().to_pylist()}
    return before.model_copy(
        update={
            "rows_features": before.rows_features - erased.rows,
            "quarantined": dict(sorted(counts.items())),
            "forgotten": before.forgotten + erased.rows + erased.quarantined,
        }
    )


def _settings(store: Location, release: Release | None) -> PipelineSettings:
    assert release is not None
    return checked(PipelineSettings, {**release.settings, "store": store.uri})


def _write_log(store: Location, outcome: Forgotten) -> None:
    """Add a line to the log: when, which kind and how many, never whom."""
    place = store / FORGET_LOG
    try:
        lines = place.read_bytes()
    except FileNotFoundError:
        lines = b""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **outcome.model_dump(exclude={"release"})}
    place.write_bytes(lines + json.dumps(line).encode() + b"\n")
