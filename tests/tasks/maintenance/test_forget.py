"""Forgetting: nothing of a person is left in any file, nothing of them comes back, and nobody else is touched."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from schemas.errors import SettingsError, StoreError
from storage.location import Location
from storage.manifest import Manifest
from storage.releases import Releases
from tasks.maintenance.forget import forget
from tasks.maintenance.rollback import roll_back
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check
from tasks.query import answer
from tasks.synthetic.shards import synthesize
from tests.commands import frontalis

KEEP = {"keep": ["note"]}
MODES = ("raw", "per_sample", "batch_stat")
# batches of 40 rows, so that a shard of about 93 has several, and forgetting changes the mean of one or two
KINDS = {
    "frozen": {},
    "batch": {"reweight": {"statistic": "batch", "batch_size": 40}},
    "branches": {"reweight": {"branches": True}},
    "trained": {"index": {"factory": "IVF4,Flat"}},
}


def rows_of(store: Path, subject: str) -> pl.DataFrame:
    return pl.scan_delta(str(store / "features")).filter(pl.col("subject") == subject).collect()


def feature_files(store: Path) -> dict[str, bytes]:
    live = pa.table(DeltaTable(store / "features").get_add_actions(flatten=True)).to_pylist()
    return {one["path"]: (store / "features" / one["path"]).read_bytes() for one in live}


def everything_in(store: Path) -> dict[str, bytes]:
    """The bytes of every file, and what Parquet has compressed in them, in plain."""
    found = {}
    for file in (path for path in store.rglob("*") if path.is_file()):
        found[str(file.relative_to(store))] = file.read_bytes()
        if file.suffix == ".parquet":
            table = pq.ParquetFile(file, pre_buffer=False).read(use_threads=False)
            found[f"{file.relative_to(store)} (decoded)"] = repr(
                table.drop_columns(
                    [name for name in ("front", "identity", "pose_branch") if name in table.column_names]
                ).to_pylist()
            ).encode()
    return found


def traces(store: Path, secrets: list[bytes]) -> list[str]:
    return [
        f"{name}: {secret[:24]!r}"
        for name, content in everything_in(store).items()
        for secret in secrets
        if secret in content
    ]


def vectors_in(frame: pl.DataFrame) -> list[bytes]:
    """Every vector of a person as its bytes: as stored, and scaled to length one as the index holds it."""
    vectors = [
        np.array(row, np.float32)
        for name in ("front", "identity", "pose_branch")
        for row in frame[name].to_list()
        if row is not None
    ]
    unit = [vector / np.linalg.norm(vector) for vector in vectors]
    return [vector.astype(np.float32).tobytes() for vector in [*vectors, *unit]]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_forgotten_subject_is_left(published, run_pipeline, person, tmp_path, kind) -> None:
    store = published(**KINDS[kind])
    frame = rows_of(store, person.subject)
    assert frame.height == person.rows * len(MODES)
    raw = pq.ParquetFile(next((store / "indexes").glob("*/raw/ids.parquet"))).read(use_threads=False).to_pylist()
    secrets = [secret.encode() for secret in person.secrets] + vectors_in(frame)
    secrets += [str(row["id"]).encode() for row in raw if row["subject"] == person.subject]
    assert len(traces(store, secrets)) > len(secrets)  # the search would find them
    others = pl.scan_delta(str(store / "features")).filter(pl.col("subject") != person.subject).collect()

    hidden = tmp_path / "source-out-of-reach"
    person.source.rename(hidden)  # forgetting must not need it
    try:
        done = forget(str(store), subject=person.subject)
    finally:
        hidden.rename(person.source)

    assert (done.rows, done.quarantined, done.shards) == (person.rows, person.quarantined, 2)
    assert [old[:6] for old in done.erased_releases] == ["r00001"]
    served = Releases(Location(str(store))).serving()
    assert served.release == done.release
    data = served.data
    assert data.forgotten == person.rows + person.quarantined
    assert data.rows_read == data.rows_features + sum(data.quarantined.values()) + data.forgotten
    assert rows_of(store, person.subject).height == 0
    if kind != "batch":  # there a batch without a row has another mean, by definition
        after = pl.scan_delta(str(store / "features")).collect()
        assert after.sort("mode", "id").equals(others.sort("mode", "id"))
    with pytest.raises(SettingsError, match="is not in release"):
        answer(str(store), "per_sample", ids=[person.photograph])
    some = others["id"][0]
    everyone = answer(str(store), "per_sample", ids=[some], k=10_000).results[0].neighbours
    assert person.subject not in {one.subject for one in everyone}
    with pytest.raises(SettingsError, match="forgotten"):
        roll_back(str(store), done.erased_releases[0])
    with pytest.raises(SettingsError, match="forgotten"):
        answer(str(store), "per_sample", ids=[person.photograph], release=done.erased_releases[0])

    clean(str(store))

    assert traces(store, secrets) == []
    for version in range(DeltaTable(store / "features").version()):
        then = DeltaTable(store / "features", version=version)
        there = [
            one["path"]
            for one in pa.table(then.get_add_actions(flatten=True)).to_pylist()
            if (store / "features" / one["path"]).exists()
        ]
        assert there == [] or rows_in(store, there, person.subject) == 0
    assert check(str(store)).problems == []
    assert check(str(store)).leftovers == []

    again = run_pipeline(person.source, store, columns=KEEP, **KINDS[kind])
    assert (again.status, again.shards_computed) == ("unchanged", 0), "the next run must have nothing to do"

    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(store / "tombstones.json", fresh)
    run_pipeline(person.source, fresh, columns=KEEP, **KINDS[kind])
    mine, theirs = feature_files(store), feature_files(fresh)
    assert set(mine) == set(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == [], "equal names must hold equal bytes"


def rows_in(store: Path, paths: list[str], subject: str) -> int:
    return sum(
        pq.ParquetFile(store / "features" / path).read(["subject"])["subject"].to_pylist().count(subject)
        for path in paths
    )


def test_an_id_is_forgotten_alone(published, person) -> None:
    store = published()
    done = forget(str(store), id_=person.photograph)
    assert (done.kind, done.rows, done.quarantined) == ("id", 1, 1)
    left = rows_of(store, person.subject)
    assert left.height == (person.rows - 1) * len(MODES)
    assert person.photograph not in left["id"].to_list()


def test_an_unknown_person_is_excluded_for_good(published, run_pipeline, person, tmp_path) -> None:
    store = published()
    before = Releases(Location(str(store))).serving()
    done = forget(str(store), subject="nobody-yet", in_advance=True)
    assert (done.rows, done.release, done.erased_releases) == (0, None, [])
    assert Releases(Location(str(store))).serving().release == before.release
    assert run_pipeline(person.source, store, columns=KEEP).status == "unchanged"

    source = tmp_path / "shards"
    shutil.copytree(person.source, source)
    table = pq.read_table(source / "part-900.parquet")
    subjects = ["nobody-yet" if name == "subject-extra" else name for name in table["subject"].to_pylist()]
    pq.write_table(
        table.set_column(table.schema.get_field_index("subject"), "subject", [subjects]), source / "part-900.parquet"
    )
    outcome = run_pipeline(source, store, columns=KEEP)
    assert outcome.data.forgotten == 4
    assert rows_of(store, "nobody-yet").height == 0


def test_forgetting_twice_changes_nothing_more(published, person) -> None:
    store = published()
    first = forget(str(store), subject=person.subject)
    second = forget(str(store), subject=person.subject)
    assert (second.rows, second.release, second.erased_releases) == (0, None, [])
    assert Releases(Location(str(store))).serving().release == first.release


def test_the_log_holds_what_and_never_whom(published, person) -> None:
    store = published()
    forget(str(store), subject=person.subject)
    forget(str(store), id_="no-such-id", in_advance=True)
    lines = [json.loads(line) for line in (store / "forgotten.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["rows"], line["quarantined"]) for line in lines] == [
        ("subject", person.rows, person.quarantined),
        ("id", 0, 0),
    ]
    text = (store / "forgotten.jsonl").read_text() + (store / "tombstones.json").read_text()
    assert not any(secret in text for secret in (*person.secrets, "no-such-id"))


def test_an_id_that_a_forgotten_row_owned_goes_to_the_next_in_line(published, run_pipeline, person) -> None:
    """Row 7 of the last shard repeats an id of the first: forgetting the owner's subject frees it for that row."""
    store = published()
    table = pq.read_table(person.source / "part-900.parquet")
    repeated = table["id"].to_pylist()[7]
    owner = rows_with(store, repeated)["subject"][0]
    forget(str(store), subject=owner)
    assert rows_with(store, repeated).height == 0
    run_pipeline(person.source, store, columns=KEEP)
    assert set(rows_with(store, repeated)["subject"]) == {"subject-extra"}
    assert check(str(store)).problems == []


def test_forgetting_works_without_a_census(published, run_pipeline, person) -> None:
    store = published()
    shutil.rmtree(store / "manifest")
    assert forget(str(store), subject=person.subject).rows == person.rows
    assert rows_of(store, person.subject).height == 0
    outcome = run_pipeline(person.source, store, columns=KEEP)
    assert outcome.shards_computed == 2
    assert outcome.data.forgotten == person.rows + person.quarantined
    clean(str(store), keep=1)
    assert check(str(store)).problems == []


def test_what_was_rejected_is_not_served_by_forgetting(published, run_pipeline, person, make_checkpoint, tmp_path):
    store = published()
    bad = {"per_sample": str(make_checkpoint(tmp_path / "bad.safetensors", strength=3.0))}
    settings = {"models": bad, "evaluation": {"resamples": 50}, "gate": {"tolerance": 0.0}}
    rejected = run_pipeline(person.source, store, columns=KEEP, **settings)
    assert rejected.status == "rejected"
    served = Releases(Location(str(store))).serving()
    done = forget(str(store), subject=person.subject)
    assert set(done.erased_releases) == {served.release, rejected.release}
    now = Releases(Location(str(store))).serving()
    assert now.release == done.release
    assert now.models == served.models
    assert rows_of(store, person.subject).height == 0
    clean(str(store))
    assert check(str(store)).problems == []


def test_an_interrupted_forgetting_is_completed_by_the_next(published, run_pipeline, person, monkeypatch) -> None:
    store = published()
    monkeypatch.setattr("tasks.maintenance.forget.write_report", _stop)
    with pytest.raises(StoreError, match="power cut"):
        forget(str(store), subject=person.subject)
    assert answer(str(store), "raw", ids=[person.photograph]).results, "the old release answers until it is replaced"
    problems = {problem.remedy for problem in check(str(store)).problems}
    assert any("frontalis forget" in remedy for remedy in problems)
    monkeypatch.undo()
    done = forget(str(store), subject=person.subject)
    assert done.rows == person.rows
    clean(str(store))
    assert check(str(store)).problems == []
    run_pipeline(person.source, store, columns=KEEP)
    assert rows_of(store, person.subject).height == 0


def test_the_last_person_can_be_forgotten(run_pipeline, tmp_path) -> None:
    store = tmp_path / "store"
    synthesize(tmp_path / "shards", subjects=2, per_subject=4, dim=32, shards=1)
    run_pipeline(tmp_path / "shards", store)
    everybody = pl.scan_delta(str(store / "features")).select("subject").unique().collect()["subject"].to_list()
    for subject in everybody:
        done = forget(str(store), subject=subject)
    assert done.release is None
    with pytest.raises(StoreError, match="no release is served"):
        answer(str(store), "raw", ids=["any"])


def test_a_subject_of_hive_folders_is_forgotten_and_stays_so(run_pipeline, tiny_source, tmp_path) -> None:
    source, store = tmp_path / "hive", tmp_path / "store"
    table = pq.read_table(tiny_source)
    ds.write_dataset(table, source, format="parquet", partitioning=["subject"], partitioning_flavor="hive")
    assert run_pipeline(source, store).data.rows_features == 280
    forget(str(store), subject="subject-000003")
    manifest = Manifest(Location(str(store))).load()
    assert len(manifest.records) == 20
    assert run_pipeline(source, store).status == "unchanged"
    assert Manifest(Location(str(store))).load().records == manifest.records
    assert rows_of(store, "subject-000003").is_empty()


def test_a_damaged_list_of_tombstones_stops_every_run(published, run_pipeline, person) -> None:
    store = published()
    forget(str(store), id_="x", in_advance=True)
    (store / "tombstones.json").write_text("{")
    with pytest.raises(StoreError, match="restore the newest copy of this file from a backup"):
        forget(str(store), id_="y")
    with pytest.raises(StoreError, match="restore the newest copy of this file from a backup"):
        run_pipeline(person.source, store, columns=KEEP)


@pytest.mark.parametrize("words", [{}, {"subject": "a", "id_": "b"}])
def test_one_thing_is_forgotten_at_a_time(tmp_path: Path, words: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="either --subject or --id"):
        forget(str(tmp_path), **words)


def test_a_misspelt_store_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        forget(str(tmp_path / "stroe"), subject="a")
    assert not (tmp_path / "stroe").exists()


def rows_with(store: Path, id_: str) -> pl.DataFrame:
    return pl.scan_delta(str(store / "features")).filter(pl.col("id") == id_).collect()


def _stop(*_: object) -> str:
    raise StoreError("power cut")


def test_on_the_command_line(published, person) -> None:
    """As the operations guide has it: forget, look, vacuum, verify; needs no Prefect server."""
    store = published()
    first = Releases(Location(str(store))).serving().release

    def shell(*words: str, code: int = 0) -> str:
        done = frontalis(*words, "--store", store)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        return done.stdout if code in (0, 1) else done.stderr

    said = shell("forget", "--subject", person.subject)
    assert f"{person.rows} rows with features and {person.quarantined} in quarantine, in 2 shards" in said
    assert f"erased     {first}" in said
    assert not any(secret in said for secret in person.secrets)
    assert "no row of this id is served" in shell("forget", "--id", "nobody", "--in-advance")
    listed = shell("vacuum", "--dry-run")
    assert f"indexes/{first}/raw/index.faiss" in listed
    assert (store / f"indexes/{first}/raw/index.faiss").exists()
    assert json.loads(shell("vacuum", "--json"))["removed_releases"] == [first]
    assert "no problems" in shell("verify")
    next((store / "indexes").glob("*/raw/index.faiss")).write_bytes(b"x")
    problems = json.loads(shell("verify", "--json", code=1))["problems"]
    assert [problem["thing"].endswith("mode raw") for problem in problems] == [True]
    assert "pass one of --subject, --id, --from, --list and --undo" in shell("forget", code=2)
