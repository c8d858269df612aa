"""A run costs what changed: for each kind of change, what is computed, committed and done to the indexes.

The reference is a new store from the same source: it must hold the same, byte for byte. Which files a plan wants in
special cases is tested in `tests/tasks/test_plan.py`.
"""

import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tasks.reweight
from schemas.releases import IndexRef, Release
from storage.features import features_table, quarantine_table
from storage.location import Location
from storage.parquet import from_parquet
from storage.releases import Releases
from tasks.index import Previous, index_mode
from tasks.plan import make_plan, prepare_models
from tasks.release import release_content
from tasks.synthetic.shards import synthesize

SHARDS = 20
ROWS = 14
ALL = {"raw", "per_sample", "batch_stat"}
KEYS = [f"part-{number:03d}" for number in range(SHARDS)]
SHARED = dict.fromkeys(ALL, "shared")
UPDATED = dict.fromkeys(ALL, "updated")
BUILT = dict.fromkeys(ALL, "built")


@dataclass(frozen=True)
class Change:
    """A change, and what the next run does: `computed` has shard → modes, `indexes` mode → how it was made.

    `commits` and `quarantine_commits` are new Delta versions; without any index the run publishes no release.
    `grows`: a column joins the schema: at its end here, among the others in a new store.
    """

    change: Callable[[Path], None] = lambda source: None
    settings: Mapping[str, object] = field(default_factory=dict)
    computed: Mapping[str, set[str]] = field(default_factory=dict)
    commits: int = 0
    quarantine_commits: int = 0
    indexes: Mapping[str, str] = field(default_factory=dict)
    grows: bool = False


def edit(source: Path, key: str, value: float = 1.5, row: int = 2) -> None:
    """Change one number of one row."""
    file = source / f"{key}.parquet"
    table = pq.read_table(file)
    matrix = np.stack(table["embedding"].to_numpy()).astype(np.float32)
    matrix[row, 3] = value
    column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    at = table.schema.get_field_index("embedding")
    pq.write_table(table.set_column(at, "embedding", column), file, compression="none")


def edit_several(source: Path) -> None:
    for key in KEYS[4:8]:
        edit(source, key)


def edit_secretly(source: Path) -> None:
    """Change an id, and keep the size and the time of the file."""
    file = source / "part-005.parquet"
    before, content = file.stat(), file.read_bytes()
    name = pq.read_table(file, columns=["id"])["id"][4].as_py().encode()
    changed = content.replace(name, name[:-1] + b"X")
    assert changed != content
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def copy_over_itself(source: Path) -> None:
    file = source / "part-005.parquet"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


def add(source: Path) -> None:
    table = pq.read_table(source / "part-005.parquet")
    names = pa.array([f"new-{row}" for row in range(table.num_rows)])
    pq.write_table(table.set_column(table.schema.get_field_index("id"), "id", names), source / "part-new.parquet")
    edit(source, "part-new", 0.7)


def rename(source: Path) -> None:
    (source / "part-005.parquet").rename(source / "renamed.parquet")


CHANGES: dict[str, Change] = {
    "nothing": Change(),
    "a shard copied over itself": Change(copy_over_itself),
    "one shard changed": Change(
        lambda source: edit(source, "part-005"), computed={"part-005": ALL}, commits=1, indexes=UPDATED
    ),
    "one row became bad": Change(
        lambda source: edit(source, "part-005", float("nan")),
        computed={"part-005": ALL},
        commits=1,
        quarantine_commits=1,
        indexes=UPDATED,
    ),
    "a bad row fixed": Change(
        lambda source: edit(source, "part-001", 0.1),
        computed={"part-001": ALL},
        commits=1,
        quarantine_commits=1,
        indexes=UPDATED,
    ),
    "four of twenty shards changed": Change(
        edit_several, computed=dict.fromkeys(KEYS[4:8], ALL), commits=1, indexes=BUILT
    ),
    "one shard more": Change(add, computed={"part-new": ALL}, commits=1, indexes=UPDATED),
    "one shard vanished": Change(lambda source: (source / "part-005.parquet").unlink(), commits=1, indexes=UPDATED),
    "one shard renamed": Change(rename, commits=1, indexes=UPDATED),
    "a shard rewritten with equal size and time": Change(
        edit_secretly, computed={"part-005": ALL}, commits=1, indexes=UPDATED
    ),
    "another model": Change(
        settings={"models": {"per_sample": "other"}},
        computed={key: {"per_sample"} for key in KEYS},
        commits=1,
        indexes=SHARED | {"per_sample": "built"},
    ),
    "the same model under another name": Change(settings={"models": {"per_sample": "again"}}),
    "one mode less": Change(
        settings={"models": {"batch_stat": None}}, commits=1, indexes={"raw": "shared", "per_sample": "shared"}
    ),
    "another statistic": Change(
        settings={"reweight": {"statistic": "batch"}},
        computed={key: {"batch_stat"} for key in KEYS},
        commits=1,
        indexes=SHARED | {"batch_stat": "built"},
    ),
    "branches too": Change(
        settings={"reweight": {"branches": True}},
        computed={key: {"per_sample", "batch_stat"} for key in KEYS},
        commits=1,
        indexes=SHARED | {"per_sample": "built", "batch_stat": "built"},
    ),
    # The new column joins the schema in a commit of its own, before the one that brings the files; quarantine files
    # are named after all that makes a row bad, and a kept column can make a shard so.
    "another kept column": Change(
        settings={"columns": {"keep": ["note"]}},
        computed=dict.fromkeys(KEYS, ALL),
        commits=2,
        quarantine_commits=1,
        indexes=BUILT,
        grows=True,
    ),
    "another batch size, where features do not depend on it": Change(settings={"reweight": {"batch_size": 8}}),
    "more workers in smaller groups": Change(settings={"reweight": {"group_rows": 1}, "runner": {"workers": 3}}),
    "another evaluation": Change(settings={"evaluation": {"resamples": 0, "seed": 1}}, indexes=SHARED),
    "another gate": Change(settings={"gate": {"tolerance": 0.9}}, indexes=SHARED),
    "another kind of index": Change(settings={"index": {"factory": "IVF4,Flat"}}, indexes=BUILT),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Twenty shards of one subject each, with a column to keep; `part-001` has a bad row."""
    folder = tmp_path_factory.mktemp("incremental") / "source"
    synthesize(folder, subjects=SHARDS, per_subject=ROWS, dim=32, shards=SHARDS, seed=11)
    for file in folder.iterdir():
        table = pq.read_table(file)
        noted = table.append_column("note", pa.array([file.stem] * table.num_rows))
        pq.write_table(noted, file, compression="none", use_dictionary=False)
    edit(folder, "part-001", float("inf"))
    assert sorted(file.stem for file in folder.iterdir()) == KEYS
    return folder


@pytest.fixture(scope="module")
def store(source: Path, run_pipeline, tmp_path_factory) -> Path:
    """A store with one release of the source."""
    place = tmp_path_factory.mktemp("incremental-store") / "store"
    outcome = run_pipeline(source, place)
    assert (outcome.shards_computed, outcome.data.quarantined) == (SHARDS, {"not_finite": 1})
    return place


@dataclass(frozen=True)
class Copies:
    """Copies of source and store after a change, and the settings of the next run."""

    source: Path
    store: Path
    settings: Mapping[str, object]
    before: Release
    versions: list[int]


@pytest.fixture
def prepared(
    source: Path, store: Path, tmp_path: Path, pipeline_of, tiny_models, make_checkpoint
) -> Callable[[Change], Copies]:
    def prepare(expected: Change) -> Copies:
        shutil.copytree(source, tmp_path / "source")
        shutil.copytree(store, tmp_path / "store")
        settings = dict(expected.settings)
        if "models" in settings:
            files = {"other": make_checkpoint(tmp_path / "other", seed=5), "again": tmp_path / "again"}
            shutil.copy(tiny_models.per_sample, files["again"])
            changed = {mode: file and str(files[file]) for mode, file in settings["models"].items()}
            settings["models"] = {mode: path for mode, path in {**tiny_models.by_mode, **changed}.items() if path}
        place = tmp_path / "store"
        # A copied source is a new one to the manifest, which would look at every shard whatever has changed.
        usual = pipeline_of(tmp_path / "source", place)
        assert not make_plan(usual, prepare_models(usual)).work
        expected.change(tmp_path / "source")
        return Copies(tmp_path / "source", place, settings, newest(place), versions_of(place))

    return prepare


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Shard → modes of all that is computed from here on, as seen where it is computed."""
    seen: dict[str, set[str]] = {}
    really = tasks.reweight.reweight_shard

    def watched(work, spec):
        seen.setdefault(work.shard.key, set()).update(work.keys)
        return really(work, spec)

    monkeypatch.setattr(tasks.reweight, "reweight_shard", watched)
    return seen


@pytest.mark.parametrize("name", CHANGES)
def test_stages_do_what_is_needed_and_no_more(
    name: str, prepared, tmp_path: Path, run_stages, pipeline_of, computed
) -> None:
    expected = CHANGES[name]
    there = prepared(expected)
    settings = pipeline_of(there.source, there.store, **there.settings)

    plan, _, published = run_stages(settings)

    assert computed == expected.computed
    assert [new - old for new, old in zip(versions_of(there.store), there.versions, strict=True)] == [
        expected.commits, expected.quarantine_commits,
    ]  # fmt: skip
    faults = published.data.bad_shards
    assert (release_content(settings, published.features.files, faults, None) != there.before.content) == bool(
        expected.indexes
    )
    previous = Previous(
        there.before, features_table(Location(str(there.store))).snapshot(there.before.features_version)
    )
    made = {
        mode: how_made(there.store, there.before.indexes[mode], index_mode(
            Location(str(there.store)), "r00002-next", mode, published.features, settings.index, previous))
        for mode in plan.modes
    }  # fmt: skip
    assert made == (expected.indexes or SHARED)
    run_stages(pipeline_of(there.source, tmp_path / "fresh", **there.settings))
    same = live_rows if expected.grows else live_bytes
    assert same(there.store) == same(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["one shard changed", "another model", "another evaluation"])
def test_whole_flow_does_what_its_stages_do(name: str, prepared, run_pipeline, computed) -> None:
    expected = CHANGES[name]
    there = prepared(expected)

    outcome = run_pipeline(there.source, there.store, **there.settings)

    assert outcome.status == "promoted"
    assert computed == expected.computed
    assert outcome.shards_computed == len(expected.computed)
    assert outcome.rows_computed == ROWS * len(expected.computed)
    assert [new - old for new, old in zip(versions_of(there.store), there.versions, strict=True)] == [
        expected.commits, expected.quarantine_commits,
    ]  # fmt: skip
    made = {
        mode: how_made(there.store, there.before.indexes[mode], index)
        for mode, index in newest(there.store).indexes.items()
    }
    assert made == expected.indexes


def test_whole_run_without_a_change_opens_no_shard(
    source: Path, store: Path, run_pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    really = Location.open_input

    def counting(place: Location) -> pa.NativeFile:
        opened.append(place.path)
        return really(place)

    monkeypatch.setattr(Location, "open_input", counting)
    assert run_pipeline(source, store).status == "unchanged"
    assert opened  # the store was looked at, so the counter counts
    assert not [path for path in opened if path.startswith(str(source))]


@pytest.mark.parametrize("seed", range(3))
def test_any_row_of_changes_ends_as_a_new_store_would(
    seed: int, source: Path, tmp_path: Path, run_stages, pipeline_of
) -> None:
    """Renamed, returned, swapped, bad and repaired shards in any order, with ids that move between them."""
    folder, chance = tmp_path / "source", random.Random(seed)
    folder.mkdir()
    for key in KEYS[:6]:
        shutil.copy(source / f"{key}.parquet", folder)
    run_stages(pipeline_of(folder, tmp_path / "store"))
    for step in range(6):
        for _ in range(chance.randint(1, 3)):
            any_change(folder, source, chance)
        run_stages(pipeline_of(folder, tmp_path / "store"))
        run_stages(pipeline_of(folder, tmp_path / f"fresh-{step}"))
        assert live_bytes(tmp_path / "store") == live_bytes(tmp_path / f"fresh-{step}"), f"step {step}"


def any_change(folder: Path, source: Path, chance: random.Random) -> None:
    present = sorted(folder.iterdir())
    file = chance.choice(present)
    kind = chance.choice(["edit", "bad row", "remove", "return", "rename", "copy", "swap"])
    if kind == "edit":
        edit(folder, file.stem, chance.random(), chance.randrange(ROWS))
    elif kind == "bad row":
        edit(folder, file.stem, float("nan"), chance.randrange(ROWS))
    elif kind == "remove" and len(present) > 2:
        file.unlink()
    elif kind == "return":
        shutil.copy(source / f"{chance.choice(KEYS[:6])}.parquet", folder)
    elif kind == "rename":
        file.rename(folder / f"z-{chance.randrange(100):02d}.parquet")
    elif kind == "copy":  # the second of two equal shards holds nothing but duplicates
        shutil.copy(file, folder / f"copy-{chance.randrange(100):02d}.parquet")
    elif kind == "swap":
        other = chance.choice(present)
        ours, theirs = file.read_bytes(), other.read_bytes()
        file.write_bytes(theirs)
        other.write_bytes(ours)


def newest(store: Path) -> Release:
    return Releases(Location(str(store))).all()[-1]


def versions_of(store: Path) -> list[int]:
    place = Location(str(store))
    return [features_table(place).snapshot().version, quarantine_table(place).snapshot().version]


def how_made(store: Path, old: IndexRef, new: IndexRef) -> str:
    if (store / old.path).samefile(store / new.path):
        return "shared"
    return "updated" if new.changed > old.changed else "built"


def live_bytes(store: Path) -> dict[str, bytes]:
    """Every live file of both tables with its bytes."""
    place = Location(str(store))
    return {
        f"{table.place.name}/{path}": (Path(table.place.path) / path).read_bytes()
        for table in (features_table(place), quarantine_table(place))
        for path in table.snapshot().files
    }


def live_rows(store: Path) -> dict[str, pa.Table]:
    """Every live file of both tables with its rows, whatever the order of the columns."""
    found = {path: from_parquet(content) for path, content in live_bytes(store).items()}
    return {path: table.select(sorted(table.column_names)) for path, table in found.items()}
