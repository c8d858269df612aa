"""Rolling back: the old release answers at once, as a whole; what cannot be served is refused and nothing changes."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from schemas.errors import SettingsError, StoreError
from storage.location import Location
from storage.lock import store_lock
from storage.releases import Releases
from tasks.maintenance.rollback import roll_back
from tasks.query import answer


@pytest.fixture(scope="module")
def two_releases(run_pipeline, plain_source, make_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for number in range(2):
        model = make_checkpoint(folder / f"{number}.safetensors", seed=number)
        assert run_pipeline(plain_source, folder / "store", models={"per_sample": str(model)}).status == "promoted"
    return folder / "store"


@pytest.fixture
def store(two_releases, tmp_path) -> Path:
    shutil.copytree(two_releases, tmp_path / "store")
    return tmp_path / "store"


def names(store: Path) -> list[str]:
    return [release.release for release in Releases(Location(str(store))).all()]


def scores(store: Path, release: str | None = None) -> list[tuple[str | int, float]]:
    some = sorted(pl.scan_delta(str(store / "features")).select("id").collect()["id"])[0]
    found = answer(str(store), "per_sample", ids=[some], release=release).results[0].neighbours
    return [(one.id, one.score) for one in found]


def test_back_and_forth(store) -> None:
    first, second = names(store)
    of_first, of_second = scores(store, first), scores(store, second)
    assert of_first != of_second
    assert roll_back(str(store), first).release == first
    assert scores(store) == of_first
    roll_back(str(store), second)
    assert scores(store) == of_second
    assert [release.serving for release in Releases(Location(str(store))).all()] == [False, True]


def test_an_unknown_release_is_refused_with_those_there_are(store) -> None:
    with pytest.raises(SettingsError, match=f"'r9' is not in .*{names(store)[1]}"):
        roll_back(str(store), "r9")


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("indexes/{release}/raw/index.faiss", "flip"),
        ("indexes/{release}/per_sample/ids.parquet", "flip"),
        ("indexes/{release}/per_sample/index.faiss", "delete"),
        ("features/mode=per_sample/*/*-{model}.parquet", "truncate"),
        ("features/mode=per_sample/*/*-{model}.parquet", "delete"),
        ("models/{file}.safetensors", "delete"),
    ],
)
def test_an_incomplete_release_is_refused_and_the_other_stays_served(store, pattern, damage) -> None:
    first, second = Releases(Location(str(store))).all()
    model = first.models["per_sample"]
    pattern = pattern.format(release=first.release, model=model.digest, file=model.file_digest)
    hurt(sorted(store.glob(pattern))[0], damage)
    before = scores(store)
    with pytest.raises(StoreError, match=r"missing|damaged|digest"):
        roll_back(str(store), first.release)
    assert Releases(Location(str(store))).serving().release == second.release
    assert scores(store) == before


def test_a_run_that_holds_the_store_is_not_waited_for(store) -> None:
    first, _ = names(store)
    with store_lock(Location(str(store)), "reprocess"):
        assert roll_back(str(store), first).serving
    assert Releases(Location(str(store))).serving().release == first


def hurt(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    file.unlink()  # the copy only: hard links would carry the damage over
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
