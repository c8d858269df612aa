"""Forget: erase a person or a row from the store, and keep them out while the source still has them.

One new release without the rows is served at once. Older releases that held them can no longer be served, and
`tasks.maintenance.vacuum` removes their files. The source is not needed. What is left of a person afterwards is a
salted hash, and whatever a model learned from them: a model forgets by being trained again. Its checkpoint also keeps
hashes of the name and of the rows, which `vacuum` deletes with the file once no kept release needs it.
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from schemas.errors import BadModelError, SettingsError, StoreBusyError, StoreError, clipped
from schemas.releases import IndexRef, Release
from schemas.reports import DataQuality, GateDecision
from schemas.settings import ColumnNames, EvaluationSettings, PipelineSettings, checked
from schemas.tombstones import Tombstone
from storage.features import features_table, quarantine_table, read_table
from storage.location import Location
from storage.lock import store_lock
from storage.releases import Releases
from storage.tables import Snapshot
from storage.tombstones import NEW_LIST, Tombstones, write_log
from tasks.checkpoints import stored_checkpoint
from tasks.evaluate import evaluate
from tasks.evaluation.pairs import read_pairs
from tasks.evaluation.rows import stored_ids
from tasks.index import Previous, index_mode
from tasks.maintenance.erase import Erased, erase
from tasks.maintenance.erased_releases import holds_forgotten
from tasks.maintenance.forgotten_rows import Matches, find_matches
from tasks.maintenance.targets import Target, checked_targets
from tasks.release import build_release, next_release_name, release_content, write_report

log = logging.getLogger("frontalis.forget")


class Forgotten(BaseModel):
    """The result of forgetting. `release` is the one served from now on; None where nothing had to change.

    With `dry_run` nothing was changed, and the other fields say what would have been.
    """

    kind: Literal["id", "subject", "list"]
    rows: int
    quarantined: int
    shards: int
    release: str | None
    erased_releases: list[str]
    dry_run: bool = False
    in_shards: list[str] = Field(default=[], description="which shards")
    unmatched: int = Field(default=0, description="targets that match no row: future rows are kept out")
    checkpoints: list[str] = Field(default=[], description="that were trained on a target, so its name can be tested")


def forget(
    store: str, *, subject: str | None = None, id_: str | None = None, in_advance: bool = False, wait: float = 0.0
) -> Forgotten:
    """Remove all rows of a subject, or the row of one id, and serve a release without them; see `forget_all`.

    Raises:
        SettingsError: neither or both are given, nothing matches, or there is no store.
    """
    if subject is not None and id_ is None:
        return forget_all(store, [Target("subject", subject)], in_advance=in_advance, wait=wait)
    if id_ is not None and subject is None:
        return forget_all(store, [Target("id", id_)], in_advance=in_advance, wait=wait)
    raise SettingsError("forget: pass either --subject or --id.")


def forget_all(
    store: str,
    targets: Sequence[Target],
    *,
    in_advance: bool = False,
    dry_run: bool = False,
    new_list: bool = False,
    wait: float = 0.0,
) -> Forgotten:
    """Remove the rows of all targets and serve one release without them.

    Every earlier tombstone is applied again as well, so running it once more completes what was interrupted.

    Args:
        store: local path or s3://…
        targets: whom to forget, at least one.
        in_advance: accept targets that match no row, to keep their future rows out.
        dry_run: return what would be removed, and change nothing.
        new_list: start a new list of tombstones, where the old one is lost and there is no backup.
        wait: seconds to wait for a run that holds the store.

    Raises:
        SettingsError: there is no store, an id is not of its type, or a target matches no row.
        TombstonesLostError: the list of tombstones has lost entries.
        StoreBusyError: another run holds the store or committed meanwhile.
        StoreError: a file of the served release is damaged.
    """
    history = Releases.of(Location(store))
    place = history.store
    with contextlib.nullcontext() if dry_run else store_lock(place, "forget", wait):
        releases = history.all()
        tombstones = Tombstones(place, load=False) if new_list else Tombstones.proven(place, releases)
        targets = checked_targets(place, targets)
        new = [(target, tombstones.tombstone(target.tombstone, target.value)) for target in targets]
        every = tombstones.only([*tombstones.entries, *(one for _, one in new)])
        matches = find_matches(place, releases, every)
        missing = [target for target, one in new if one.mark not in matches.found and one.mark not in tombstones.marks]
        if missing and not (in_advance or new_list):
            raise _nothing_matched(place, releases, tombstones, targets, missing)
        holding = [old.release for old in releases if not old.unusable and holds_forgotten(place, old, every)]
        outcome = Forgotten(
            kind=targets[0].kind if len(targets) == 1 else "list",
            rows=matches.rows,
            quarantined=matches.quarantined,
            shards=len(matches.shards),
            release=None,
            erased_releases=holding,
            dry_run=dry_run,
            in_shards=sorted(matches.shards),
            unmatched=len(missing),
            checkpoints=_checkpoints(place, releases, new, matches),
        )
        if dry_run:
            return outcome
        if not new_list and Tombstones(place).entries != tombstones.entries:  # object storage has no lock
            raise _busy(place)
        found = matches.found
        tombstones.add(one.replaced(rows=found[one.mark].rows if one.mark in found else 0) for _, one in new)
        return _erase_and_serve(history, outcome, tombstones, NEW_LIST if new_list else "forget")


def _busy(store: Location) -> StoreBusyError:
    return StoreBusyError(f"{store.uri}: another run forgot somebody at the same time; run this again.")


def list_tombstones(store: str) -> list[Tombstone]:
    """Return the tombstones in force, oldest first.

    Raises:
        SettingsError: there is no store.
        TombstonesLostError: the list of tombstones has lost entries.
    """
    history = Releases.of(Location(store))
    return Tombstones.proven(history.store, history.all()).active


def undo(store: str, mark: str, *, wait: float = 0.0) -> Tombstone:
    """Lift a tombstone: from the next run on, rows that it kept out come back if the source still has them.

    Releases that were erased stay so. Which tombstone was lifted stays in the list, and the log says when.

    Args:
        store: local path or s3://…
        mark: its hash, or the first 8 characters or more.
        wait: seconds to wait for a run that holds the store.

    Raises:
        SettingsError: there is no store, or not exactly one tombstone of this hash.
        TombstonesLostError: the list of tombstones has lost entries.
        StoreBusyError: another run holds the store.
    """
    history = Releases.of(Location(store))
    with store_lock(history.store, "forget", wait):
        tombstones = Tombstones.proven(history.store, history.all())
        found = [one for one in tombstones.active if len(mark) >= 8 and one.mark.startswith(mark.lower())]
        if len(found) != 1:
            raise SettingsError(
                f"forget --undo {clipped(mark)}: {len(found)} tombstones have this hash; give one of `frontalis forget "
                "--list`, or its first 8 characters or more."
            )
        tombstones.undo(found[0].mark)
        write_log(history.store, tombstones, "undo", kind=found[0].kind, rows=0)
        return found[0]


def _nothing_matched(
    store: Location,
    releases: Sequence[Release],
    tombstones: Tombstones,
    targets: Sequence[Target],
    missing: Sequence[Target],
) -> SettingsError:
    """Return the refusal of targets that match nothing; it says where ignoring case would find some."""
    folded = [tombstones.tombstone("subject_ignore_case", one.value) for one in missing if one.kind == "subject"]
    rows = sum(one.rows for one in find_matches(store, releases, tombstones.only(folded)).found.values())
    hint = f"--ignore-case would match {rows:,} rows; " if rows else ""
    if len(targets) == 1:
        what = f"{missing[0].where}: no row matches"
    else:
        lines = ", ".join(one.where.rpartition(" ")[2] for one in missing[:20])
        what = f"{missing[0].where.rpartition(',')[0]}: {len(missing)} of {len(targets)} match no row (lines {lines})"
    return SettingsError(
        f"{what}, so NOBODY was forgotten and nothing was changed; check the spelling ({hint}`--dry-run` shows what "
        "matches), or pass --in-advance to keep future rows out."
    )


def _checkpoints(
    store: Location, releases: Sequence[Release], new: Sequence[tuple[Target, Tombstone]], matches: Matches
) -> list[str]:
    """Return the models in the store that record a subject among those they were trained or selected on."""
    names = {target.value for target, _ in new if target.kind == "subject"}
    for target, one in new:
        if target.kind == "subject" and one.mark in matches.found:
            names |= matches.found[one.mark].values
    kept = [old for old in releases if not old.vacuumed or old.anchor]
    models = {model.path: model for old in kept for model in old.models.values()}
    found = []
    for path, model in sorted(models.items()):
        with contextlib.suppress(StoreError, BadModelError):
            if names and stored_checkpoint(store, model).has_seen(sorted(names)).any():
                found.append(path)
    return found


def _erase_and_serve(history: Releases, outcome: Forgotten, tombstones: Tombstones, action: str) -> Forgotten:
    store, releases = history.store, history.all()
    served = next((release for release in releases if release.serving), None)
    columns = _settings(store, served or releases[-1]).columns if releases else ColumnNames()
    erased = erase(store, served, tombstones, columns)
    usable = [old for old in releases if not old.unusable]
    holding = [old.release for old in usable if holds_forgotten(store, old, tombstones)]
    outcome = outcome.model_copy(
        update={
            "rows": erased.rows,
            "quarantined": erased.quarantined,
            "shards": erased.shards,
            "erased_releases": holding,
        }
    )
    if Tombstones(store).has_lost(tombstones):  # object storage has no lock: two may overwrite each other
        raise _busy(store)
    counts = outcome.model_dump(include={"kind", "rows", "quarantined", "shards", "erased_releases"})
    write_log(store, tombstones, action, **counts)
    after = [
        old
        if old.unusable
        else old.as_erased()
        if old.release in holding
        else old.as_matched_with(tombstones.digest, len(tombstones.entries))
        for old in releases
    ]
    if served is not None and served.release in holding:
        if any(file.rows for file in erased.features.files.values()):
            release = _release_without(store, served, releases, erased, tombstones)
            outcome.release = release.release
            after.append(release)
        else:
            log.warning("no row is left: nothing is served until the next `frontalis reprocess`")
    if after != releases:
        history.rewrite(after, releases)
    return outcome


def _release_without(
    store: Location, served: Release, releases: Sequence[Release], erased: Erased, tombstones: Tombstones
) -> Release:
    """Return the release that replaces the served one: indexed and measured as in `flows.reprocess`."""
    settings = _settings(store, served)
    pairs, notes = _pairs(settings.evaluation, store, erased.features)
    content = release_content(settings, erased.features.files, served.data.bad_shards, pairs)
    name = next_release_name(releases, content)
    indexes = {
        mode: index_mode(store, name, mode, erased.features, settings.index, _untrained(store, served, old))
        for mode, old in served.indexes.items()
    }
    measured = checked(EvaluationSettings, {**dict(settings.evaluation), **({} if pairs else {"pairs": None})})
    evaluation = evaluate(
        store, name, erased.features, served.models, measured, settings.index, expand=settings.query.expand
    )
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
        tombstones=tombstones,
        source_version=served.source_version,
    )
    write_report(store, release, evaluation, releases)
    return release.as_served()


def _pairs(chosen: EvaluationSettings, store: Location, features: Snapshot) -> tuple[str | None, list[str]]:
    """Return the digest of the pairs file; or none and a note: forgetting does not wait for it."""
    if not chosen.pairs:
        return None, []
    try:
        return read_pairs(chosen.pairs).as_stored(stored_ids(store, features)).digest, []
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
