"""Export: the features of a release as files that other programs read. Only an index is held whole in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from schemas.errors import SettingsError, StoreError
from storage.features import features_table, matrix_of, read_rows
from storage.location import Location
from storage.releases import Releases

Form = Literal["npy", "lists", "faiss", "scores"]
COLUMNS = ("id", "subject", "pose", "yaw", "pitch", "roll")
SCORED_ROWS = 2_000  # give two million pairs


class Exported(BaseModel):
    """What was written: the files, and the number of rows in them or, of scores, of pairs."""

    release: str
    mode: str
    rows: int
    dim: int
    files: list[str]


def export(store: str, mode: str, form: Form, out: str, release: str | None = None) -> Exported:
    """Write the features of one mode of a release into a folder.

    Args:
        store: local path or s3://…
        mode: of the features; `raw` is the embeddings as they came in.
        form: `npy`: `vectors.npy`, float32 `[N, D]`, and `rows.parquet`, which names them in the same order. `lists`:
            `vectors.parquet` with a fixed-size list per row (LanceDB, Hugging Face datasets). `faiss`: `index.faiss`,
            an exact inner-product index of the L2-normalised features, with `rows.parquet`. `scores`: cosine of all
            pairs of at most `SCORED_ROWS` labelled rows: `scores-4col.txt` (bob.measure), `genuine.txt` and
            `impostor.txt` (pyeer).
        out: folder, empty or absent.
        release: by name; None takes the one that is served.

    Raises:
        SettingsError: no such store, release or mode; the folder is not empty; fewer than two labelled rows to score.
        StoreError: nothing is served yet, or a file is damaged.
    """
    place = Location(store)
    history = Releases.of(place)
    record = history.serving() if release is None else history.servable(release)
    if mode not in record.indexes:
        raise SettingsError(f"mode {mode}: release {record.release} has {', '.join(record.indexes)}.")
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"--out {out}: is not empty.")
    folder.mkdir(parents=True, exist_ok=True)
    table = features_table(place)
    snapshot = table.snapshot(record.features_version)
    files = sorted(snapshot.of_mode(mode), key=lambda file: file.shard)
    rows, dim = sum(file.rows for file in files), record.indexes[mode].dim

    def batches() -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        for file in files:
            for batch in read_rows(table, file, [*COLUMNS, "front"]):
                vectors = matrix_of(batch.column("front"), f"mode {mode}")
                if vectors.shape[1] != dim:
                    raise StoreError(f"{file.path}: features have {vectors.shape[1]} numbers, the release {dim}.")
                yield batch.drop_columns(["front"]), vectors

    if form == "npy":
        written = _npy(folder, batches(), rows, dim)
    elif form == "lists":
        written = _lists(folder, batches())
    elif form == "faiss":
        written = _faiss(folder, batches(), dim)
    else:
        rows, written = _scores(folder, batches(), dim)
    return Exported(
        release=record.release, mode=mode, rows=rows, dim=dim, files=[str(folder / name) for name in written]
    )


Batches = Iterator[tuple[pa.RecordBatch, np.ndarray]]


def _npy(folder: Path, batches: Batches, rows: int, dim: int) -> list[str]:
    target = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.dtype("<f4"), (rows, dim))
    start, names = 0, []
    for batch, vectors in batches:
        target[start : start + len(vectors)] = vectors
        start += len(vectors)
        names.append(batch)
    target.flush()
    pq.write_table(pa.Table.from_batches(names), folder / "rows.parquet")
    return ["vectors.npy", "rows.parquet"]


def _lists(folder: Path, batches: Batches) -> list[str]:
    writer = None
    for batch, vectors in batches:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        table = pa.Table.from_batches([batch]).append_column("embedding", column)
        writer = writer or pq.ParquetWriter(folder / "vectors.parquet", table.schema, compression="none")
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return ["vectors.parquet"]


def _faiss(folder: Path, batches: Batches, dim: int) -> list[str]:
    index, names = faiss.IndexFlatIP(dim), []
    for batch, vectors in batches:
        index.add(_normalised(vectors))
        names.append(batch)
    faiss.write_index(index, str(folder / "index.faiss"))
    pq.write_table(pa.Table.from_batches(names), folder / "rows.parquet")
    return ["index.faiss", "rows.parquet"]


def _scores(folder: Path, batches: Batches, dim: int) -> tuple[int, list[str]]:
    ids: list[str] = []
    subjects: list[str] = []
    kept = [np.empty((0, dim), np.float32)]
    for batch, vectors in batches:
        labelled = np.flatnonzero(batch.column("subject").is_valid().to_numpy(zero_copy_only=False))
        labelled = labelled[: SCORED_ROWS - len(ids)]
        kept.append(_normalised(vectors[labelled]))
        ids += [str(one).replace(" ", "_") for one in batch.column("id").take(labelled).to_pylist()]
        subjects += [str(one).replace(" ", "_") for one in batch.column("subject").take(labelled).to_pylist()]
    if len(ids) < 2:
        raise SettingsError("scores: fewer than two rows have a subject, so there is no pair.")
    matrix, names = np.concatenate(kept), np.array(subjects)
    with (
        (folder / "scores-4col.txt").open("w") as columns,
        (folder / "genuine.txt").open("w") as genuine,
        (folder / "impostor.txt").open("w") as impostor,
    ):
        for row in range(len(ids) - 1):
            scores = matrix[row + 1 :] @ matrix[row]
            same = names[row + 1 :] == names[row]
            columns.writelines(
                f"{subjects[row]} {subjects[at]} {ids[at]} {score:.7f}\n" for at, score in enumerate(scores, row + 1)
            )
            genuine.writelines(f"{score:.7f}\n" for score in scores[same])
            impostor.writelines(f"{score:.7f}\n" for score in scores[~same])
    return len(ids) * (len(ids) - 1) // 2, ["scores-4col.txt", "genuine.txt", "impostor.txt"]


def _normalised(vectors: np.ndarray) -> np.ndarray:
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return found.astype(np.float32)
