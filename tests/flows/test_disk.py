"""Disks that are full, read-only, damaged or gone, and a clock set back: a clear word, the old release, a rerun mends.

Mounts need root; where they are not allowed their tests skip.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from flows.forget import forget
from flows.rollback import roll_back
from flows.vacuum import clean
from flows.verify import check
from schemas.errors import FrontalisError, SettingsError, StoreError
from storage.features import features_table
from storage.location import Location
from storage.releases import Releases
from tasks.query import answer


@pytest.fixture(scope="module")
def one_night(run_pipeline, plain_source, tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("night") / "store"
    assert run_pipeline(plain_source, store).status == "promoted"
    return store


@pytest.fixture
def store(one_night, tmp_path) -> Path:
    shutil.copytree(one_night, tmp_path / "store")
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


@pytest.mark.parametrize("free_kb", [8, 120, 400])
def test_a_full_disk(one_night, run_pipeline, plain_source, new_models, tmp_path, free_kb) -> None:
    """The disk fills at different moments: with the models, the features, or the indexes and the report."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", at=disk):
        shutil.copytree(one_night, disk / "store")
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


def test_a_full_disk_on_the_command_line(one_night, plain_source, new_models, prefect_server, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=64m", "tmpfs", at=disk):
        shutil.copytree(one_night, disk / "store")
        status = os.statvfs(disk)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        subprocess.run(["mount", "-o", f"remount,size={used // 1024 + 60}k", str(disk)], check=True)
        models = [f"--model={mode}={file}" for mode, file in new_models.items()]
        words = ["reprocess", "--source", str(plain_source), "--store", str(disk / "store"), *models]
        done = subprocess.run([sys.executable, "-m", "frontalis", *words], env=prefect_server.env, capture_output=True,
                              text=True, check=False)  # fmt: skip
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


@pytest.mark.parametrize("at", [0.3, 0.999])
def test_a_flipped_bit_in_a_feature_file_is_never_indexed(store, run_pipeline, plain_source, new_models, at) -> None:
    """A live file is damaged, and a run reads it again to build an index; once removed, it is computed again."""
    good = files(store)
    path = next(name for name in sorted(good) if name.startswith("mode=raw/"))
    content = bytearray(good[path])
    content[int(len(content) * at)] ^= 2
    (store / "features" / path).write_bytes(content)
    shutil.rmtree(store / "indexes")
    with contextlib.suppress(StoreError):  # a flip in bytes that nobody reads, such as a name in the footer, may pass
        run_pipeline(plain_source, store)
    run_pipeline(plain_source, store)
    for problem in check(str(store)).problems:  # and what no run reads is found by verify
        if "cannot be read" in problem.what:
            (store / problem.thing).unlink()
    run_pipeline(plain_source, store)
    assert files(store)[path] == good[path]
    clean(str(store), keep=1)
    assert check(str(store)).problems == []


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
    """Releases are ordered by number, versions by Delta: what the clock says is told and decides nothing."""

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(days=400)

    first = Releases(Location(str(store))).serving()
    monkeypatch.setattr("flows.reprocess.datetime", Yesterday)
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
