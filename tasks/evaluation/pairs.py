"""Accuracy over a pairs file: given pairs in folds, the threshold of a fold chosen on the others."""

import functools
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metrics.cosine import pair_scores
from metrics.folds import fold_accuracy, why_not
from metrics.verification import verify
from schemas.errors import SettingsError, StoreError, clipped, first_line
from schemas.features import digest_of
from schemas.identity import normal_texts, parse_id
from schemas.reports import PairsResult
from storage.location import FileEntry, Location
from storage.parquet import from_parquet
from tasks.evaluation.rows import LabelledRows


@dataclass(frozen=True)
class Pairs:
    """A checked pairs file: `table` has protocol, fold, id_a, id_b and same; `digest` is of the file's bytes."""

    uri: str
    table: pa.Table
    digest: str

    def as_stored(self, stored: pa.ChunkedArray) -> "Pairs":
        """Return the pairs with each id as the release spells it: exactly so, else one that is equal when normalised.

        Args:
            stored: ids of all rows of the release, text or integer. An id that is not among them stays as it is.

        Raises:
            SettingsError: an id has no usual form, or several stored ones are equal to it when normalised.
        """
        integer = pa.types.is_integer(stored.type)
        texts = stored.cast(pa.string())
        used = pc.unique(pa.chunked_array([*self.table["id_a"].chunks, *self.table["id_b"].chunks], pa.string()))
        names = {}
        for name in used.filter(pc.invert(pc.is_in(used, value_set=texts))).to_pylist():
            names[name] = str(parse_id(name, integer=integer, shown=f"pairs {self.uri}: id {clipped(name)}"))
        if integer or not names:
            return self
        normal = normal_texts(texts)
        same = pc.is_in(normal, value_set=pa.array(list(names.values()), pa.string()))
        spelled: dict[str, list[str]] = {}
        for name, spelling in zip(normal.filter(same).to_pylist(), texts.filter(same).to_pylist(), strict=True):
            spelled.setdefault(name, []).append(spelling)
        for typed, name in names.items():
            found = spelled.get(name, [typed])
            if len(found) > 1:
                raise SettingsError(
                    f"pairs {self.uri}: id {clipped(typed)}: {len(found)} stored ids differ from it only in blanks or "
                    "in how characters are composed; write one of them exactly."
                )
            names[typed] = found[0]
        table = self.table
        for column in ("id_a", "id_b"):
            ids = pa.array([names.get(name, name) for name in table[column].to_pylist()], pa.string())
            table = table.set_column(table.schema.get_field_index(column), column, ids)
        return replace(self, table=table)


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
    return Pairs(uri, pairs, digest_of(content))
