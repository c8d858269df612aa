"""The audit log: who asked for which ids, one JSON object a line. It is off unless a file is named."""

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime

from schemas.errors import SettingsError, StoreError


class Audit:
    """A file that is only appended to, and opened for each line, so that it can be rotated.

    Raises:
        SettingsError: the file cannot be written.
    """

    def __init__(self, file: str | None) -> None:
        self._file = file
        if file is not None:
            try:
                os.close(self._open(file))
            except OSError as error:
                raise SettingsError(f"--audit {file}: cannot be written ({error.strerror}).") from error

    def write(
        self, client: str, release: str, modes: Sequence[str], ids: Sequence[str | int], vectors: int, where: str | None
    ) -> None:
        """Log one request: the ids that it names, how many vectors it brings, and its condition.

        Raises:
            StoreError: the line cannot be written; the request is not answered then.
        """
        if self._file is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "client": client,
            "release": release,
            "modes": list(modes),
            "ids": list(ids),
            "vectors": vectors,
            "where": where,
        }
        content = json.dumps(line).encode() + b"\n"
        try:
            file = self._open(self._file)
            try:
                written = os.write(file, content)
            finally:
                os.close(file)
        except OSError as error:
            raise StoreError(f"the audit log cannot be written ({error.strerror}); nothing is answered.") from error
        if written != len(content):
            raise StoreError("the audit log cannot be written (the disk is full); nothing is answered.")

    @staticmethod
    def _open(file: str) -> int:
        return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
