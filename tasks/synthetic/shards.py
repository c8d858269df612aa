"""Synthetic shards: the input contract filled with embeddings that behave like measured ones, and bad rows on request.

For demonstrations, benchmarks and tests, which must not hold real faces. `tasks.synthetic.population` draws the
embeddings; here subjects are spread over Parquet files.
"""

from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import SettingsError
from storage.location import Location
from tasks.synthetic.population import SyntheticPopulation

ROW_GROUP = 8192
BLOCK_ROWS = 256  # computed at once: work arrays of 512 numbers a row stay in the cache
AHEAD = 8  # blocks computed before they are written
FRONTAL_OF_14, PROFILE_OF_14 = 10, 4  # as in CFP


class Defect(Enum):
    """What is wrong with a planted row."""

    NOT_FINITE = auto()
    ZERO = auto()
    NULL_EMBEDDING = auto()
    NULL_ID = auto()
    ID_OF_THIS_SHARD = auto()
    ID_OF_EARLIER_SHARD = auto()


@dataclass(frozen=True)
class Synthesized:
    """What was written: all rows, the bad ones among them, and the URIs of the shards."""

    rows: int
    bad_rows: int
    files: list[str]


def synthesize(
    out_dir: str | Path,
    *,
    subjects: int = 500,
    per_subject: int = 14,
    dim: int = 512,
    shards: int = 8,
    seed: int = 0,
    bad_rows: int = 0,
    population_seed: int = 0,
) -> Synthesized:
    """Write `part-000.parquet` … with `subjects` × `per_subject` photographs; two sevenths of them are profiles.

    A subject is drawn from (`seed`, its number) alone and is in one shard, so neither the number of shards nor bad
    rows change an embedding. What all subjects have in common follows from `population_seed` and `dim`, so a network
    trained on one seed can be used on another. Shards are uncompressed and appear whole or not at all. Equal arguments
    give equal bytes. Nothing is overwritten.

    Args:
        out_dir: folder or `s3://…`, empty or absent.
        subjects: at least as many as `shards`.
        per_subject: photographs of each.
        dim: numbers in an embedding, at least 2.
        shards: files.
        seed: of the subjects.
        bad_rows: added to the others, of the kinds in `Defect` in turn; each must be found bad, and no other row.
            An id is repeated only behind the row that has it first, in the order of shards and rows.
        population_seed: seed of what all subjects have in common.

    Raises:
        SettingsError: a number is out of range, or the folder is not empty.
    """
    _check(subjects, per_subject, dim, shards, seed, bad_rows, population_seed)
    folder = Location(str(out_dir))
    places = [folder / f"part-{shard:03d}.parquet" for shard in range(shards)]
    _refuse_files(folder)
    edges = [shard * subjects // shards for shard in range(shards + 1)]
    drawn = _Subjects(SyntheticPopulation.draw(dim, population_seed), per_subject, seed, _plant(bad_rows, edges, seed))
    with closing(drawn.rows(subjects)) as rows:
        for place, first, last in zip(places, edges[:-1], edges[1:], strict=True):
            with place.writing() as file:
                _write(file, drawn.schema, islice(rows, last - first))
    return Synthesized(subjects * per_subject + bad_rows, bad_rows, [place.uri for place in places])


def _check(
    subjects: int, per_subject: int, dim: int, shards: int, seed: int, bad_rows: int, population_seed: int
) -> None:
    least = {"per_subject": (per_subject, 1), "dim": (dim, 2), "shards": (shards, 1), "bad_rows": (bad_rows, 0)}
    least |= {"seed": (seed, 0), "population_seed": (population_seed, 0)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise SettingsError(f"{name} is {value}; choose at least {minimum}")
    if subjects < shards:
        raise SettingsError(f"{subjects} subjects cannot fill {shards} shards; choose more subjects or fewer shards")


def _refuse_files(folder: Location) -> None:
    found = folder.files(hidden=True) if folder.exists() else []
    if found:
        raise SettingsError(
            f"{folder.uri} is not empty: it holds {found[0].name}. Real shards could be overwritten or read together "
            "with the new ones; choose an empty folder."
        )


def _plant(bad_rows: int, edges: list[int], seed: int) -> dict[int, list[tuple[Defect, int]]]:
    """Return, for a subject, the bad rows to follow its own: the defect, and the subject whose id is repeated."""
    planted = defaultdict(list)
    numbers = np.random.default_rng([seed, edges[-1], bad_rows])
    for number in range(bad_rows):
        defect = list(Defect)[number % len(Defect)]
        first = edges[1] if len(edges) > 2 and defect is Defect.ID_OF_EARLIER_SHARD else 0
        subject = int(numbers.integers(first, edges[-1]))
        earlier = subject
        if first:
            own_shard = max(edge for edge in edges if edge <= subject)
            earlier = int(numbers.integers(0, own_shard))
        planted[subject].append((defect, earlier))
    return planted


def _write(file: Any, schema: pa.Schema, subjects: Iterable[list[pa.RecordBatch]]) -> None:
    """Write the rows of some subjects as one Parquet file."""
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False, write_statistics=False) as parquet:
        waiting: list[pa.RecordBatch] = []
        rows = 0
        for batches in subjects:
            waiting += batches
            rows += sum(map(len, batches))
            if rows >= ROW_GROUP:
                table = pa.Table.from_batches(waiting)
                parquet.write_table(table.slice(0, ROW_GROUP), row_group_size=ROW_GROUP)
                waiting = table.slice(ROW_GROUP).to_batches()
                rows -= ROW_GROUP
        if waiting:
            parquet.write_table(pa.Table.from_batches(waiting), row_group_size=ROW_GROUP)


@dataclass(frozen=True)
class _Subjects:
    population: SyntheticPopulation
    per_subject: int
    seed: int
    planted: dict[int, list[tuple[Defect, int]]]

    @property
    def schema(self) -> pa.Schema:
        dim = self.population.basis.shape[1]
        return pa.schema(
            [
                ("id", pa.string()),
                ("subject", pa.string()),
                ("pose", pa.string()),
                ("yaw", pa.float32()),
                ("pitch", pa.float32()),
                ("embedding", pa.list_(pa.float32(), dim)),
            ]
        )

    def rows(self, subjects: int) -> Generator[list[pa.RecordBatch]]:
        """Yield the rows of each subject in turn: its photographs, then the bad rows planted behind them.

        Whole blocks of the same size are computed, whatever is wanted of them: so a product has the same shape, and its
        last bits are the same, whatever the number of subjects and shards.
        """
        step = max(1, BLOCK_ROWS // self.per_subject)
        with ThreadPoolExecutor() as pool:
            starts = iter(range(0, subjects, step))
            blocks = deque(pool.submit(self._block, first, step) for first in islice(starts, AHEAD))
            for first in range(0, subjects, step):
                block = blocks.popleft().result()
                blocks.extend(pool.submit(self._block, later, step) for later in islice(starts, 1))
                for subject in range(first, min(first + step, subjects)):
                    rows = block.slice((subject - first) * self.per_subject, self.per_subject)
                    yield [rows, *self._bad_rows(subject, rows)]

    def _block(self, first: int, count: int) -> pa.RecordBatch:
        """Return the photographs of `count` subjects."""
        profile = round(self.per_subject * PROFILE_OF_14 / (FRONTAL_OF_14 + PROFILE_OF_14))
        frontal = self.per_subject - profile
        subjects = range(first, first + count)
        generators = [np.random.default_rng([self.seed, subject]) for subject in subjects]
        photographs = self.population.photograph(generators, frontal, profile)
        numbers = range(self.per_subject)
        return pa.record_batch(
            [
                pa.array([_id(subject, number) for subject in subjects for number in numbers]),
                pa.array([f"subject-{subject:06d}" for subject in subjects for _ in numbers]),
                pa.array((["frontal"] * frontal + ["profile"] * profile) * count),
                pa.array(photographs.yaw.astype(np.float32)),
                pa.array(photographs.pitch.astype(np.float32)),
                _embeddings(photographs.embedding),
            ],
            schema=self.schema,
        )

    def _bad_rows(self, subject: int, rows: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Yield the bad rows planted behind a subject, made from its own."""
        for number, (defect, earlier) in enumerate(self.planted.get(subject, [])):
            original = number % self.per_subject
            row = rows.slice(original, 1)
            row_id: str | None = f"{_id(subject, original)}-bad-{number}"
            embedding = row.column("embedding").flatten().to_numpy()[None].copy()
            match defect:
                case Defect.NOT_FINITE:
                    embedding[0, number % embedding.shape[1]] = np.nan
                case Defect.ZERO:
                    embedding[:] = 0
                case Defect.NULL_ID:
                    row_id = None
                case Defect.ID_OF_THIS_SHARD | Defect.ID_OF_EARLIER_SHARD:
                    row_id = _id(earlier, original)
            row = row.set_column(0, "id", pa.array([row_id], pa.string()))
            null = pa.nulls(1, self.schema.field("embedding").type)
            yield row.set_column(5, "embedding", null if defect is Defect.NULL_EMBEDDING else _embeddings(embedding))


def _id(subject: int, number: int) -> str:
    return f"{subject:06d}-{number:03d}"


def _embeddings(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
