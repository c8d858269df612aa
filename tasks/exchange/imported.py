"""Import: embeddings as other programs write them, as shards. Blocks of rows are read and written, no whole file."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import BaseModel

from schemas.errors import SettingsError, first_line

BLOCK = 16_384
NAMES_OF_CLIP = ("image_path", "key", "id")


class Imported(BaseModel):
    """What was written: shards with `id`, `embedding` and, where it is known, `subject`."""

    rows: int
    dim: int
    form: str
    files: list[str]


def import_embeddings(
    source: str,
    out: str,
    *,
    names: str | None = None,
    columns: Mapping[str, str] | None = None,
    prefix: str = "",
    shard_rows: int = 100_000,
) -> Imported:
    """Write the embeddings of a source as shards into a folder.

    The source is, by what is there:

    - a `.npy` file `[N, D]` with `names`, a text file of one name a line (InsightFace): the name is the id, and the
      folder in it, if there is one, the subject;
    - a folder with `img_emb_*.npy` and `metadata_*.parquet` in the same order (clip-retrieval, img2dataset);
    - a Parquet or CSV file with a list column, or with one column a dimension: those named `prefix` and a number.

    Args:
        source: file or folder.
        out: folder for the shards, empty or absent.
        names: see above.
        columns: role (`id`, `subject`, `embedding`) → name of the column.
        prefix: of the columns that hold one dimension each; empty for names that are numbers.
        shard_rows: rows of a shard.

    Raises:
        SettingsError: no such source, another format, numbers of rows or dimensions that differ, or no id.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise SettingsError(f"{out}: is not empty.")
    path, roles = Path(source), dict(columns or {})
    try:
        form, blocks = _open(path, names, roles, prefix)
        target.mkdir(parents=True, exist_ok=True)
        return _write(target, blocks, form, shard_rows, source)
    except FileNotFoundError as error:
        raise SettingsError(f"{error.filename or source}: there is no such file.") from error
    except (ValueError, OSError, pa.ArrowException) as error:
        raise SettingsError(f"{source}: cannot be read ({first_line(error)}).") from error


Block = tuple[list[str], list[str | None], np.ndarray]


def _open(path: Path, names: str | None, roles: dict[str, str], prefix: str) -> tuple[str, Iterator[Block]]:
    if path.is_dir():
        found = sorted(path.rglob("img_emb*.npy"), key=_number)
        if not found:
            raise SettingsError(f"{path}: holds no img_emb_*.npy; name a file, or a folder of clip-retrieval.")
        return "clip-retrieval", _clip(path, found, roles)
    if path.suffix == ".npy":
        if names is None:
            raise SettingsError(f"{path}: pass --names FILE, a text file of one name a line.")
        return "npy", _npy(path, Path(names))
    if path.suffix in (".parquet", ".pq"):
        return "parquet", _tables(path, pq.ParquetFile(path).iter_batches(batch_size=BLOCK), roles, prefix)
    if path.suffix == ".csv":
        return "csv", _tables(path, pyarrow.csv.open_csv(path), roles, prefix)
    raise SettingsError(f"{path}: must be .npy, .parquet, .csv or a folder.")


def _number(file: Path) -> tuple[int, str]:
    found = re.search(r"(\d+)$", file.stem)
    return int(found.group(1)) if found else -1, file.name


def _matrix(file: Path) -> np.ndarray:
    matrix = np.load(file, mmap_mode="r", allow_pickle=False)
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise SettingsError(f"{file}: is {matrix.dtype} {list(matrix.shape)}; floats [N, D] are needed.")
    found: np.ndarray = matrix
    return found


def _npy(path: Path, names: Path) -> Iterator[Block]:
    matrix, lines = _matrix(path), names.read_text("utf-8").splitlines()
    if len(lines) != len(matrix):
        raise SettingsError(f"{names}: has {len(lines):,} names, {path} {len(matrix):,} rows.")
    for start in range(0, len(lines), BLOCK):
        some = lines[start : start + BLOCK]
        subjects = [name.rsplit("/", 1)[0] if "/" in name else None for name in some]
        yield some, subjects, np.asarray(matrix[start : start + BLOCK], np.float32)


def _clip(folder: Path, files: list[Path], roles: Mapping[str, str]) -> Iterator[Block]:
    tables = sorted(folder.rglob("metadata*.parquet"), key=_number)
    if [_number(file)[0] for file in tables] != [_number(file)[0] for file in files]:
        raise SettingsError(f"{folder}: {len(files)} img_emb files and {len(tables)} metadata files do not match.")
    for file, described in zip(files, tables, strict=True):
        matrix, table = _matrix(file), pq.ParquetFile(described)
        if table.metadata.num_rows != len(matrix):
            raise SettingsError(f"{described}: has {table.metadata.num_rows:,} rows, {file.name} {len(matrix):,}.")
        known = table.schema_arrow.names
        name = roles.get("id") or next((one for one in NAMES_OF_CLIP if one in known), "")
        wanted = [name, *([roles["subject"]] if "subject" in roles else [])]
        _require(described, wanted, known)
        start = 0
        for batch in table.iter_batches(batch_size=BLOCK, columns=wanted):
            rows = slice(start, start + batch.num_rows)
            ids, subjects = _labels(batch, name, roles.get("subject"))
            yield ids, subjects, np.asarray(matrix[rows], np.float32)
            start += batch.num_rows


def _tables(path: Path, batches: Iterator[pa.RecordBatch], roles: Mapping[str, str], prefix: str) -> Iterator[Block]:
    for batch in batches:
        known = batch.schema.names
        name, subject = roles.get("id", "id"), roles.get("subject", "subject")
        _require(path, [name, *([subject] if "subject" in roles else [])], known)
        ids, subjects = _labels(batch, name, subject if subject in known else None)
        yield ids, subjects, _vectors(path, batch, roles.get("embedding", "embedding"), prefix)


def _vectors(path: Path, batch: pa.RecordBatch, column: str, prefix: str) -> np.ndarray:
    if column in batch.schema.names:
        found = batch.column(column)
        sizes = found.value_lengths().drop_null().unique().to_pylist() if _is_list(found.type) else []
        if len(sizes) != 1 or found.null_count:
            raise SettingsError(f"{path}: column {column} is no list of one length in every row.")
        numbers: np.ndarray = found.flatten().to_numpy(zero_copy_only=False)
        return numbers.astype(np.float32).reshape(-1, sizes[0])
    numbered = re.compile(rf"{re.escape(prefix)}(\d+)")
    of = {int(match.group(1)): name for name in batch.schema.names if (match := numbered.fullmatch(name))}
    if len(of) < 2:
        wanted = f"{prefix}0, {prefix}1 …"
        raise SettingsError(f"{path}: has no column {column!r}, nor columns {wanted}; see --prefix.")
    parts = [batch.column(of[number]).to_numpy(zero_copy_only=False) for number in sorted(of)]
    return np.stack(parts, axis=1).astype(np.float32)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _require(path: Path, wanted: list[str], known: list[str]) -> None:
    for name in wanted:
        if name not in known:
            shown = ", ".join(known[:8]) + (" …" if len(known) > 8 else "")
            raise SettingsError(f"{path}: has no column {name!r} (it has {shown}); name it with --column ROLE=NAME.")


def _labels(batch: pa.RecordBatch, name: str, subject: str | None) -> tuple[list[str], list[str | None]]:
    if batch.column(name).null_count:
        raise SettingsError(f"column {name}: has a row without an id.")
    ids = batch.column(name).cast(pa.string()).to_pylist()
    return ids, batch.column(subject).cast(pa.string()).to_pylist() if subject else [None] * len(ids)


def _write(target: Path, blocks: Iterator[Block], form: str, shard_rows: int, source: str) -> Imported:
    """Write blocks as shards of so many rows; what is refused on the way leaves none."""
    shards = _Shards(target, shard_rows)
    dim = 0
    try:
        for ids, subjects, vectors in blocks:
            _same_length(source, dim, vectors)
            dim = vectors.shape[1]
            labels = {"id": pa.array(ids, pa.string()), "subject": pa.array(subjects, pa.string())}
            lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
            shards.add(pa.table({**labels, "embedding": lists}))
        shards.close()
    except BaseException:
        shards.discard()
        raise
    if not shards.rows:
        raise SettingsError(f"{source}: holds no row.")
    return Imported(rows=shards.rows, dim=dim, form=form, files=[str(file) for file in shards.files])


def _same_length(source: str, dim: int, vectors: np.ndarray) -> None:
    if dim not in (0, vectors.shape[1]):
        raise SettingsError(f"{source}: rows have {vectors.shape[1]} and {dim} numbers.")


class _Shards:
    """Writes tables one after the other into files of `size` rows."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size, self._left = folder, size, 0
        self._writer: pq.ParquetWriter | None = None
        self.files: list[Path] = []
        self.rows = 0

    def add(self, table: pa.Table) -> None:
        """Write all rows, into new files where one is full."""
        while len(table):
            if self._writer is None:
                self.files.append(self._folder / f"part-{len(self.files):05d}.parquet")
                self._writer = pq.ParquetWriter(self.files[-1], table.schema, compression="none")
                self._left = self._size
            part = table.slice(0, self._left)
            self._writer.write_table(part)
            table = table.slice(len(part))
            self._left -= len(part)
            self.rows += len(part)
            if not self._left:
                self.close()

    def close(self) -> None:
        """Finish the file that is open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def discard(self) -> None:
        """Remove all files."""
        self.close()
        for file in self.files:
            file.unlink(missing_ok=True)
