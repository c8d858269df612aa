"""Open the files that a person names: settings, checkpoints, pairs, query vectors.

Only regular files are opened. A named pipe would wait for a writer, and a device may never end.
"""

import errno
import os
import stat
from io import FileIO

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFSOCK: "socket",
}


def check_regular(path: str | os.PathLike[str], mode: int) -> None:
    """Raise `OSError` unless `mode`, the `st_mode` of a path, is that of a regular file."""
    if not stat.S_ISREG(mode):
        raise OSError(
            errno.EINVAL, f"is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, not a regular file", os.fspath(path)
        )


def open_regular(path: str | os.PathLike[str]) -> FileIO:
    """Open a regular file for reading, without a buffer. Raises `OSError` at once for anything else."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(path, os.fstat(handle).st_mode)
        return FileIO(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a regular file. Raises `OSError` where it is not one or has more than `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, more than the limit of {limit:,} bytes", os.fspath(path))
        return file.readall()
