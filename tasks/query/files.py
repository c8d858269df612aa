"""Answers as files: a table (`.csv`, `.parquet`) of one row a neighbour, or the document (`.json`)."""

from collections.abc import Sequence
from pathlib import PurePath

import pyarrow as pa
import pyarrow.csv

from schemas.errors import SettingsError, first_line
from storage.location import Location
from storage.parquet import to_parquet
from tasks.query.answers import Answered, QueryAnswer, QueryComparison

SUFFIXES = (".csv", ".parquet", ".json")


def check_suffix(file: str) -> None:
    """Refuse a file of another format with a SettingsError."""
    if PurePath(file).suffix.lower() not in SUFFIXES:
        raise SettingsError(f"--out {file}: must end in {', '.join(SUFFIXES)}.")


def write_answers(file: str, answers: Sequence[Answered]) -> int:
    """Write the answers in one mode or in several, and return the number of neighbours.

    Raises:
        SettingsError: another format, or a stored column that it cannot hold.
        StoreError: the file cannot be written.
    """
    check_suffix(file)
    suffix = PurePath(file).suffix.lower()
    table = pa.concat_tables([one.table() for one in answers], promote_options="permissive")
    if suffix == ".json":
        content = document(answers).model_dump_json(indent=1).encode()
    elif suffix == ".parquet":
        first = answers[0].found
        content = to_parquet(table.replace_schema_metadata({"frontalis.release": first.release}))
    else:
        sink = pa.BufferOutputStream()
        try:
            pyarrow.csv.write_csv(table, sink)
        except pa.ArrowException as error:
            raise SettingsError(f"--out {file}: {first_line(error)}; write .parquet or .json.") from error
        content = bytes(sink.getvalue())
    Location(file).write_bytes(content)
    return int(table.num_rows)


def document(answers: Sequence[Answered]) -> QueryAnswer | QueryComparison:
    """Return the document of one answer, or of the answers in several modes side by side."""
    records = [one.record() for one in answers]
    if len(records) == 1:
        return records[0]
    return QueryComparison(
        store=records[0].store, release=records[0].release, answers={one.mode: one for one in records}
    )
