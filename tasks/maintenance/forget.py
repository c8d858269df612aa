"""Forget: erase a person or a row from the store, and keep them out while the source still has them.

One new release without the rows is served at once. Older releases that held them can no longer be served, and
`tasks.maintenance.vacuum` removes their files. The source is not needed. What is left of a person afterwards is a
salted hash, and whatever a model learned from them: a model forgets by being trained again.
"""

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from pydantic import BaseModel

from schemas.errors import SettingsError, StoreBusyError
from schemas.releases import IndexRef, Release
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
from tasks.index import Previous, index_mode
from tasks.maintenance.erase import Erased, erase
from tasks.maintenance.erased_releases import holds_forgotten
from tasks.release import build_release, next_release_name, release_content, write_report

log = logging.getLogger("frontalis.forget")


class Target(NamedTuple):
    """Whom to forget: all rows of a subject, or the one row of an id (an integer id as its digits)."""

    kind: Literal["id", "subject"]
    value: str


class Forgotten(BaseModel):
    """The result of forgetting. `release` is the one served from now on; None where nothing had to change."""

    kind: Literal["id", "subject", "list"]
    rows: int
    quarantined: int
    shards: int
    release: str | None
    erased_releases: list[str]


def forget(store: str, *, subject: str | None = None, id_: str | None = None, wait: float = 0.0) -> Forgotten:
    """Remove all rows of a subject, or the row of one id, and serve a release without them; see `forget_all`.

    Raises:
        SettingsError: neither or both are given, or there is no store.
    """
    if subject is not None and id_ is None:
        return forget_all(store, [Target("subject", subject)], wait=wait)
    if id_ is not None and subject is None:
        return forget_all(store, [Target("id", id_)], wait=wait)
    raise SettingsError("forget: pass either --subject or --id.")


def read_targets(file: str) -> list[Target]:
    """Read whom to forget from JSON lines, each `{"subject": "NAME"}` or `{"id": "ID"}`. Blank lines are skipped.

    Raises:
        SettingsError: there is no such file, or a line has another form. The message names the line, never a person.
    """
    try:
        lines = Location(file).read_bytes().decode().splitlines()
    except FileNotFoundError as error:
        raise SettingsError(f"{file}: there is no such file.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: is no UTF-8.") from error
    targets = [_target(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not targets:
        raise SettingsError(f'{file}: lists nobody; write lines such as {{"subject": "NAME"}}.')
    return targets


def _target(file: str, number: int, line: str) -> Target:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if isinstance(found, dict) and len(found) == 1:
        for kind in ("subject", "id"):
            value = found.get(kind)
            if value and (isinstance(value, str) or (kind == "id" and type(value) is int)):
                return Target("subject" if kind == "subject" else "id", str(value))
    raise SettingsError(f'{file}, line {number}: write {{"subject": "NAME"}} or {{"id": "ID"}}.')


def forget_all(store: str, targets: Sequence[Target], *, wait: float = 0.0) -> Forgotten:
    """Remove the rows of all targets and serve one release without them.

    Every earlier tombstone is applied again as well, so running it once more completes what was interrupted.
    Forgetting somebody who has no row keeps future rows out.

    Args:
        store: local path or s3://…
        targets: whom to forget, at least one.
        wait: seconds to wait for a run that holds the store.

    Raises:
        SettingsError: there is no store.
        StoreBusyError: another run holds the store or committed meanwhile.
        StoreError: a file of the served release is damaged.
    """
    history = Releases.of(Location(store))
    place = history.store
    with store_lock(place, "forget", wait):
        before, tombstones = Tombstones(place), Tombstones(place)
        marks = [tombstones.mark(target.kind, target.value) for target in targets]
        tombstones.add(marks)
        outcome = _erase_and_serve(history, targets[0].kind if len(targets) == 1 else "list", tombstones, before)
        if not set(marks) <= set(Tombstones(place).marks):  # object storage has no lock: two may overwrite each other
            raise StoreBusyError(f"{place.uri}: another run forgot somebody at the same time; run this again.")
        return outcome


def _erase_and_serve(
    history: Releases, kind: Literal["id", "subject", "list"], tombstones: Tombstones, before: Tombstones
) -> Forgotten:
    store, releases = history.store, history.all()
    served = next((release for release in releases if release.serving), None)
    columns = _settings(store, served or releases[-1]).columns if releases else ColumnNames()
    erased = erase(store, served, tombstones, before, columns)
    usable = [old for old in releases if not old.unusable]
    holding = [old.release for old in usable if holds_forgotten(store, old, tombstones)]
    outcome = Forgotten(
        kind=kind,
        rows=erased.rows,
        quarantined=erased.quarantined,
        shards=erased.shards,
        release=None,
        erased_releases=holding,
    )
    _write_log(store, outcome)
    if not holding:
        return outcome
    after = [old.as_erased() if old.release in holding else old.as_checked_with(tombstones.digest) for old in releases]
    if served is not None and served.release in holding:
        if any(file.rows for file in erased.features.files.values()):
            release = _release_without(store, served, releases, erased, tombstones)
            outcome.release = release.release
            after.append(release)
        else:
            log.warning("no row is left: nothing is served until the next `frontalis reprocess`")
    history.rewrite(after, releases)
    return outcome


def _release_without(
    store: Location, served: Release, releases: Sequence[Release], erased: Erased, tombstones: Tombstones
) -> Release:
    """Return the release that replaces the served one: indexed and measured as in `flows.reprocess`."""
    settings = _settings(store, served)
    pairs, notes = _pairs(settings.evaluation)
    content = release_content(settings, erased.features.files, served.data.bad_shards, pairs)
    name = next_release_name(releases, content)
    indexes = {
        mode: index_mode(store, name, mode, erased.features, settings.index, _untrained(store, served, old))
        for mode, old in served.indexes.items()
    }
    measured = checked(EvaluationSettings, {**dict(settings.evaluation), **({} if pairs else {"pairs": None})})
    evaluation = evaluate(store, name, erased.features, served.models, measured, settings.index)
    evaluation = evaluation.replaced(notes=[*evaluation.notes, *notes])
    release = build_release(
        settings,
        releases,
        content=content,
        features=erased.features,
        quarantine=erased.quarantine,
        models=served.models,
        indexes=indexes,
        data=_data(store, served.data, erased),
        evaluation=evaluation,
        gate=GateDecision(
            promoted=True,
            reason=f"without a comparison: {served.release} without {erased.rows} forgotten rows",
            compared_with=served.release,
        ),
        tombstones=tombstones.digest,
        source_version=served.source_version,
    )
    write_report(store, release, evaluation, releases)
    return release.as_served()


def _pairs(chosen: EvaluationSettings) -> tuple[str | None, list[str]]:
    """Return the digest of the pairs file; out of reach none, and a note: forgetting must not wait for it."""
    try:
        return (read_pairs(chosen.pairs).digest if chosen.pairs else None), []
    except SettingsError as error:
        return None, [f"without the pairs file: {error}"]


def _untrained(store: Location, served: Release, old: IndexRef) -> Previous | None:
    """Return the served release to update an index from, where the index was not trained.

    Centroids and codebooks are computed from training vectors, in a small list from a single one. So an index
    that was trained with a forgotten person is built again.
    """
    if old.factory != "Flat":
        return None
    return Previous(served, features_table(store).snapshot(served.features_version))


def _data(store: Location, before: DataQuality, erased: Erased) -> DataQuality:
    reasons = read_table(quarantine_table(store), erased.quarantine.files.values(), ["reason"])["reason"]
    counts = {one["values"]: one["counts"] for one in reasons.combine_chunks().value_counts().to_pylist()}
    return before.replaced(
        rows_features=before.rows_features - erased.rows,
        quarantined=dict(sorted(counts.items())),
        forgotten=before.forgotten + erased.rows + erased.quarantined,
    )


def _settings(store: Location, release: Release) -> PipelineSettings:
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
