"""The reason of a bad shard, in the releases and the report, names the row and never a person."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

N = 12
NAME = "Anna Schmidt"


def shard(prefix: str, **columns: object) -> pa.Table:
    vectors = np.random.default_rng([*prefix.encode()]).standard_normal((N, 32)).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), 32)
    plain = {"id": ids(prefix), "embedding": embedding, "subject": ["s"] * N, "note": range(N)}
    return pa.table({**plain, **columns})


def ids(prefix: str) -> list[str]:
    return [f"{prefix}-{row}" for row in range(N)]


def with_name(words: list[str], ending: bytes = b"") -> pa.Array:
    """Words of which the sixth is a name; with an ending that is no UTF-8, still said to be text."""
    content = [word.encode() for word in words]
    content[5] = NAME.encode() + ending
    return pa.array(content, pa.binary()).view(pa.string())


DAMAGED = {
    "id": (
        {"id": with_name(ids("odd"), b"\xff")},
        "column 'id' is string and does not fit the string of the store .row 5 holds 13 bytes that are no UTF-8.; cast",
    ),
    "subject": (
        {"subject": with_name(["s"] * N, b"\xff").dictionary_encode()},
        "column 'subject' is dictionary.* does not fit the string of the store .row 5 holds 13 bytes that are no UTF-8",
    ),
    "kept text among numbers": (
        {"note": with_name([str(row) for row in range(N)])},
        "column 'note' is string and does not fit the int64 of the store .row 5 holds 12 bytes that are no int64",
    ),
    "kept fractions among integers": (
        {"note": pa.array([float(row) + 0.5 for row in range(N)])},
        "column 'note' is double and does not fit the int64 of the store .row 0 holds a double that cannot be cast",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_no_reason_quotes_a_person(name: str, tmp_path: Path, run_stages, pipeline_of) -> None:
    columns, says = DAMAGED[name]
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(shard("good"), source / "good.parquet")
    pq.write_table(shard("odd", **columns), source / "odd.parquet")
    data = run_stages(pipeline_of(source, tmp_path / "store", columns={"keep": ["note"]})).published.data
    [fault] = data.bad_shards
    assert re.search(says, fault.reason), fault.reason
    said = data.model_dump_json()
    assert not any(word in said for word in (*NAME.split(), "odd-"))
