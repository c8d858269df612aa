"""Forgetting that ended right after its tombstone: the next run detects it, and the person is not served."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from schemas.errors import SettingsError
from storage.location import Location
from storage.releases import Releases
from storage.tombstones import Tombstones
from storage.vectors.store import open_ids
from tasks.maintenance.forget import forget
from tasks.maintenance.rollback import roll_back
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check
from tasks.outcome import CompletedWithBadShardsError
from tasks.query import answer

KEEP = {"keep": ["note"]}


def killed_after_its_tombstone(store: Path, subject: str) -> None:
    tombstones = Tombstones(Location(str(store)))
    tombstones.add([tombstones.tombstone("subject", subject)])


def history(store: Path) -> Releases:
    return Releases(Location(str(store)))


def test_the_next_run_makes_the_older_release_unfit(published, run_pipeline, person) -> None:
    store = published()
    first = history(store).serving().release
    killed_after_its_tombstone(store, person.subject)
    first = run_pipeline(person.source, store, columns=KEEP)
    assert (first.status, history(store).serving().release) == ("promoted", first.release)
    assert [release.erased for release in history(store).all()] == [True, False]
    with pytest.raises(SettingsError, match="forgotten"):
        roll_back(str(store), first)
    with pytest.raises(SettingsError, match="forgotten"):
        answer(str(store), "raw", ids=[person.photograph], release=first)
    assert clean(str(store), keep=100).kept_releases == [first.release]
    assert check(str(store)).problems == []
    assert not [file for file in store.rglob("*") if file.is_file() and person.photograph.encode() in file.read_bytes()]


def test_a_rejected_release_leaves_the_old_one_until_forgetting_is_done(
    published, run_pipeline, person, tiny_models, make_checkpoint, tmp_path, caplog
) -> None:
    store = published()
    killed_after_its_tombstone(store, person.subject)
    ruined = make_checkpoint(tmp_path / "ruined.safetensors", strength=1.0)
    models = {**tiny_models.by_mode, "per_sample": str(ruined)}
    worse = {"evaluation": {"resamples": 100}, "gate": {"cell": "all"}}
    first = run_pipeline(person.source, store, columns=KEEP, models=models, **worse)
    assert first.status == "rejected"
    assert "`frontalis forget` was interrupted; run it once more" in caplog.text
    done = forget(str(store), subject=person.subject)
    assert history(store).serving().release == done.release
    assert clean(str(store), keep=100).removed_releases == [history(store).all()[0].release]
    assert check(str(store)).problems == []


def test_a_rollback_looks_before_any_run_has(published, run_pipeline, person, tmp_path) -> None:
    store = published()
    others = source_of_others(person, tmp_path / "others")
    without = run_pipeline(others, store, columns=KEEP).release
    killed_after_its_tombstone(store, person.subject)
    first = history(store).all()[0].release
    with pytest.raises(SettingsError, match=f"{first} holds a person who was forgotten"):
        roll_back(str(store), first)
    assert roll_back(str(store), without).serving
    assert clean(str(store), keep=100).kept_releases == [without]


def test_a_run_without_change_checks_once(published, run_pipeline, person, tmp_path) -> None:
    store = published()
    others = source_of_others(person, tmp_path / "others")
    run_pipeline(others, store, columns=KEEP)
    killed_after_its_tombstone(store, person.subject)
    assert run_pipeline(others, store, columns=KEEP).status == "unchanged"
    assert [release.erased for release in history(store).all()] == [True, False]
    version = history(store).table.snapshot().version
    assert run_pipeline(others, store, columns=KEEP).status == "unchanged"
    assert history(store).table.snapshot().version == version


def test_a_bad_shard_brings_nobody_back(published, run_pipeline, person, tmp_path) -> None:
    """Its last good features were matched with an older list: without the person, or not at all."""
    store, source = published(), tmp_path / "source"
    shutil.copytree(person.source, source)
    killed_after_its_tombstone(store, person.subject)
    holding = next(
        file for file in sorted(source.glob("*.parquet")) if person.subject in set(pl.read_parquet(file)["subject"])
    )
    for number in range(2):
        holding.write_bytes(f"not Parquet {number}".encode())
        with pytest.raises(CompletedWithBadShardsError) as raised:
            run_pipeline(source, store, columns=KEEP)
        outcome = raised.value.outcome
        [fault] = outcome.data.bad_shards
        assert not fault.kept
        assert number or "hold rows of somebody who was forgotten, so they are left out" in fault.reason
        release = next(one for one in history(store).all() if one.release == outcome.release)
        ids = open_ids(Location(str(store)), release.indexes["raw"])
        assert person.subject not in set(ids["subject"].to_pylist())
    assert check(str(store)).problems == []


def test_forgetting_once_more_keeps_a_bad_shard(published, run_pipeline, person, tmp_path) -> None:
    store, source = published(), tmp_path / "source"
    shutil.copytree(person.source, source)
    killed_after_its_tombstone(store, person.subject)
    forget(str(store), subject=person.subject)
    served = history(store).serving()
    for file in source.glob("*.parquet"):
        if person.subject in set(pl.read_parquet(file)["subject"]):
            file.write_bytes(b"not Parquet")
    with pytest.raises(CompletedWithBadShardsError) as raised:
        run_pipeline(source, store, columns=KEEP)
    outcome = raised.value.outcome
    assert [fault.kept for fault in outcome.data.bad_shards] == [True, True]
    assert outcome.data.rows_features == served.data.rows_features
    assert check(str(store)).problems == []


def test_forgetting_while_a_shard_is_bad_keeps_the_rest_of_it(published, run_pipeline, person, tmp_path) -> None:
    store, source = published(), tmp_path / "source"
    shutil.copytree(person.source, source)
    holding = [file for file in source.glob("*.parquet") if person.subject in set(pl.read_parquet(file)["subject"])]
    for file in holding:
        file.write_bytes(b"not Parquet")
    with pytest.raises(CompletedWithBadShardsError):
        run_pipeline(source, store, columns=KEEP)
    before = history(store).serving().data.rows_features
    forget(str(store), subject=person.subject)
    with pytest.raises(CompletedWithBadShardsError) as raised:
        run_pipeline(source, store, columns=KEEP)
    assert [fault.kept for fault in raised.value.outcome.data.bad_shards] == [True] * len(holding)
    served = history(store).serving()
    assert served.data.rows_features == before - person.rows
    assert person.subject not in open_ids(Location(str(store)), served.indexes["raw"])["subject"].to_pylist()
    assert check(str(store)).problems == []


def source_of_others(person, folder: Path) -> Path:
    """The person's source without the person."""
    shutil.copytree(person.source, folder)
    for file in folder.glob("*.parquet"):
        rows = pl.read_parquet(file)
        rows.filter(pl.col("subject") != person.subject).write_parquet(file)
    return folder
