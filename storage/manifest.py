"""The manifest: what is known of every shard of the source, to detect changed shards without reading them.

It is a cache: a lost or damaged manifest costs one reading of the source and changes no result. It also finds repeated
ids across shards: rows whose id is that of an earlier row.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pyarrow as pa

from schemas.errors import BadShardError, FrontalisError
from schemas.features import BLOCK_ROWS, digest_of, input_digest
from schemas.settings import ColumnNames
from schemas.shards import check_shard
from storage.columns import fitted_column, known_subjects
from storage.ids import id_checks, id_keys
from storage.layout import ROW_KEYS, SHARD_RECORDS, row_keys_path
from storage.location import Location
from storage.parquet import from_parquet, to_parquet
from storage.partitions import partition_digest
from storage.shards import Shard, content_digest, read_schema, still_same, stream_blocks

NO_KEY = -1


@dataclass(frozen=True)
class ShardRecord:
    """What is known of one shard.

    `size`, `mtime_ns` and `change` only decide whether to read it again; `basis` is the digest of what the counts
    depend on beside the file (column names and tombstones), `partitions` that of the partition values, empty where
    there are none. `duplicates` and `collisions` are row numbers, `forgotten` the tombstones that match a row,
    `forgotten_rows` how many rows they remove. `blank_subjects` counts the rows whose subject is blank; it is None in a
    manifest of an earlier build, so the shard is read again.
    """

    key: str
    uri: str
    size: int
    mtime_ns: int
    change: str
    basis: str
    content: str
    rows: int
    dim: int | None
    id_type: str
    duplicates: list[int] = field(default_factory=list)
    collisions: list[int] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    forgotten_rows: int = 0
    partitions: str = ""
    blank_subjects: int | None = None

    @property
    def input_digest(self) -> str:
        """The digest of what the shard contributes."""
        return input_digest(
            self.content,
            [*self.duplicates, *self.collisions],
            self.forgotten,
            partitions=self.partitions,
            blank_subjects=bool(self.blank_subjects),
        )

    def unaccounted(self, features: int, quarantined: int) -> str | None:
        """Return a sentence with the counts if some rows are neither features nor in quarantine nor forgotten."""
        if features + quarantined + self.forgotten_rows == self.rows:
            return None
        return (
            f"of {self.rows} rows {features} became features, {quarantined} are in quarantine, "
            f"{self.forgotten_rows} are forgotten"
        )

    def describes(self, shard: Shard, basis: str) -> bool:
        """Return whether the shard is unchanged since."""
        return self.blank_subjects is not None and (
            self.uri,
            self.size,
            self.mtime_ns,
            self.change,
            self.basis,
            self.partitions,
        ) == (
            shard.uri,
            shard.size,
            shard.mtime_ns,
            shard.change,
            basis,
            partition_digest(shard.partitions),
        )


RECORD_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("key", "uri")),
        *(pa.field(name, pa.int64()) for name in ("size", "mtime_ns")),
        *(pa.field(name, pa.string()) for name in ("change", "basis", "content")),
        *(pa.field(name, pa.int64()) for name in ("rows", "dim")),
        pa.field("id_type", pa.string()),
        *(pa.field(name, pa.list_(pa.int64())) for name in ("duplicates", "collisions")),
        pa.field("forgotten", pa.list_(pa.string())),
        pa.field("forgotten_rows", pa.int64()),
        pa.field("partitions", pa.string()),
        pa.field("blank_subjects", pa.int64()),
    ]
)


@dataclass(frozen=True)
class RowKeys:
    """Key and check of every row of a shard, int64 `[rows]`; `NO_KEY` where the id is null or forgotten."""

    keys: np.ndarray
    checks: np.ndarray


Matcher = Callable[[pa.Array, pa.Array | None], tuple[np.ndarray, list[str]]]
"""Given ids and subjects, which rows are forgotten (bool `[n]`) and which tombstones matched."""


class Manifest:
    """Records by shard key, loaded from and saved to the `manifest` folder of a store."""

    def __init__(self, store: Location) -> None:
        self.store = store
        self.records: dict[str, ShardRecord] = {}

    def load(self) -> "Manifest":
        """Read the records; a missing or damaged manifest is an empty one."""
        try:
            table = from_parquet((self.store / SHARD_RECORDS).read_bytes())
            self.records = {row["key"]: ShardRecord(**row) for row in table.to_pylist()}
        except (FileNotFoundError, FrontalisError, pa.ArrowException, OSError, TypeError, KeyError):
            self.records = {}
        return self

    def save(self, records: Mapping[str, ShardRecord]) -> None:
        """Replace all records, and delete the row keys that none of them references."""
        if dict(records) == self.records:
            return
        rows = [asdict(records[key]) for key in sorted(records)]
        (self.store / SHARD_RECORDS).write_bytes(to_parquet(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)))
        self.records = dict(records)
        needed = set(self.paths())
        for file in (self.store / ROW_KEYS).files(links=False):
            if f"{ROW_KEYS}/{file.name}" not in needed:
                (self.store / ROW_KEYS / file.name).delete()

    def paths(self) -> list[str]:
        """Return the files that the records reference, relative to the store."""
        return [SHARD_RECORDS, *(_keys_path(record) for record in self.records.values())]

    def row_keys(self, record: ShardRecord) -> RowKeys | None:
        """Return the row keys of a shard, or None where they are lost."""
        try:
            table = from_parquet((self.store / _keys_path(record)).read_bytes(1 << 34))
            return RowKeys(table["key"].to_numpy(), table["check"].to_numpy())
        except (FileNotFoundError, FrontalisError, pa.ArrowException, OSError, KeyError):
            return None

    def count(self, shard: Shard, columns: ColumnNames, basis: str, forget: Matcher | None) -> ShardRecord:
        """Read a shard's bytes, its ids and subjects, and write its row keys.

        Raises:
            BadShardError: the shard does not meet the contract, or cannot be read.
        """
        content = content_digest(shard)
        arrow, rows = read_schema(shard)
        schema = check_shard(shard.key, arrow, columns)
        wanted = [columns.id] + ([columns.subject] if "subject" in schema.present else [])
        keys, checks, hits, gone, blank_subjects = [], [], set[str](), 0, 0
        for first, batch in stream_blocks(shard, wanted, BLOCK_ROWS):
            ids = fitted_column(shard.key, columns.id, batch.column(columns.id), schema.id_type, first)
            left_out = ids.is_null().to_numpy(zero_copy_only=False)
            subjects = None
            if "subject" in schema.present:
                names = batch.column(columns.subject)
                subjects, blank = known_subjects(fitted_column(shard.key, columns.subject, names, pa.string(), first))
                blank_subjects += blank
            if forget is not None:
                forgotten, matched = forget(ids, subjects)
                gone += int(forgotten.sum())
                hits.update(matched)
                left_out = left_out | forgotten
            known = ids.filter(pa.array(~left_out))
            key = np.full(len(ids), NO_KEY, np.int64)
            check = np.full(len(ids), NO_KEY, np.int64)
            key[~left_out] = id_keys(known)
            check[~left_out] = id_checks(known)
            keys.append(key)
            checks.append(check)
        record = ShardRecord(
            key=shard.key,
            uri=shard.uri,
            size=shard.size,
            mtime_ns=shard.mtime_ns,
            change=shard.change,
            basis=basis,
            content=content,
            rows=rows,
            dim=schema.dim,
            id_type=str(schema.id_type),
            forgotten=sorted(hits),
            forgotten_rows=gone,
            partitions=partition_digest(shard.partitions),
            blank_subjects=blank_subjects,
        )
        if not still_same(shard):
            raise BadShardError(f"shard {shard.key}: {shard.uri} was rewritten while it was read; run again.")
        self.write_keys(record, _concatenated(keys), _concatenated(checks))
        return record

    def write_keys(self, record: ShardRecord, keys: np.ndarray, checks: np.ndarray) -> None:
        """Write the row keys of a shard, under a name that follows from its content and basis."""
        content = to_parquet(pa.table({"key": keys, "check": checks}))
        (self.store / _keys_path(record)).write_bytes(content)


def mark_repeats(
    records: Mapping[str, ShardRecord], keys: Mapping[str, RowKeys], owned: Mapping[str, RowKeys] | None = None
) -> dict[str, ShardRecord]:
    """Return the records with `duplicates` and `collisions` set: rows whose key is that of an earlier row.

    Earlier means: in `owned`, in a shard whose key sorts before, or above in the same shard. Equal checks make a
    duplicate id, different ones a collision of two ids.

    Args:
        records: by shard.
        keys: of the rows of these shards.
        owned: of features that stay as they are, whatever the shards hold.
    """
    owned = owned or {}
    order = sorted(records)
    parts = [*owned.values(), *(keys[name] for name in order)]
    repeated = _repeated([part.keys for part in parts])
    owners: dict[int, int] = {}
    found: dict[tuple[int, bool], list[int]] = {}
    for number, part in enumerate(parts if len(repeated) else (), -len(owned)):
        at = np.flatnonzero(np.isin(part.keys, repeated))
        for row, key, check in zip(at.tolist(), part.keys[at].tolist(), part.checks[at].tolist(), strict=True):
            if key in owners:
                found.setdefault((number, check == owners[key]), []).append(row)
            else:
                owners[key] = check
    return {
        name: replace(
            records[name], duplicates=found.get((number, True), []), collisions=found.get((number, False), [])
        )
        for number, name in enumerate(order)
    }


def _repeated(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the keys that come more than once, in 8 bytes a row: few do, so only they are looked at by row."""
    keys = np.concatenate([np.empty(0, np.int64), *parts])
    keys.sort()
    again = np.unique(keys[1:][keys[1:] == keys[:-1]])
    found: np.ndarray = again[again != NO_KEY]
    return found


def find_misfits(
    records: Mapping[str, ShardRecord], columns: ColumnNames, dim: int, id_type: str | None
) -> dict[str, BadShardError]:
    """Return an error for each shard that does not fit the models or the other shards.

    Args:
        records: readable shards.
        columns: column names, for the message.
        dim: length of the embeddings that the models want.
        id_type: type of the store's ids; None for a new store, which takes what most rows have.
    """
    misfits = {
        key: BadShardError(
            f"shard {key}: column {columns.embedding!r} has {record.dim} numbers a row, the models want {dim}; pass "
            "models trained on such embeddings."
        )
        for key, record in records.items()
        if record.dim not in (None, dim)
    }
    rows = Counter[str]()
    for key, record in records.items():
        if key not in misfits:
            rows[record.id_type] += record.rows
    wanted = id_type or max(sorted(rows), key=rows.__getitem__, default=None)
    return misfits | {
        key: BadShardError(
            f"shard {key}: the ids are {record.id_type}, the store holds {wanted}; cast the column, since a store "
            "has one type of id."
        )
        for key, record in records.items()
        if key not in misfits and record.id_type != wanted
    }


def _keys_path(record: ShardRecord) -> str:
    # Two files of equal bytes may differ in their partition values, and so in their ids.
    basis = digest_of(record.basis.encode(), record.partitions.encode())[:12] if record.partitions else record.basis
    return row_keys_path(record.content, basis)


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
