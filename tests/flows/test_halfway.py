"""Runs that end between two commits: whatever is typed next, the run after it leaves what an undisturbed one leaves."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from schemas.features import QUARANTINE_SCHEMA
from storage.features import features_table, quarantine_table
from storage.location import Location
from storage.tables import FileTable
from tasks.maintenance.forget import forget
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check

KEEP = {"keep": ["note"]}


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture
def killed_at(monkeypatch) -> Callable[..., None]:
    """`killed_at(commit, work)` runs `work` and ends it in place of its commit of that number."""

    def run(number: int, work: Callable[[], object]) -> None:
        commit, done = FileTable.commit, []

        def counted(table: FileTable, *arguments: object) -> object:
            done.append(table.place.name)
            if len(done) == number:
                raise Killed
            return commit(table, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(FileTable, "commit", counted)
            with pytest.raises(Killed):
                work()

    return run


def live(store: Path) -> dict[str, bytes]:
    place = Location(str(store))
    return {
        f"{table.place.name}/{path}": (store / table.place.name / path).read_bytes()
        for table in (features_table(place), quarantine_table(place))
        for path in table.snapshot().files
    }


BETWEEN = {
    "nothing": lambda store: None,
    "vacuum": lambda store: clean(str(store), keep=1),
    "forget": lambda store: forget(str(store), subject="nobody-of-that-name", in_advance=True),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("commit", [1, 2])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_publishing_that_ends_between_its_commits(
    pipeline_of, run_stages, person, killed_at, tmp_path, first, commit, between
):
    """Of the source then two shards have other bad rows."""
    store, changed = tmp_path / "store", tmp_path / "changed"
    shutil.copytree(person.source, changed)
    for name in ("part-001.parquet", "part-900.parquet"):
        pq.write_table(pq.read_table(person.source / name).slice(1), changed / name)
    if not first:
        run_stages(pipeline_of(person.source, store))
    store.mkdir(exist_ok=True)
    (store / ".lock").touch()  # which every run makes before anything else, and these stages alone do not
    settings = pipeline_of(changed, store)
    killed_at(commit, lambda: run_stages(settings))
    assert check(str(store)).problems == []
    BETWEEN[between](store)
    data = run_stages(settings).published.data
    assert data == run_stages(pipeline_of(changed, tmp_path / "fresh")).published.data
    assert live(store) == live(tmp_path / "fresh")
    clean(str(store))
    assert (check(str(store)).problems, check(str(store)).leftovers) == ([], [])


@pytest.mark.parametrize("commit", [1, 2])
def test_forgetting_that_ends_between_its_commits(published, run_stages, pipeline_of, person, killed_at, commit):
    store, undisturbed = published(), published()
    killed_at(commit, lambda: forget(str(store), subject=person.subject))
    shutil.copy(store / "tombstones.json", undisturbed)  # whose salt is in the names of files
    forget(str(undisturbed), subject=person.subject)
    clean(str(store), keep=1)
    data = run_stages(pipeline_of(person.source, store, columns=KEEP)).published.data
    assert data.forgotten == person.rows + person.quarantined
    assert live(store) == live(undisturbed)
    forget(str(store), subject=person.subject)  # as `docs/operations.md` says of one that was interrupted
    assert check(str(store)).problems == []
    run_stages(pipeline_of(person.source, store, columns=KEEP))
    clean(str(store), keep=1)
    assert live(store) == live(undisturbed)
    assert (check(str(store)).problems, check(str(store)).leftovers) == ([], [])


def test_bad_rows_that_are_nowhere_are_reported_and_found_again(pipeline_of, run_stages, person, tmp_path) -> None:
    settings = pipeline_of(person.source, tmp_path / "store")
    run_stages(settings)
    before = live(tmp_path / "store")
    table = quarantine_table(Location(settings.store))
    base = table.snapshot()
    [lost] = [file for file in base.files.values() if file.shard == "part-900"]
    table.commit(base, QUARANTINE_SCHEMA, [], [lost])
    (table.place / lost.path).delete()
    [problem] = check(settings.store).problems
    assert problem.thing == "shard part-900"
    assert problem.what == "of 8 rows 3 became features, 0 are in quarantine, 0 are forgotten"
    assert problem.remedy == "run `frontalis reprocess` with this source and these models"
    run_stages(settings)
    assert live(tmp_path / "store") == before
    assert check(settings.store).problems == []
