"""The schemas of the store's tables, and the key of a feature file.

The name of a feature file is its key: equal names hold equal bytes, on every machine and in every run.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from schemas.errors import StoreError
from schemas.metrics import RAW

VECTOR = pa.list_(pa.field("element", pa.float32(), nullable=False))
PARTITIONS = ("mode", "shard")
VECTOR_COLUMNS = ("front", "identity", "pose_branch")
DIGEST_BYTES = 16
# Rows that are read, re-weighted and written at once. The last bit of a matrix product may depend on it, so another
# value would need another FILE_FORMAT.
BLOCK_ROWS = 4096
FILE_FORMAT = "sealed"  # the format with digests of the file itself; part of the digests in every file name
DIGESTS = "(?P<input>[0-9a-f]+)-(?P<model>[0-9a-f]+)"
_NAME = re.compile(rf"(mode=(?P<mode>[^/]+)/)?shard=(?P<shard>[^/]+)/{DIGESTS}\.parquet")


@dataclass(frozen=True)
class FeatureKey:
    """All that decides the bytes of a feature file: its mode, its shard and two digests.

    Attributes:
        mode: of the features.
        shard: a `shard_key`.
        input: digest of what the shard contributes, see `input_digest`.
        model: digest of the model and of every option that changes a feature. For mode `raw`: of what makes a row bad.
    """

    mode: str
    shard: str
    input: str
    model: str

    @property
    def path(self) -> str:
        """The path of the file in the features table."""
        return f"mode={self.mode}/{self.quarantine_path}"

    @property
    def quarantine_path(self) -> str:
        """The path, in the quarantine table, of the rows that this shard lacks; meant for a key of mode `raw`."""
        return f"shard={self.shard}/{self.input}-{self.model}.parquet"

    @classmethod
    def parse(cls, path: str) -> "FeatureKey":
        """Return the key in the path of a feature file; a path in the quarantine table gives the key of mode `raw`.

        Raises:
            StoreError: the name is not one that Frontalis gives.
        """
        found = _NAME.fullmatch(path)
        if found is None:
            raise StoreError(
                f"{path}: is not the name of a feature file; another program wrote to the table, restore it from a "
                "backup or build the store again."
            )
        return cls(found["mode"] or RAW, found["shard"], found["input"], found["model"])


def feature_schema(id_type: pa.DataType, keep: Sequence[pa.Field] = ()) -> pa.Schema:
    """Return the schema of the features table, partition columns first.

    `front`, `identity` and `pose_branch` are lists of float32 (a branch that was not asked for is null), since polars
    and DuckDB read plain lists from Delta and refuse Arrow's fixed-size ones.
    """
    return pa.schema(
        [
            pa.field("mode", pa.string()),
            pa.field("shard", pa.string()),
            pa.field("id", id_type),
            pa.field("subject", pa.string()),
            pa.field("pose", pa.string()),
            pa.field("yaw", pa.float32()),
            pa.field("pitch", pa.float32()),
            pa.field("roll", pa.float32()),
            *keep,
            *(pa.field(name, VECTOR) for name in VECTOR_COLUMNS),
        ]
    )


def file_schema(table: pa.Schema) -> pa.Schema:
    """Return the schema of one file of a partitioned table: all but the partition columns."""
    return pa.schema([field for field in table if field.name not in PARTITIONS])


QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("id", pa.string()),
        pa.field("subject", pa.string()),
        pa.field("reason", pa.string()),
    ]
)


def shard_key(name: str) -> str:
    """Return the name of a shard in the store: the given name where it is plain, else a cleaned one with a hash.

    The key is a folder name and a partition value; no name from the data becomes a path unescaped.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        return name
    cleaned = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._-")[:60]
    return f"{cleaned or 'shard'}~{digest_of(os.fsencode(name))[:10]}"


def printable(name: str) -> str:
    """Return a file name with bytes that are not UTF-8 escaped, so that it can be printed and stored."""
    return name.encode("utf-8", "backslashreplace").decode()


def digest_of(*parts: bytes) -> str:
    """Return the BLAKE2b digest (128 bit, hex) of parts, each prefixed by its length."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def input_digest(
    content: str,
    duplicates: Iterable[int] = (),
    forgotten: Iterable[str] = (),
    *,
    partitions: str = "",
    blank_subjects: bool = False,
) -> str:
    """Return the digest of what a shard contributes: its content without repeated and forgotten rows.

    Args:
        content: digest of the shard's bytes.
        duplicates: row numbers whose id was seen before, in this or an earlier shard.
        forgotten: tombstones that match a row of this shard.
        partitions: digest of the partition values; empty where the file holds all columns.
        blank_subjects: whether there is one: earlier builds took it for a name.
    """
    left_out = json.dumps([sorted(duplicates), sorted(forgotten)], separators=(",", ":"))
    beside = [partitions, "blank subjects are null" if blank_subjects else ""]
    return digest_of(content.encode(), left_out.encode(), *(part.encode() for part in beside if part))
