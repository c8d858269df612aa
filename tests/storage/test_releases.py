"""The release history: one release served, a change planned on an older history is refused."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from schemas.errors import SettingsError, StoreBusyError, StoreError
from schemas.releases import Release, anchor_of
from schemas.reports import DataQuality, GateDecision
from storage.location import Location
from storage.releases import Releases
from storage.tables import FileTable, Snapshot


def release(number: int, promoted: bool = True, **more: object) -> Release:
    values = {
        "release": f"r{number:05d}-0123abcd",
        "number": number,
        "created": datetime(2026, 3, 14, 2, tzinfo=UTC) + timedelta(days=number),
        "content": f"{number:032x}",
        "source": "/faces",
        "features_version": number,
        "quarantine_version": None,
        "models": {},
        "indexes": {},
        "data": DataQuality(shards=1, rows_read=1, rows_features=1, quarantined={}),
        "gate": GateDecision(promoted=promoted, reason="better" if promoted else "worse"),
        "gated": {},
        "gated_name": "EER",
        "report": None,
    }
    return Release.model_validate({**values, **more})


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(Location(str(tmp_path)))


def served(releases: Releases) -> list[int]:
    return [one.number for one in releases.all() if one.serving]


def record(releases: Releases, *new: Release) -> None:
    for one in new:
        releases.record(one, releases.all())


def test_a_store_without_releases_serves_none(releases: Releases) -> None:
    assert releases.all() == []
    with pytest.raises(StoreError, match="no release is served yet; run `frontalis reprocess`"):
        releases.serving()
    with pytest.raises(SettingsError, match=r"'r1' is not in .*; the latest are: none yet"):
        releases.servable("r1")


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "other files", "a file", "another table"])
def test_what_is_no_store_is_refused(tmp_path: Path, there: str) -> None:
    store = tmp_path / "store"
    if there == "a file":
        store.write_bytes(b"x")
    elif there != "nothing":
        (store / "releases").mkdir(parents=True)
    if there == "other files":
        (store / "releases/v1.parquet").write_bytes(b"x")
    elif there == "another table":
        pl.DataFrame({"id": [1]}).write_delta(store / "features")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SettingsError, match=f"store {store}: (does not exist|holds no releases).*; check the path"):
        Releases.of(Location(str(store)))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_with_a_release_is_one(releases: Releases, tmp_path: Path) -> None:
    record(releases, release(1))
    assert Releases.of(Location(str(tmp_path))).all() == releases.all()


def test_the_newest_promoted_release_is_served(releases: Releases) -> None:
    record(releases, release(1), release(2), release(3, promoted=False))
    assert [one.number for one in releases.all()] == [1, 2, 3]
    assert releases.serving() == release(2, serving=True)
    assert served(releases) == [2]
    assert releases.servable(release(1).release).number == 1


def test_nothing_is_served_before_something_was_promoted(releases: Releases) -> None:
    record(releases, release(1, promoted=False))
    with pytest.raises(StoreError, match="no release is served yet"):
        releases.serving()


def test_a_release_that_finishes_what_it_began_takes_its_own_place(releases: Releases) -> None:
    record(releases, release(1), release(2, promoted=False), release(2))
    assert [one.number for one in releases.all()] == [1, 2]
    assert served(releases) == [2]


def test_an_older_release_can_be_served_again_and_a_new_one_takes_over(releases: Releases) -> None:
    record(releases, release(1), release(2))
    assert releases.serve(release(1).release).number == 1
    assert served(releases) == [1]
    record(releases, release(3, promoted=False))
    assert served(releases) == [1]
    record(releases, release(4))
    assert served(releases) == [4]


@pytest.mark.parametrize(
    ("mark", "message"), [("erased", "holds a person who was forgotten since"), ("vacuumed", "its files were removed")]
)
def test_a_release_that_lost_its_files_is_not_served(releases: Releases, mark: str, message: str) -> None:
    record(releases, release(1, **{mark: True}), release(2))
    with pytest.raises(SettingsError, match=f"{release(1).release}.*{message}.*; choose a later one"):
        releases.serve(release(1).release)
    assert served(releases) == [2]


def test_a_change_planned_on_another_history_is_refused(releases: Releases) -> None:
    record(releases, release(1))
    seen = releases.all()
    record(releases, release(2))
    now = releases.all()
    for change in (lambda: releases.record(release(3), seen), lambda: releases.rewrite([], seen)):
        with pytest.raises(StoreBusyError, match="another run changed the releases meanwhile; nothing was published"):
            change()
    assert releases.all() == now


def test_who_serves_an_older_release_meanwhile_counts_as_a_change(releases: Releases) -> None:
    record(releases, release(1), release(2))
    seen = releases.all()
    releases.serve(release(1).release)
    with pytest.raises(StoreBusyError):
        releases.record(release(3), seen)
    assert served(releases) == [1]


def test_history_is_one_file_and_one_commit_a_change(releases: Releases) -> None:
    record(releases, release(1))
    before = releases.table.snapshot()
    record(releases, release(2), release(3))
    after = releases.table.snapshot()
    assert after.version == before.version + 2
    assert [file.rows for file in after.files.values()] == [3]
    assert not set(before.files) & set(after.files)


def test_the_same_history_again_is_written_without_harm(releases: Releases) -> None:
    record(releases, release(1), release(2))
    releases.serve(release(1).release)
    releases.serve(release(2).release)
    releases.serve(release(2).release)
    assert served(releases) == [2]
    assert [one.number for one in releases.all()] == [1, 2]


def test_others_read_the_columns_without_the_record(releases: Releases, tmp_path: Path) -> None:
    record(releases, release(1), release(2, promoted=False))
    frame = pl.scan_delta(str(tmp_path / "releases")).sort("number").collect()
    shown = frame.select("number", "serving", "promoted", "reason", "features_version").rows()
    assert shown == [(1, True, True, "better", 1), (2, False, False, "worse", 2)]
    assert frame["created"].to_list() == [release(1).created, release(2).created]


def test_a_reader_that_is_overtaken_by_a_change_and_a_vacuum_reads_the_new_history(releases: Releases) -> None:
    record(releases, release(1), release(2))
    other = Releases(releases.store)

    class Overtaken(FileTable):
        """Between the list and the file, another process serves an older release and removes the old file."""

        meanwhile = 1

        def snapshot(self, version: int | None = None) -> Snapshot:
            found = super().snapshot(version)
            if self.meanwhile:
                self.meanwhile -= 1
                other.serve(release(1).release)
                for path in found.files:
                    (self.place / path).delete()
            return found

    releases.table = Overtaken(releases.table.place, ())
    assert releases.serving().number == 1


@pytest.mark.parametrize("damage", ["gone", "truncated", "another record"])
def test_a_damaged_history_is_no_empty_one(releases: Releases, damage: str) -> None:
    record(releases, release(1))
    (file,) = (Path(releases.table.place.path) / path for path in releases.table.snapshot().files)
    if damage == "gone":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        pl.read_parquet(file).with_columns(record=pl.lit('{"release": 1}')).write_parquet(file)
    for use in (releases.all, releases.serving, lambda: releases.record(release(2), [])):
        with pytest.raises(StoreError, match=r"the release history cannot be read \(.*\); restore"):
            use()


def test_the_first_release_that_is_served_is_the_anchor_until_it_is_moved(releases: Releases) -> None:
    def anchors() -> list[int]:
        return [one.number for one in releases.all() if one.anchor]

    assert anchor_of([]) is None
    record(releases, release(1, promoted=False))
    assert anchors() == []
    record(releases, release(2), release(3, promoted=False), release(4))
    releases.serve("r00004-0123abcd")
    assert anchors() == [2]
    assert releases.anchor("r00004-0123abcd").number == 4
    record(releases, release(5))
    assert anchors() == [4]
    with pytest.raises(SettingsError, match="r00003-0123abcd was rejected; the anchor is a release that was served"):
        releases.anchor("r00003-0123abcd")
    with pytest.raises(SettingsError, match="'r9' is not in"):
        releases.anchor("r9")
    assert anchors() == [4]


def test_in_a_store_without_an_anchor_the_served_release_becomes_it(releases: Releases) -> None:
    record(releases, release(1), release(2))
    releases.rewrite([one.as_anchor(False) for one in releases.all()], releases.all())
    found = anchor_of(releases.all())
    assert found is not None
    assert found.number == 2
    record(releases, release(3))
    assert [one.number for one in releases.all() if one.anchor] == [2]
