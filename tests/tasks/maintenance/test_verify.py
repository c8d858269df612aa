"""Verify: every kind of damage is found, named, and repaired by its remedy; a sound store has no problem."""

import re
import shutil
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from schemas.errors import SettingsError
from storage.location import Location
from storage.releases import Releases
from storage.tombstones import Tombstones
from tasks.maintenance.forget import forget
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check
from tasks.query import answer

KEEP = {"keep": ["note"]}


def hurt(store: Path, pattern: str, damage: str) -> str:
    file = sorted(store.glob(pattern))[0]
    if damage == "rows":
        pq.write_table(pq.ParquetFile(file).read().slice(1), file)
        return str(file.relative_to(store))
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "flip":
        content[len(content) // 3] ^= 4
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-100])
    elif damage == "garbage":
        file.write_bytes(b"\0" * len(content))
    return str(file.relative_to(store))


def test_a_sound_store_is_sound(published) -> None:
    store = published()
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}
    checked = check(str(store))
    assert checked.problems == []
    assert checked.leftovers == []
    release = Releases(Location(str(store))).serving()
    assert checked.releases == [release.release]
    assert checked.rows == 3 * release.data.rows_features + sum(release.data.quarantined.values())
    sizes = sum(
        file.stat().st_size for file in store.rglob("*")
        if file.is_file() and file.relative_to(store).parts[0] in ("features", "quarantine", "indexes", "models")
        and "_delta_log" not in file.parts
    )  # fmt: skip
    assert checked.bytes == sizes
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()} == before


TABLES = (
    "features/mode=per_sample/*/*.parquet",
    "features/mode=raw/*/*.parquet",
    "quarantine/shard=*/*.parquet",
    "indexes/*/batch_stat/ids.parquet",
)
BLOBS = ("indexes/*/raw/index.faiss", "models/*.safetensors")


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        *product(TABLES, ["flip", "truncate", "garbage", "rows", "delete"]),
        *product(BLOBS, ["flip", "truncate", "garbage", "delete"]),
    ],
)
def test_damage_is_found_and_named(published, pattern, damage) -> None:
    store = published()
    name = hurt(store, pattern, damage)
    problems = check(str(store)).problems
    assert problems
    assert all(problem.remedy for problem in problems)
    assert any(name in problem.thing + problem.what for problem in problems)
    assert not (damage == "delete" and (store / name).exists()), "verify changes nothing"


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("features/mode=per_sample/*/*.parquet", "flip"),
        ("features/mode=raw/*/*.parquet", "delete"),
        ("features/mode=batch_stat/*/*.parquet", "truncate"),
        ("quarantine/shard=*/*.parquet", "delete"),
        ("indexes/*/per_sample/index.faiss", "flip"),
        ("indexes/*/raw/ids.parquet", "delete"),
        ("models/*.safetensors", "garbage"),
    ],
)
def test_the_remedy_repairs(published, run_pipeline, person, pattern, damage) -> None:
    """Done as the remedy says: delete what it says to delete, run reprocess."""
    store = published()
    hurt(store, pattern, damage)
    for problem in check(str(store)).problems:
        if "delete the folder" in problem.remedy:
            shutil.rmtree(store / re.search(r"delete the folder (\S+),", problem.remedy)[1])
        elif problem.remedy.startswith("delete it"):
            (store / re.search(r"(features|quarantine|models)/\S+", f"{problem.thing} {problem.what}")[0]).unlink()
    run_pipeline(person.source, store, columns=KEEP)
    served = Releases(Location(str(store))).serving()
    checked = check(str(store))
    assert [one for one in checked.problems if served.release in one.thing or "/" in one.thing] == []
    assert len(answer(str(store), "per_sample", ids=[person.photograph]).results[0].neighbours) == 10
    clean(str(store), keep=1)
    assert check(str(store)).problems == []


def test_a_missing_report_is_reported(published) -> None:
    store = published()
    shutil.rmtree(store / "reports")
    assert [problem.what for problem in check(str(store)).problems] == ["its report is missing"]


def test_a_forgotten_row_that_is_still_there_is_reported(published, person) -> None:
    store = published()
    tombstones = Tombstones(Location(str(store)))
    tombstones.add([tombstones.tombstone("subject", person.subject)])
    problems = check(str(store)).problems
    where = " ".join(problem.thing for problem in problems)
    assert all(name in where for name in ("mode=raw", "mode=per_sample", "mode=batch_stat", "quarantine/", "mode raw"))
    assert all("frontalis forget" in problem.remedy for problem in problems)
    forget(str(store), subject=person.subject)
    assert check(str(store)).problems == []
    assert check(str(store)).leftovers, "the old files wait for vacuum"


def test_nothing_served_though_something_could_be(published) -> None:
    store = published()
    history = Releases(Location(str(store)))
    releases = history.all()
    history.rewrite([one.model_copy(update={"serving": False}) for one in releases], releases)
    (problem,) = check(str(store)).problems
    assert f"rollback --store {store} {releases[0].release}" in problem.remedy


def test_index_and_features_that_disagree_are_reported(published) -> None:
    store = published()
    history = Releases(Location(str(store)))
    releases = history.all()
    swapped = {**releases[0].indexes, "raw": releases[0].indexes["raw"].model_copy(update={"rows": 1})}
    history.rewrite([releases[0].model_copy(update={"indexes": swapped})], releases)
    (problem,) = check(str(store)).problems
    assert "1 rows in the record" in problem.what


def test_a_lost_log_is_reported(published) -> None:
    store = published()
    for file in (store / "features/_delta_log").iterdir():
        file.write_text("{")
    things = {problem.thing for problem in check(str(store)).problems}
    assert Releases(Location(str(store))).serving().release in things
    assert any(thing.startswith("features/_delta_log/") for thing in things)


def test_a_misspelt_store_is_refused(tmp_path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        check(str(tmp_path / "stroe"))
