"""Vacuum: what no kept release needs goes, and nothing else does."""

import os
import shutil
import time
from pathlib import Path

import polars as pl
import pytest

from schemas.errors import SettingsError, StoreBusyError, StoreError
from storage.location import Location
from storage.lock import store_lock
from storage.releases import Releases
from tasks.maintenance.forget import forget
from tasks.maintenance.rollback import roll_back
from tasks.maintenance.vacuum import clean, kept_releases
from tasks.maintenance.verify import check
from tasks.query import answer


@pytest.fixture(scope="module")
def four_releases(run_pipeline, plain_source, make_checkpoint, tmp_path_factory) -> Path:
    """Four promoted releases, each with features of its own."""
    folder = tmp_path_factory.mktemp("runs")
    for number in range(4):
        model = make_checkpoint(folder / f"{number}.safetensors", seed=number)
        assert run_pipeline(plain_source, folder / "store", models={"per_sample": str(model)}).status == "promoted"
    return folder / "store"


@pytest.fixture
def store(four_releases, tmp_path) -> Path:
    shutil.copytree(four_releases, tmp_path / "store")
    return tmp_path / "store"


def history(store: Path):
    return Releases(Location(str(store))).all()


def files_of(store: Path) -> dict[str, int]:
    return {str(file.relative_to(store)): file.stat().st_size for file in store.rglob("*") if file.is_file()}


def test_the_last_releases_stay_servable_and_the_others_go(store) -> None:
    names = [release.release for release in history(store)]
    before = files_of(store)
    done = clean(str(store), keep=2)
    after = files_of(store)
    assert done.kept_releases == names[2:]
    assert done.removed_releases == names[:2]
    checked = check(str(store))
    assert (checked.problems, checked.leftovers) == ([], [])
    assert set(before) - set(after) >= set(done.files)
    assert sum(before[name] for name in set(before) - set(after)) >= done.bytes > 0
    for name in names[:2]:
        assert not list(store.glob(f"indexes/{name}/per_sample"))
        assert not list(store.glob(f"reports/{name}/*"))
        with pytest.raises(SettingsError, match="removed by `frontalis vacuum`"):
            roll_back(str(store), name)
    some = pl.scan_delta(str(store / "features")).select("id").head(1).collect()["id"].to_list()
    for name in (names[2], names[3]):
        roll_back(str(store), name)
        assert len(answer(str(store), "per_sample", ids=some).results[0].neighbours) == 10
    assert [release.vacuumed for release in history(store)] == [True, True, False, False]
    assert len(list((store / "models").iterdir())) == 3  # of the releases that stay, and of the anchor


def test_a_dry_run_lists_and_removes_nothing(store) -> None:
    before, releases = files_of(store), history(store)
    listed = clean(str(store), keep=1, dry_run=True)
    assert {name: size for name, size in files_of(store).items() if name != ".lock"} == {
        name: size for name, size in before.items() if name != ".lock"
    }
    assert history(store) == releases
    done = clean(str(store), keep=1)
    assert set(listed.files) <= set(done.files)
    assert {name for name in set(done.files) - set(listed.files) if not name.startswith("releases/")} == set()


def test_what_is_served_stays_whatever_its_age(store) -> None:
    oldest = history(store)[0].release
    roll_back(str(store), oldest)
    done = clean(str(store), keep=1)
    assert done.kept_releases == [oldest, history(store)[-1].release]
    some = answer(str(store), "raw", ids=pl.scan_delta(str(store / "features")).collect()["id"].head(1).to_list())
    assert some.release == oldest
    assert check(str(store)).problems == []


def test_a_second_time_there_is_nothing_to_do(store) -> None:
    clean(str(store), keep=2)
    again = clean(str(store), keep=2)
    assert (again.files, again.removed_releases) == ([], [])


def test_left_overs_of_killed_runs_go_and_other_files_stay(store) -> None:
    clean(str(store))
    shard = next((store / "features").glob("mode=raw/shard=*"))
    litter = [
        shard / f".tmp-{'a' * 16}",
        shard / f"{'0' * 32}-{'1' * 32}.parquet",
        store / f"features/mode=raw/shard=gone/.tmp-{'b' * 16}",
        store / "indexes/r00009-dead/raw/index.faiss",
        store / "manifest/keys/01d-ba515.parquet",
        store / "features/_delta_log/_commit_1234.json.tmp",
        store / f".tmp-{'c' * 16}",
    ]
    for file in litter:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    theirs = [
        store / "README.txt",
        store / "backup/features/mode=raw/x.parquet",
        store / "models/trained.safetensors",
        store / "reports/2025/q1.pdf",
        store / f"reports/{history(store)[0].release}-copy/index.html",
        store / "features/f.csv",
        shard / "mine.parquet",
        store / "notes/.tmp-mywork",
        store / "features/.tmp-mywork",
        store / f"notes/.tmp-{'d' * 16}",
    ]
    for file in theirs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    done = clean(str(store))
    assert sorted(done.files) == sorted(str(file.relative_to(store)) for file in litter)
    assert all(file.exists() for file in theirs)
    assert not (store / "features/mode=raw/shard=gone").exists()
    assert not (store / "indexes/r00009-dead").exists()
    assert check(str(store)).problems == []


def test_young_files_wait_where_there_is_no_lock(store) -> None:
    clean(str(store))
    young, old = store / "models/abc1.safetensors", store / "models/abc2.safetensors"
    for file in (young, old):
        file.write_bytes(b"x")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    done = clean(str(store), grace_hours=1)
    assert (done.files, done.waiting) == (["models/abc2.safetensors"], 1)
    assert young.exists()


def test_a_forgotten_person_is_never_kept(published, person) -> None:
    store = published()
    forgotten = forget(str(store), id_=person.photograph)
    done = clean(str(store), keep=100)
    assert done.kept_releases == [forgotten.release]
    assert any(name.startswith(f"indexes/{forgotten.erased_releases[0]}/") for name in done.files)


def test_nothing_goes_while_a_run_holds_the_store(store) -> None:
    before = files_of(store)
    with store_lock(Location(str(store)), "reprocess"), pytest.raises(StoreBusyError, match="held by another run"):
        clean(str(store), keep=1)
    assert files_of(store).keys() == before.keys()


def test_nothing_goes_when_a_kept_release_cannot_be_read(store) -> None:
    version = history(store)[-2].features_version
    (store / f"features/_delta_log/{version:020d}.json").write_text("{")
    before = files_of(store)
    with pytest.raises(StoreError, match="cannot be read"):
        clean(str(store), keep=2)
    assert files_of(store).keys() == before.keys()
    assert not any(release.vacuumed for release in history(store))


def test_kept_are_the_served_the_promoted_and_the_newest(four_releases) -> None:
    first = history(four_releases)[0]

    def release(number: int, *, promoted: bool = True, serving: bool = False, erased: bool = False):
        gate = first.gate.model_copy(update={"promoted": promoted})
        return first.model_copy(
            update={"release": f"r{number}", "number": number, "gate": gate, "serving": serving, "erased": erased}
        )

    releases = [
        release(1, serving=True), release(2), release(3), release(4, erased=True), release(5),
        release(6, promoted=False), release(7, promoted=False),
    ]  # fmt: skip
    kept = {keep: [one.number for one in kept_releases(releases, keep)] for keep in (1, 2, 9)}
    assert kept == {1: [1, 5, 7], 2: [1, 3, 5, 6, 7], 9: [1, 2, 3, 5, 6, 7]}


def test_a_folder_that_is_no_store_is_left_alone(tmp_path) -> None:
    """Its names may even look like ours: without a history nothing shows what is needed."""
    for name in ("models/resnet.bin", "reports/2025/q1.pdf", "notes/.tmp-mywork", f"models/{'ab' * 32}.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    before = files_of(tmp_path)
    with pytest.raises(SettingsError, match="holds no releases, so it is no store; check the path"):
        clean(str(tmp_path))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(("words", "message"), [({"keep": 0}, "at least 1"), ({}, "does not exist")])
def test_refusals(tmp_path, words, message) -> None:
    with pytest.raises(SettingsError, match=message):
        clean(str(tmp_path / "none"), **words)


@pytest.mark.parametrize("folder", ["indexes", "indexes/{release}", "models", "features/mode=raw"])
def test_a_link_into_another_store_is_not_followed(four_releases, store, tmp_path, folder) -> None:
    """A linked folder has the names of a store: those of the other one."""
    other = tmp_path / "other"
    shutil.copytree(four_releases, other)
    name = folder.format(release=history(store)[0].release)
    shutil.rmtree(store / name)
    (store / name).symlink_to(other / name)
    before = files_of(other)
    clean(str(store), keep=1)
    assert files_of(other) == before
