"""Accuracy over a pairs file: given pairs in folds, the threshold of a fold chosen on the others."""

import functools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metrics.cosine import pair_scores
from metrics.folds import fold_accuracy, why_not
from metrics.verification import verify
from schemas.errors import SettingsError, StoreError, first_line
from schemas.features import digest_of
from schemas.reports import PairsResult
from storage.location import FileEntry, Location
from storage.parquet import from_parquet
from tasks.evaluation.rows import LabelledRows


@dataclass(frozen=True)
class Pairs:
    """A checked pairs file: `table` has protocol, fold, id_a, id_b and same; `digest` is of the file's bytes."""

    table: pa.Table
    digest: str


def pairs_accuracy(rows: LabelledRows, features: np.ndarray, pairs: Pairs, stored: frozenset[str]) -> list[PairsResult]:
    """Return accuracy and EER of each protocol of a pairs file.

    Args:
        rows: the rows of the population.
        features: their features in one mode, float32 `[N, D]`.
        pairs: the pairs file.
        stored: ids of all rows of the release. A pair outside the population but in here is left out. One
            that is not in here is missing: a failure to acquire.
    """
    table = pairs.table
    known = np.array(
        [
            first in stored and second in stored
            for first, second in zip(table["id_a"].to_pylist(), table["id_b"].to_pylist(), strict=True)
        ],
        bool,
    )
    place = {name: at for at, name in enumerate(rows.ids)}
    first = np.array([place.get(name, -1) for name in table["id_a"].to_pylist()], np.int64)
    second = np.array([place.get(name, -1) for name in table["id_b"].to_pylist()], np.int64)
    same = table["same"].to_numpy(zero_copy_only=False).astype(bool)
    folds = table["fold"].to_numpy().astype(np.int64)
    protocols = np.array(table["protocol"].to_pylist(), dtype=object)
    there = (first >= 0) & (second >= 0)
    copies = pc.equal(table["id_a"], table["id_b"]).to_numpy(zero_copy_only=False).astype(bool)
    copies |= there & (rows.duplicates[first] == rows.duplicates[second])
    subjects_differ = same != (rows.subjects[first] == rows.subjects[second])
    results = []
    for protocol in sorted(set(protocols.tolist())):
        of = (protocols == protocol) & ~copies
        use = of & there
        ends = np.sort(np.stack([first[use], second[use]]), axis=0)
        repeated, contradicting = _repeats(ends, same[use], subjects_differ[use])
        genuine = int(same[use].sum())
        found = PairsResult(
            protocol=protocol,
            n_pairs=int(use.sum()),
            missing=int((of & ~known).sum()),
            left_out=int((of & known & ~there).sum()),
            copies=int((copies & (protocols == protocol)).sum()),
            repeated=repeated,
            contradicting=contradicting,
            n_folds=len(np.unique(folds[use])),
            accuracy_mean=None,
            accuracy_sd=None,
            eer=None,
        )
        scores = pair_scores(features, first[use], second[use])
        metrics: dict[str, float | str | None] = {}
        if 0 < genuine < found.n_pairs:
            metrics["eer"] = verify(scores[same[use]], scores[~same[use]]).eer.value
        if reason := why_not(same[use], folds[use]):
            metrics["reason"] = f"not estimable: {reason}"
        else:
            accuracy = fold_accuracy(scores, same[use], folds[use])
            metrics |= {"accuracy_mean": accuracy.mean, "accuracy_sd": accuracy.sd}
        results.append(found.replaced(**metrics))
    return results


def _repeats(ends: np.ndarray, same: np.ndarray, subjects_differ: np.ndarray) -> tuple[int, int]:
    """Return how many pairs (ends `[2, n]`, the lower first) came before, and how many of the labels are disputed."""
    pair = np.unique(ends, axis=1, return_inverse=True)[1]
    both_ways = np.bincount(pair[same], minlength=len(pair) + 1).astype(bool) & np.bincount(
        pair[~same], minlength=len(pair) + 1
    ).astype(bool)
    repeated = len(pair) - len(np.unique(np.stack([pair, same]), axis=1).T)
    return repeated, int((both_ways[pair] | subjects_differ).sum())


def read_pairs(uri: str) -> Pairs:
    """Read a pairs file: columns protocol, fold, id_a, id_b (text or integer) and same (bool).

    A file that has not changed is read once a process.

    Raises:
        SettingsError: no such file, or a column is missing or of another type.
    """
    return _read_pairs(uri, Location(uri).entry())


@functools.lru_cache(maxsize=1)
def _read_pairs(uri: str, _: FileEntry | None) -> Pairs:
    try:
        content = Location(uri).read_bytes()
        table = from_parquet(content)
    except FileNotFoundError as error:
        raise SettingsError(f"pairs {uri}: there is no such file.") from error
    except StoreError as error:
        raise SettingsError(f"pairs: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise SettingsError(f"pairs {uri}: cannot be read as Parquet ({first_line(error, 120)}).") from error
    missing = [name for name in ("id_a", "id_b", "same") if name not in table.column_names]
    if missing:
        raise SettingsError(
            f"pairs {uri}: column {missing[0]!r} is missing; wanted protocol, fold, id_a, id_b, same, found "
            f"{', '.join(table.column_names)}."
        )
    if "protocol" not in table.column_names:
        table = table.append_column("protocol", pa.repeat(pa.scalar("pairs"), table.num_rows))
    if "fold" not in table.column_names:
        table = table.append_column("fold", pa.repeat(pa.scalar(0), table.num_rows))
    try:
        pairs = pa.table(
            {
                "protocol": table["protocol"].cast(pa.string()),
                "fold": table["fold"].cast(pa.int64()),
                "id_a": table["id_a"].cast(pa.string()),
                "id_b": table["id_b"].cast(pa.string()),
                "same": table["same"].cast(pa.bool_()),
            }
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SettingsError(
            f"pairs {uri}: {first_line(error)}; wanted text ids, an integer fold and a boolean 'same'."
        ) from error
    nulls = [name for name in pairs.column_names if pairs[name].null_count]
    if nulls:
        raise SettingsError(f"pairs {uri}: column {nulls[0]!r} has {pairs[nulls[0]].null_count} nulls; fill them in.")
    return Pairs(pairs, digest_of(content))
