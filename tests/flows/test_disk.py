"""Disks that are full, read-only, damaged or gone, a clock set back: an error, the old release served, a rerun repairs.

Mounts need root; where they are not allowed their tests skip.
"""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from schemas.errors import FrontalisError, SettingsError, StoreError
from storage.features import features_table
from storage.location import Location
from storage.releases import Releases
from tasks.maintenance.forget import forget
from tasks.maintenance.rollback import roll_back
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check
from tasks.outcome import CompletedWithBadShardsError
from tasks.query import answer
from tests.commands import frontalis


@pytest.fixture(scope="module")
def one_run(run_pipeline, plain_source, tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("run") / "store"
    assert run_pipeline(plain_source, store).status == "promoted"
    return store


@pytest.fixture
def store(one_run, tmp_path) -> Path:
    shutil.copytree(one_run, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def new_models(make_checkpoint, tmp_path) -> dict[str, str]:
    """Other models, so that a run has everything to compute."""
    return {mode: str(make_checkpoint(tmp_path / f"{mode}.safetensors", mode, seed=7)) for mode in
            ("per_sample", "batch_stat")}  # fmt: skip


def some_id(store: Path) -> str:
    return str(sorted(pl.scan_delta(str(store / "features")).select("id").collect()["id"])[0])


def assert_old_release_answers(store: Path, wanted: str, id_: str) -> None:
    found = answer(str(store), "per_sample", ids=[id_], k=3)
    assert found.release == wanted
    assert len(found.results[0].neighbours) == 3


def served(store: Path) -> str:
    return Releases(Location(str(store))).serving().release


def files(store: Path) -> dict[str, bytes]:
    snapshot = features_table(Location(str(store))).snapshot()
    return {path: (store / "features" / path).read_bytes() for path in snapshot.files}


@contextlib.contextmanager
def mounted(*words: str, at: Path) -> Iterator[None]:
    done = subprocess.run(["mount", *words, str(at)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.mark.parametrize("free_kb", [8, 120, 220])
def test_a_full_disk(one_run, run_pipeline, plain_source, new_models, tmp_path, free_kb) -> None:
    """The disk fills at different moments: with the models, the features, or the indexes and the report."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", at=disk):
        shutil.copytree(one_run, disk / "store")
        before, id_ = served(disk / "store"), some_id(disk / "store")
        status = os.statvfs(disk)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        subprocess.run(["mount", "-o", f"remount,size={used // 1024 + free_kb}k", str(disk)], check=True)
        with pytest.raises(StoreError, match=r"No space left|os error 28"):
            run_pipeline(plain_source, disk / "store", models=new_models)
        assert_old_release_answers(disk / "store", before, id_)
        assert [path.name for path in disk.rglob(".tmp-*")] == [], "what could not be written whole is not left"
        assert check(str(disk / "store")).problems == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run_pipeline(plain_source, disk / "store", models=new_models).status == "promoted"
        clean(str(disk / "store"), keep=1)
        assert (check(str(disk / "store")).problems, check(str(disk / "store")).leftovers) == ([], [])


def test_a_full_disk_on_the_command_line(one_run, plain_source, new_models, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", at=disk):
        shutil.copytree(one_run, disk / "store")
        status = os.statvfs(disk)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        subprocess.run(["mount", "-o", f"remount,size={used // 1024 + 60}k", str(disk)], check=True)
        models = [f"--model={mode}={file}" for mode, file in new_models.items()]
        done = frontalis("reprocess", "--source", plain_source, "--store", disk / "store", *models)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "No space left" in done.stderr.splitlines()[-1]


def test_a_read_only_store_answers_and_refuses_all_else(store, run_pipeline, plain_source, new_models, person) -> None:
    before, id_ = served(store), some_id(store)
    with mounted("--bind", str(store), at=store):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(store)], check=True)
        assert_old_release_answers(store, before, id_)
        assert check(str(store)).problems == []
        for change in (
            lambda: run_pipeline(plain_source, store, models=new_models),
            lambda: forget(str(store), id_=id_),
            lambda: clean(str(store)),
            lambda: roll_back(str(store), before),
        ):
            with pytest.raises(StoreError, match="Read-only file system"):
                change()
    assert served(store) == before


def test_a_source_that_is_gone(store, run_pipeline, plain_source, tmp_path) -> None:
    before, id_ = served(store), some_id(store)
    with pytest.raises(SettingsError, match="does not exist"):
        run_pipeline(tmp_path / "unmounted", store)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"holds no \.parquet file"):
        run_pipeline(tmp_path / "empty", store)
    assert_old_release_answers(store, before, id_)
    assert run_pipeline(plain_source, store).status == "unchanged"


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_under_its_final_name_is_not_reused(
    store, run_pipeline, plain_source, new_models, tmp_path, damage
) -> None:
    """As a disk may leave it that lied about fsync: the run that wanted it finds it there, not live yet."""
    run_pipeline(plain_source, tmp_path / "undisturbed", models=new_models)
    wanted = files(tmp_path / "undisturbed")
    path = sorted(set(wanted) - set(files(store)))[0]
    content = bytearray(wanted[path])
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    (store / "features" / path).parent.mkdir(parents=True, exist_ok=True)
    (store / "features" / path).write_bytes(content)
    assert run_pipeline(plain_source, store, models=new_models).status == "promoted"
    assert files(store) == wanted


@pytest.mark.parametrize("seed", [0, 1])
def test_flipped_bits_in_feature_files_are_never_indexed(store, run_pipeline, plain_source, seed) -> None:
    """A bit in the pages, in a page header and in the footer of each mode; a run that reads them repairs them."""
    good = files(store)
    chance = random.Random(seed)
    for mode in ("raw", "per_sample", "batch_stat"):
        names = [name for name in sorted(good) if name.startswith(f"mode={mode}/")]
        for name, region in zip(names, ("pages", "header", "footer"), strict=True):
            content = bytearray(good[name])
            column = pq.read_metadata(store / "features" / name).row_group(0).column(0)
            footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
            first = {"pages": 4, "header": column.data_page_offset, "footer": footer}[region]
            last = {"pages": footer, "header": column.data_page_offset + 20, "footer": len(content)}[region]
            content[chance.randrange(first, last)] ^= 1 << chance.randrange(8)
            (store / "features" / name).write_bytes(content)
    assert len(check(str(store)).problems) == 9
    shutil.rmtree(store / "indexes")
    assert run_pipeline(plain_source, store).status == "promoted"
    assert files(store) == good
    clean(str(store), keep=1)
    assert check(str(store)).problems == []


def test_readers_leave_a_damaged_file_where_it_is(store) -> None:
    """It may be the only copy of what is served; a reader holds no lock."""
    id_ = some_id(store)
    before = {}
    for file in store.glob("features/mode=per_sample/*/*.parquet"):
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
        before[file] = bytes(content)
    with pytest.raises(StoreError, match=r"is damaged .* run `frontalis reprocess` to compute it again"):
        answer(str(store), "per_sample", ids=[id_], k=3)
    assert {file: file.read_bytes() for file in before} == before


def test_lost_files_of_the_served_release_are_noted_and_do_not_stop_the_runs(
    run_pipeline, tiny_source, new_models, tmp_path
) -> None:
    """With nothing left to compare with, the new release waits for an operator; the message says what to set."""
    source, store = tmp_path / "source", tmp_path / "store"
    shutil.copytree(tiny_source, source)
    first = run_pipeline(source, store)
    changed = source / "part-001.parquet"
    for file in store.glob("features/mode=per_sample/shard=part-001/*.parquet"):
        file.unlink()
    pq.write_table(pq.read_table(changed).slice(1), changed)
    rejected = run_pipeline(source, store, models=new_models)
    assert rejected.status == "rejected"
    [note] = [note for note in rejected.evaluation.notes if note.startswith("not compared with the served release: ")]
    assert "is missing" in note
    assert f"cannot be compared with {first.release}" in rejected.reason
    assert "; fix the labels or the model, or set [gate] unmeasured = 'promote'" in rejected.reason
    anyway = {"gate": {"tolerance": 1.0, "unmeasured": "promote"}}
    second = run_pipeline(source, store, models=new_models, **anyway)
    assert second.status == "promoted"
    for model in Releases(Location(str(store))).serving().models.values():
        (store / model.path).unlink()
    third = run_pipeline(source, store, **anyway)
    assert third.status == "promoted"
    [note] = [note for note in third.evaluation.notes if note.startswith("not compared with the served release: ")]
    assert "the model is missing" in note


def test_a_bad_shard_whose_last_good_files_are_lost_is_left_out(store, run_pipeline, plain_source, tmp_path) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain_source, source)
    (source / "part-002.parquet").write_bytes(b"no Parquet")
    for file in store.glob("features/mode=raw/shard=part-002/*.parquet"):
        file.unlink()
    pq.write_table(pq.read_table(source / "part-001.parquet").slice(1), source / "part-001.parquet")
    with pytest.raises(CompletedWithBadShardsError) as raised:
        run_pipeline(source, store)
    assert [(fault.shard, fault.kept) for fault in raised.value.outcome.data.bad_shards] == [("part-002", False)]
    assert raised.value.outcome.status == "promoted"
    assert {path.split("/")[1] for path in files(store)} == {"shard=part-000", "shard=part-001"}


def test_every_file_of_a_store_is_for_its_owner_only(one_run) -> None:
    shared = [path for path in [one_run, *one_run.rglob("*")] if path.stat().st_mode & 0o077]
    assert shared == []
    assert list(one_run.glob("features/_delta_log/*.json"))


def last_commit(store: Path, table: str = "features") -> Path:
    return sorted((store / table / "_delta_log").glob("*.json"))[-1]


DAMAGE = {
    "lost": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}
"""What a power cut may leave of a commit that was not on the disk yet."""


@pytest.mark.parametrize("how", DAMAGE)
def test_the_last_commit_of_the_features_is_damaged(store, run_pipeline, plain_source, how) -> None:
    before, wanted = served(store), files(store)
    DAMAGE[how](last_commit(store))
    problems = check(str(store)).problems
    assert problems
    assert all("frontalis reprocess" in problem.remedy for problem in problems)
    if how != "lost":
        with pytest.raises(StoreError, match=r"0001\.json: is damaged .* run `frontalis reprocess`"):
            features_table(Location(str(store))).snapshot()
    assert run_pipeline(plain_source, store).status == "unchanged"
    assert (served(store), files(store)) == (before, wanted)
    assert check(str(store)).problems == []


def test_the_number_of_a_lost_version_is_not_given_to_other_rows(store, run_pipeline, plain_source, new_models) -> None:
    """The next commit takes the number that the served release names: that release must not show its rows."""
    last_commit(store).unlink()
    old = served(store)
    assert run_pipeline(plain_source, store, models=new_models).status == "promoted"
    assert served(store) != old
    with pytest.raises(SettingsError, match="removed by `frontalis vacuum`"):
        roll_back(str(store), old)
    assert check(str(store)).problems == []


def test_the_last_commit_of_the_releases_is_damaged(store, run_pipeline, plain_source) -> None:
    last_commit(store, "releases").write_bytes(b"")
    with pytest.raises(StoreError, match=r"releases/_delta_log/0+1\.json: is damaged .* run `frontalis reprocess`"):
        answer(str(store), "raw", ids=["any"])
    assert run_pipeline(plain_source, store).status == "promoted"
    assert check(str(store)).problems == []


@pytest.mark.parametrize("table", ["features", "quarantine", "releases"])
def test_a_delta_table_of_another_program_is_refused(tmp_path, run_pipeline, plain_source, table) -> None:
    write_deltalake(tmp_path / table, pa.table({"a": [1, 2]}))
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(SettingsError, match=f"{table}: is a Delta table of another program"):
        run_pipeline(plain_source, tmp_path)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("name", ["index.faiss", "ids.parquet"])
def test_a_flipped_bit_in_an_index_is_never_served(store, run_pipeline, plain_source, name) -> None:
    id_ = some_id(store)
    file = next(store.glob(f"indexes/*/per_sample/{name}"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="digest"):
        answer(str(store), "per_sample", ids=[id_])
    answer(str(store), "raw", ids=[id_])
    file.unlink()
    assert run_pipeline(plain_source, store).status == "promoted"
    assert_old_release_answers(store, served(store), id_)


def test_a_clock_set_back(store, run_pipeline, plain_source, new_models, monkeypatch) -> None:
    """Releases are ordered by number, versions by Delta: the clock is recorded and decides nothing."""

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(days=400)

    first = Releases(Location(str(store))).serving()
    monkeypatch.setattr("tasks.release.datetime", Yesterday)
    monkeypatch.setattr("storage.tables.time.time", lambda: 1e9)
    assert run_pipeline(plain_source, store, models=new_models).status == "promoted"
    now = Releases(Location(str(store))).serving()
    assert now.created < first.created
    assert now.number == 2
    monkeypatch.undo()
    assert run_pipeline(plain_source, store, models=new_models).status == "unchanged"
    done = clean(str(store), keep=1)
    assert done.kept_releases == [now.release]
    assert check(str(store)).problems == []
    assert datetime.now(UTC) > now.created


def test_refusals_are_one_family(store) -> None:
    (store / "releases").rename(store / "elsewhere")
    (store / "releases").write_text("in the way")
    with pytest.raises(FrontalisError):
        Releases(Location(str(store))).serving()
