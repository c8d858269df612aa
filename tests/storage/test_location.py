"""Places: a file appears whole or not at all, errors name the place, and rewrites never go unnoticed."""

import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from schemas.errors import SettingsError, StoreError
from storage.layout import TEMPORARY
from storage.location import NOWHERE, Location, digest_file


@pytest.fixture
def place(tmp_path: Path) -> Location:
    return Location(str(tmp_path))


@pytest.fixture
def umask():
    """`umask(mask)` sets the mask of this process; put back afterwards."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("uri", ["{0}/a", "{0}/a/", "file://{0}/a"])
def test_a_folder_is_one_place_however_it_is_written(tmp_path: Path, uri: str) -> None:
    place = Location(uri.format(tmp_path))
    assert (place.uri, place.path, place.name, place.is_local) == (f"{tmp_path}/a", f"{tmp_path}/a", "a", True)
    assert (place / "b/c").uri == f"{tmp_path}/a/b/c"
    assert place.delta_options == {}


def test_home_and_working_folder_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert Location("~/store").uri == f"{tmp_path}/home/store"
    assert Location("store").uri == f"{tmp_path}/store"


def test_object_storage_takes_its_endpoint_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    place = Location("s3://bucket/prefix/")
    assert (place.uri, place.path, place.is_local) == ("s3://bucket/prefix", "bucket/prefix", False)
    assert (place / "a").uri == "s3://bucket/prefix/a"
    wanted = {"aws_conditional_put": "etag", "aws_endpoint": "http://127.0.0.1:9", "aws_allow_http": "true"}
    assert place.delta_options == wanted
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example.org")
    assert place.delta_options == {**wanted, "aws_endpoint": "https://s3.example.org", "aws_allow_http": "false"}


@pytest.mark.parametrize("uri", ["", "  ", "a\0b", "gs://bucket/x", "http://host/x"])
def test_what_is_no_place_is_refused(uri: str) -> None:
    with pytest.raises(SettingsError):
        Location(uri)


@pytest.mark.parametrize("name", ["file", "new/folder/file", "ü 😀", "a=b%20c"])
def test_what_is_written_is_read(place: Location, name: str) -> None:
    there = place / name
    assert (there.exists(), there.size(), there.entry()) == (False, None, None)
    there.write_bytes(b"first and longer")
    there.write_bytes(b"second")
    assert (there.exists(), there.size(), there.read_bytes()) == (True, 6, b"second")
    assert [entry.name for entry in place.files(hidden=True)] == [name]
    assert there.entry().size == 6
    there.delete()
    there.delete()
    assert not there.exists()


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(
    place: Location, tmp_path: Path, error: BaseException
) -> None:
    (place / "file").write_bytes(b"old")

    def fail() -> None:
        with (place / "file").writing() as file:
            file.write(b"new, but not all of it")
            file.flush()
            raise error

    with pytest.raises(StoreError if isinstance(error, OSError) else type(error)):
        fail()
    assert names(tmp_path) == ["file"]
    assert (place / "file").read_bytes() == b"old"


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(place: Location, tmp_path: Path) -> None:
    (place / "file").write_bytes(b"old")
    with (place / "file").writing() as file:
        file.write(b"new")
        file.flush()
        assert (place / "file").read_bytes() == b"old"
        beside = [name for name in names(tmp_path) if name != "file"]
        assert [name.startswith(TEMPORARY) for name in beside] == [True]
        assert place.files() == [(place / "file").entry()]
    assert (place / "file").read_bytes() == b"new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_mask_of_the_process(place: Location, umask, mask: int, mode: int) -> None:
    umask(mask)
    (place / "file").write_bytes(b"x")
    assert stat.S_IMODE(Path((place / "file").path).stat().st_mode) == mode


def test_one_of_many_writers_of_a_name_wins_whole(place: Location, tmp_path: Path) -> None:
    contents = [bytes([worker]) * 200_000 for worker in range(8)]
    threads = [threading.Thread(target=(place / "file").write_bytes, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (place / "file").read_bytes() in contents
    assert names(tmp_path) == ["file"]


def test_files_are_listed_by_name_and_hidden_ones_on_request(place: Location, tmp_path: Path) -> None:
    shown = ["a.parquet", "b/c.PQ", "b/d.txt"]
    hidden = [".a.parquet", "_b/c.parquet", "b/_log/x.parquet", f"b/{TEMPORARY}1"]
    for name in [*hidden, *reversed(shown)]:
        (place / name).write_bytes(name.encode())
    (tmp_path / "link.parquet").symlink_to(tmp_path / "a.parquet")
    (tmp_path / "dangling.parquet").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    listed = place.files(".parquet", ".pq")
    assert [entry.name for entry in listed] == ["a.parquet", "b/c.PQ", "link.parquet"]
    assert [entry.size for entry in listed] == [9, 6, 9]
    assert [entry.name for entry in place.files(hidden=True)] == sorted([*shown, *hidden, "link.parquet"])
    assert (place / "nowhere").files() == []


def test_a_whole_listing_misses_no_broken_link(place: Location, tmp_path: Path) -> None:
    (place / "a.parquet").write_bytes(b"x")
    for name in ("_hidden", "b.parquet"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    assert [(entry.name, entry.size) for entry in place.files(".parquet", whole=True)] == [
        ("a.parquet", 1),
        ("b.parquet", NOWHERE),
    ]
    os.mkfifo(tmp_path / "_pipe")
    (tmp_path / "pipe.parquet").symlink_to(tmp_path / "_pipe")  # leads somewhere, but to no file
    (tmp_path / "null").symlink_to("/dev/null")
    assert [entry.name for entry in place.files(".parquet", whole=True)] == ["a.parquet", "b.parquet"]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/disk").symlink_to(tmp_path / "nowhere")
    assert [entry.name for entry in place.files(".parquet")] == ["a.parquet"]
    with pytest.raises(StoreError, match="deep/disk: is a link whose target does not exist; mount it"):
        place.files(".parquet", whole=True)


def test_links_to_folders_are_followed(place: Location, tmp_path: Path) -> None:
    """As where a shard folder was moved to another disk; a link up the tree ends."""
    (tmp_path / "disk/deep").mkdir(parents=True)
    for name in ("source/a.parquet", "disk/b.parquet", "disk/deep/c.parquet"):
        (place / name).write_bytes(b"x")
    (tmp_path / "source/moved").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/deep/up").symlink_to(tmp_path / "disk")
    (tmp_path / "source/round").symlink_to(tmp_path / "source")
    names = ["a.parquet", "moved/b.parquet", "moved/deep/c.parquet"]
    assert [entry.name for entry in (place / "source").files()] == names


@pytest.mark.parametrize(
    ("one", "two", "overlap"),
    [
        ("a", "a", True),
        ("a", "a/store", True),
        ("a/shards", "a", True),
        ("a/x.parquet", "a", True),
        ("a", "ab", False),
        ("a/b", "a/c", False),
        ("a", "link", True),
        ("a", "link/store", True),
        ("s3://bucket/a", "s3://bucket/a/store", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket/a", "a", False),
    ],
)
def test_nested_places(tmp_path: Path, monkeypatch, one: str, two: str, overlap: bool) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    assert Location(one).overlaps(Location(two)) is overlap
    assert Location(two).overlaps(Location(one)) is overlap


@pytest.mark.parametrize("how", ["written in place", "replaced"])
def test_a_rewrite_of_equal_size_and_time_is_noticed(place: Location, tmp_path: Path, how: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    os.utime(file, ns=(1, 1))
    before = (place / "file").entry()
    if how == "replaced":
        (tmp_path / "other").write_bytes(b"new")
        (tmp_path / "other").replace(file)
    else:
        file.write_bytes(b"new")
    os.utime(file, ns=(1, 1))
    after = (place / "file").entry()
    assert (before.size, before.mtime_ns) == (after.size, after.mtime_ns) == (3, 1)
    assert before.change != after.change
    assert place.files() == [after]


def test_a_folder_is_no_file(place: Location) -> None:
    (place / "folder/file").write_bytes(b"x")
    folder = place / "folder"
    assert (folder.exists(), folder.size(), folder.entry()) == (True, None, None)
    with pytest.raises(StoreError, match="folder"):
        folder.read_bytes()
    with pytest.raises(StoreError, match="folder"):
        folder.write_bytes(b"x")
    folder.delete()
    assert not folder.exists()


def test_a_folder_that_is_a_file_is_named(place: Location) -> None:
    (place / "file").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"file/below: .*\. Nothing was published; fix that"):
        (place / "file/below").write_bytes(b"x")


def test_an_absent_file_is_not_a_failure(place: Location) -> None:
    for read in ((place / "absent").read_bytes, (place / "absent").open_input):
        with pytest.raises(FileNotFoundError):
            read()


def test_a_file_larger_than_expected_is_not_read(place: Location) -> None:
    (place / "file").write_bytes(b"12345")
    assert (place / "file").read_bytes(limit=5) == b"12345"
    with pytest.raises(StoreError, match="file: has 5 bytes, more than the 4"):
        (place / "file").read_bytes(limit=4)


def test_a_copy_is_another_name_of_the_same_bytes(place: Location, tmp_path: Path) -> None:
    (place / "source").write_bytes(b"content")
    (place / "deep/target").write_bytes(b"left over")
    (place / "source").copy_to(place / "deep/target")
    assert (tmp_path / "source").samefile(tmp_path / "deep/target")
    (place / "source").copy_to(place / "deep/target")  # the same file already
    assert names(tmp_path) == ["deep/target", "source"]
    (place / "source").write_bytes(b"another")
    assert (place / "deep/target").read_bytes() == b"content"
    with pytest.raises(FileNotFoundError):
        (place / "absent").copy_to(place / "target")
    assert names(tmp_path) == ["deep/target", "source"]


def test_a_copy_to_another_disk_is_a_copy(place: Location, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm as a second file system")
    (place / "source").write_bytes(b"content" * 1000)
    target = Location(str(memory / f"frontalis-{os.getpid()}")) / "target"
    try:
        (place / "source").copy_to(target)
        assert target.read_bytes() == b"content" * 1000
        assert names(Path(target.path).parent) == ["target"]
    finally:
        Location(str(Path(target.path).parent)).delete()


def test_digests_are_those_of_the_bytes(place: Location) -> None:
    content = os.urandom((8 << 20) + 17)  # more than one piece
    (place / "file").write_bytes(content)
    assert digest_file(place / "file", hashlib.sha256) == hashlib.sha256(content).hexdigest()
