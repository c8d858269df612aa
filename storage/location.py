"""One object for every path: a local folder or an `s3://` prefix, with atomic writes.

Users give URIs; code passes `Location` objects. Object storage takes its endpoint and credentials from the usual
environment variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID …). The paths of a store are `storage.layout`.
"""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import fs as pafs

from schemas.errors import SettingsError, StoreError, first_line
from schemas.files import check_regular
from storage.layout import temporary_name

NOWHERE = -1  # the size of a link whose target does not exist


@dataclass(frozen=True)
class FileEntry:
    """A file found by `Location.files`: `name` is relative to the location, `change` differs after every rewrite."""

    name: str
    size: int
    mtime_ns: int
    change: str


class Location:
    """A folder, local or on S3. `place / "a/b"` goes down; all operations name the URI in their errors.

    Raises:
        SettingsError: the scheme is neither a plain path, `file://` nor `s3://`.
    """

    def __init__(self, uri: str) -> None:
        if "\0" in uri or not uri.strip():
            raise SettingsError(f"{uri!r} is no path; give a folder or s3://bucket/prefix.")
        scheme, _, rest = uri.partition("://")
        if not _:
            scheme, rest = "file", os.path.expanduser(uri)  # noqa: PTH111 - leaves an unknown user's home
        if scheme == "file":
            self.fs: pafs.FileSystem = pafs.LocalFileSystem()
            self.path = str(Path(rest).absolute())
            self.uri = self.path
        elif scheme == "s3":
            self.fs = _s3()
            self.path = rest.rstrip("/")
            self.uri = f"s3://{self.path}"
        else:
            raise SettingsError(f"{uri}: scheme {scheme!r} is not supported; use a local path or s3://…")
        self.is_local = scheme == "file"

    def __truediv__(self, name: str) -> "Location":
        return self._at(f"{self.path}/{name}")

    def _at(self, path: str) -> "Location":
        other = object.__new__(Location)
        other.fs, other.is_local, other.path = self.fs, self.is_local, path
        other.uri = path if self.is_local else f"s3://{path}"
        return other

    def __repr__(self) -> str:
        return f"Location({self.uri!r})"

    @property
    def name(self) -> str:
        """The last step of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parents(self) -> list["Location"]:
        """The folders above, the nearest first, links resolved; neither `/` nor what is above a bucket."""
        path = os.path.realpath(self.path) if self.is_local else self.path
        return [self._at(str(above)) for above in Path(path).parents if above.name]

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        with self._naming():
            return bool(self.fs.get_file_info(self.path).type != pafs.FileType.NotFound)

    def size(self) -> int | None:
        """Return the size of the file in bytes, or None where there is no file."""
        with self._naming():
            info = self.fs.get_file_info(self.path)
        return int(info.size) if info.type == pafs.FileType.File else None

    def entry(self) -> FileEntry | None:
        """Return the file itself as `files` would list it, or None where there is no file."""
        if self.is_local:
            with self._naming():
                try:
                    found = os.stat(self.path)  # noqa: PTH116 - beside os.scandir
                except FileNotFoundError:
                    return None
            return _local_entry(self.name, found) if stat.S_ISREG(found.st_mode) else None
        with self._naming():
            info = self.fs.get_file_info(self.path)
        if info.type != pafs.FileType.File:
            return None
        return FileEntry(self.name, info.size, info.mtime_ns or 0, self.etag())

    def files(self, *suffixes: str, hidden: bool = False, whole: bool = False, links: bool = True) -> list[FileEntry]:
        """List all files below, sorted by name; nothing where the folder is absent.

        Links to folders are followed, except for a link to a folder that contains it: its files are listed there.

        Args:
            suffixes: keep names that end so (case-insensitive); none keeps all.
            hidden: also those below a folder, or of a name, that starts with `.` or `_`.
            whole: refuse to miss the files of an unmounted disk. A broken link is listed with the size `NOWHERE` where
                its name has a wanted suffix; any other broken link may stand for a folder, and is refused.
            links: follow links. Without, no link below is listed or followed: it may lead to files of another program.

        Raises:
            StoreError: a folder cannot be read, or such a link was found.
        """
        return self.select(self.walk(links), *suffixes, hidden=hidden, whole=whole)

    def walk(self, links: bool = True) -> list[FileEntry]:
        """List all files below in no order, hidden ones and broken links included. Raises StoreError."""
        with self._naming():
            return list(self._walk(links))

    def select(
        self, entries: Iterable[FileEntry], *suffixes: str, hidden: bool = False, whole: bool = False
    ) -> list[FileEntry]:
        """Return those of `walk` that `files` lists."""
        kept = []
        for entry in entries:
            if not hidden and any(step[:1] in "._" for step in entry.name.split("/")):
                continue
            wanted = not suffixes or entry.name.lower().endswith(suffixes)
            if entry.size == NOWHERE and not whole:
                continue
            if entry.size == NOWHERE and not wanted:
                raise StoreError(
                    f"{self.uri}/{entry.name}: is a link whose target does not exist; mount it, or remove the link."
                )
            if not wanted:
                continue
            kept.append(entry)
        return sorted(kept, key=lambda entry: entry.name)

    def open_input(self) -> pa.NativeFile:
        """Open the file for random access. Raises FileNotFoundError, or StoreError where it is no regular file."""
        with self._naming():
            if self.is_local:
                check_regular(self.path, os.stat(self.path).st_mode)  # noqa: PTH116 - beside os.scandir
            return self.fs.open_input_file(self.path)

    def read_bytes(self, limit: int = 1 << 30) -> bytes:
        """Return the content of a small file. Raises StoreError where it is larger than `limit` bytes."""
        with self.open_input() as file:
            if file.size() > limit:
                raise StoreError(f"{self.uri}: has {file.size()} bytes, more than the {limit} that are read at once.")
            return bytes(file.read())

    @contextlib.contextmanager
    def writing(self) -> Iterator[Any]:
        """Open a file for writing that appears under its name complete, or not at all.

        Locally: a temporary name beside it, fsync, rename, fsync of the folder. On S3: gathered in the temporary folder
        (TMPDIR), which needs room for all of it, then one upload.
        """
        if self.is_local:
            with self._naming():
                yield from self._write_local()
            return
        with tempfile.TemporaryFile() as spool:
            with self._naming(f" while it was gathered in {tempfile.gettempdir()} (TMPDIR)"):
                yield spool
                spool.flush()
            # One call of compiled code, which no signal leaves half-way: closing a stream, as unwinding does, completes
            # an upload with whatever has arrived.
            with self._naming():
                pafs.copy_files(
                    f"/dev/fd/{spool.fileno()}",
                    self.path,
                    source_filesystem=pafs.LocalFileSystem(),
                    destination_filesystem=self.fs,
                    chunk_size=8 << 20,
                )

    def write_bytes(self, content: bytes) -> None:
        """Write a whole file atomically."""
        with self.writing() as file:
            file.write(content)

    def copy_to(self, target: "Location") -> None:
        """Copy a file atomically: a hard link where both are local and the file system has such links."""
        if self.is_local and target.is_local and target._link(self.path):
            return
        with self.open_input() as source, target.writing() as file:
            shutil.copyfileobj(source, file, 8 << 20)

    def delete(self) -> None:
        """Delete a file, or a folder with all below it; nothing where it is absent. Of a link only the link goes."""
        with self._naming():
            if self.is_local and os.path.islink(self.path):  # noqa: PTH114 - beside os.stat
                Path(self.path).unlink()
                return
            info = self.fs.get_file_info(self.path)
            if info.type == pafs.FileType.File:
                self.fs.delete_file(self.path)
            elif info.type == pafs.FileType.Directory:
                self.fs.delete_dir(self.path)

    def sync(self) -> None:
        """Put a local file, or the names in a local folder, on the disk; nothing where it is absent, or on S3."""
        if self.is_local:
            with self._naming(), contextlib.suppress(FileNotFoundError):
                _sync(Path(self.path))

    def overlaps(self, other: "Location") -> bool:
        """Return whether one of the two locations is the other, or inside it; links are followed."""
        if self.is_local != other.is_local:
            return False
        one, two = (
            (os.path.realpath(place.path) if place.is_local else place.path).rstrip("/") + "/"
            for place in (self, other)
        )
        return one.startswith(two) or two.startswith(one)

    @property
    def delta_options(self) -> dict[str, str]:
        """Storage options for Delta: on S3 commits are conditional puts, so that two writers cannot both win."""
        if self.is_local:
            return {}
        options = {"aws_conditional_put": "etag"}
        endpoint = _endpoint()
        if endpoint:
            options |= {
                "aws_endpoint": endpoint,
                "aws_allow_http": "true" if endpoint.startswith("http://") else "false",
            }
        return options

    def _walk(self, links: bool) -> Iterator[FileEntry]:
        if self.is_local:
            yield from self._walk_local(links)
            return
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        for info in self.fs.get_file_info(selector):
            if info.type == pafs.FileType.File:
                yield FileEntry(info.path[len(self.path) + 1 :], info.size, info.mtime_ns or 0, "")

    def _walk_local(self, links: bool) -> Iterator[FileEntry]:
        # os.scandir gives ctime and inode, which a rewrite with the same size and mtime cannot keep.
        stack: list[tuple[Path, frozenset[tuple[int, int]]]] = [(Path(self.path), frozenset())]
        root = len(self.path) + 1
        while stack:
            folder, above = stack.pop()
            try:
                itself = folder.stat()
                children = list(os.scandir(folder))
            except FileNotFoundError:
                continue
            if (itself.st_dev, itself.st_ino) in above:
                continue
            below = above | {(itself.st_dev, itself.st_ino)}
            for child in children:
                if not links and child.is_symlink():
                    continue
                if child.is_dir():
                    stack.append((Path(child.path), below))
                elif child.is_file():
                    yield _local_entry(child.path[root:], child.stat())
                elif child.is_symlink() and not Path(child.path).exists():
                    yield FileEntry(child.path[root:], NOWHERE, 0, "")

    def etag(self) -> str:
        """Return what object storage says of the content (its ETag); empty for local files."""
        if self.is_local:
            return ""
        with self._naming(), self.fs.open_input_stream(self.path) as stream:
            metadata = stream.metadata() or {}
        return bytes(metadata.get(b"ETag", b"")).decode()

    def _link(self, source: str) -> bool:
        """Make the file another name of `source`; return False where that cannot be (another disk, no hard links)."""
        with self._naming():
            target, temporary = self._beside()
            try:
                os.link(source, temporary)  # a link cannot replace a file, the rename below can
            except OSError:
                return False
            temporary.replace(target)
            temporary.unlink(missing_ok=True)  # renaming one link of a file over another leaves both
            _sync(target.parent)
        return True

    def _write_local(self) -> Iterator[BinaryIO]:
        target, temporary = self._beside()
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(target.parent)

    def _beside(self) -> tuple[Path, Path]:
        """Return the file's path and a temporary one in the same folder, which is made."""
        target = Path(self.path)
        make_folder(target.parent)
        return target, target.parent / temporary_name()

    @contextlib.contextmanager
    def _naming(self, where: str = "") -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(
                f"{self.uri}: {first_line(error)}{where}. Nothing was published; fix that, then run again."
            ) from error


def _local_entry(name: str, found: os.stat_result) -> FileEntry:
    return FileEntry(name, found.st_size, found.st_mtime_ns, f"{found.st_ctime_ns}-{found.st_ino}")


def digest_file(place: Location, new: Callable[[], Any]) -> str:
    """Return the hex digest of a file's bytes, read in pieces. `new` makes a hashlib object."""
    state = new()
    with place.open_input() as file:
        while piece := file.read(8 << 20):
            state.update(piece)
    return str(state.hexdigest())


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _s3() -> pafs.FileSystem:
    options: dict[str, Any] = {}
    endpoint = _endpoint()
    if endpoint:
        parts = urllib.parse.urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    return pafs.S3FileSystem(**options)


def make_folder(folder: Path) -> None:
    """Make a local folder and those above it; their names are on the disk before anything is written into them."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)  # several workers may make it at once
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
