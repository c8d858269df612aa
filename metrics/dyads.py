"""Count the false matches of every pair of subjects (a *dyad*) at a few thresholds, which are edges of coarse bins.

`variance` needs them beside the scores of each subject, which `pair_counts` counts. Where there are very many pairs, a
part of the dyads is counted, every subject in as many as any other.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from metrics.cosine import shift_to_grid
from metrics.pair_counts import Rows

MOST_PAIRS = 64_000_000  # of rows; beyond, dyads are sampled: half a second of work, where all pairs take seconds
_TILE = (512, 2048)
_GROUP_SEED = 19795
Classes = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Dyads:
    """False matches of pairs of clusters at some thresholds, in one cell.

    `row` maps a threshold, the number of an edge of the coarse bins, to its row in `matches`, int64 `[k, P]`. `pairs`
    int64 `[P]` counts all impostor pairs of a dyad. `share` is P of the number of all dyads.
    """

    row: Mapping[int, int]
    matches: NDArray[np.int64]
    pairs: NDArray[np.int64]
    share: float

    def at(self, edges: Sequence[int]) -> "Dyads":
        """Return the same at fewer thresholds."""
        chosen = sorted(set(edges))
        rows = [self.row[edge] for edge in chosen]
        return Dyads({edge: row for row, edge in enumerate(chosen)}, self.matches[rows], self.pairs, self.share)


def add(parts: Sequence[Dyads]) -> Dyads:
    """Return the sum of cells that were counted at the same thresholds."""
    matches, pairs = (np.sum([getattr(part, name) for part in parts], axis=0) for name in ("matches", "pairs"))
    return Dyads(parts[0].row, matches, pairs, parts[0].share)


def count_dyads(
    rows: Rows, edges: Mapping[Classes, Sequence[int]], workers: int, most_pairs: int = MOST_PAIRS
) -> dict[Classes, Dyads]:
    """Count the false matches of every dyad in every cell, at that cell's thresholds.

    Args:
        rows: as they were counted for the cells.
        edges: thresholds of each cell, numbers of edges of the coarse bins: edge b is the score -1 + b/1024.
        workers: threads.
        most_pairs: of rows that are compared. Where there are more, clusters are dealt at random into as many groups as
            it takes, and the dyads within a group are counted.
    """
    n_pairs = len(rows.subject) * (len(rows.subject) - 1) // 2
    n_groups = min(max(1, -(-n_pairs // most_pairs)), max(1, rows.n_clusters // 2))
    group = np.random.default_rng(_GROUP_SEED).permutation(rows.n_clusters) % n_groups
    class_of_row = np.repeat(np.arange(len(rows.starts) - 1), np.diff(rows.starts))
    parts: dict[Classes, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = {cell: [] for cell in edges}
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for number in range(n_groups):
                members = np.flatnonzero(group == number)
                chosen = np.flatnonzero(group[rows.cluster] == number) if n_groups > 1 else np.arange(len(class_of_row))
                part = _Group(rows, chosen, np.searchsorted(members, rows.cluster[chosen]), class_of_row, len(members))
                for cell, at in edges.items():
                    parts[cell].append(part.count(cell, sorted(set(at)), pool))
    finally:
        torch.set_num_threads(torch_threads)
    n_dyads = max(1, rows.n_clusters * (rows.n_clusters - 1) // 2)
    found = {}
    for cell, counted in parts.items():
        matches, pairs = (np.concatenate(part, axis=-1) for part in zip(*counted, strict=True))
        row = {edge: at for at, edge in enumerate(sorted(set(edges[cell])))}
        found[cell] = Dyads(row, matches, pairs, len(pairs) / n_dyads)
    return found


class _Group:
    """The rows of one group of clusters, sorted as those of `Rows`; `cluster` counts from 0 within the group."""

    def __init__(
        self,
        rows: Rows,
        chosen: NDArray[np.intp],
        cluster: NDArray[np.intp],
        class_of_row: NDArray[np.intp],
        n_clusters: int,
    ) -> None:
        device = rows.unit.device
        whole = len(chosen) == len(rows.unit)
        self.unit = rows.unit if whole else rows.unit[torch.from_numpy(chosen).to(device)]
        self.numpy_cluster = cluster
        self.cluster = torch.as_tensor(cluster, device=device)
        self.subject = torch.as_tensor(rows.subject[chosen], device=device)
        self.starts = np.searchsorted(class_of_row[chosen], np.arange(len(rows.starts)))
        self.n_clusters = n_clusters
        duplicate = rows.duplicate[chosen]
        self.duplicate = torch.as_tensor(duplicate, device=device)
        codes, inverse, counts = np.unique(duplicate, return_inverse=True, return_counts=True)
        self.repeated = np.flatnonzero(counts[inverse] > 1) if len(codes) else np.empty(0, dtype=np.int64)

    def count(
        self, cell: Classes, edges: Sequence[int], pool: ThreadPoolExecutor
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return false matches at each edge `[k, P]` and all impostor pairs `[P]` of the dyads of the group."""
        first, second = (slice(int(self.starts[one]), int(self.starts[one + 1])) for one in cell)
        tiles = []
        for top in range(first.start, first.stop, _TILE[0]):
            block = slice(top, min(top + _TILE[0], first.stop))
            lefts = range(top if first == second else second.start, second.stop, _TILE[1])
            tiles += [(block, slice(left, min(left + _TILE[1], second.stop))) for left in lefts]
        table = np.zeros((len(edges) + 1, self.n_clusters, self.n_clusters), dtype=np.int64)
        thresholds = torch.tensor([2 + edge / 1024 for edge in edges], device=self.unit.device)
        for at, counts in pool.map(partial(self._tile, thresholds), tiles):
            table[:, at[0], at[1]] += counts
        one, other = np.triu_indices(self.n_clusters, 1)
        between = table[:, one, other] + table[:, other, one]
        # A score is counted at the highest edge that it reaches; it matches at the lower ones, too.
        matches = np.cumsum(between[:-1][::-1], axis=0)[::-1]
        of_first, of_second = (
            np.bincount(self.numpy_cluster[part], minlength=self.n_clusters) for part in (first, second)
        )
        pairs = of_first[one] * of_second[other]
        if first != second:
            pairs = pairs + of_first[other] * of_second[one]
        return matches, pairs - between[-1]

    def _tile(
        self, thresholds: torch.Tensor, tile: tuple[slice, slice]
    ) -> tuple[tuple[slice, slice], NDArray[np.int64]]:
        """Return where a tile's clusters are in the table, and its counts by threshold; the last are duplicates."""
        rows, columns = tile
        scores = shift_to_grid(self.unit[rows] @ self.unit[columns].T)
        at = self._clusters_in(rows), self._clusters_in(columns)
        height, width, levels = at[0].stop - at[0].start, at[1].stop - at[1].start, len(thresholds)
        row_keys = (self.cluster[rows] - at[0].start) * width
        column_keys = self.cluster[columns] - at[1].start
        keys = []
        these, those = self._repeated_in(rows), self._repeated_in(columns)
        if len(these) and len(those):
            one, other = (self.duplicate[these][:, None] == self.duplicate[those]).nonzero().T
            one, other = (
                torch.as_tensor(these, device=one.device)[one],
                torch.as_tensor(those, device=one.device)[other],
            )
            counted = other > one  # a row is after another one, or in a later class
            scores[one - rows.start, other - columns.start] = 0
            one, other = one[counted], other[counted]
            keys.append(row_keys[one - rows.start] + column_keys[other - columns.start] + levels * height * width)
        if columns.start < rows.stop:
            scores.triu_(diagonal=1 + rows.start - columns.start)
        if levels:
            flat = scores.view(-1)
            hits = (flat >= thresholds[0]).nonzero().view(-1)
            level = torch.bucketize(flat[hits], thresholds, right=True) - 1
            row = hits // scores.shape[1]
            column = hits - row * scores.shape[1]
            impostor = self.subject[rows][row] != self.subject[columns][column]
            key = row_keys[row] + column_keys[column] + level * (height * width)
            keys.append(key[impostor])
        size = (levels + 1) * height * width
        counts = torch.bincount(torch.cat(keys), minlength=size) if keys else torch.zeros(size, dtype=torch.int64)
        return at, np.asarray(counts.cpu().numpy()).reshape(levels + 1, height, width)

    def _clusters_in(self, part: slice) -> slice:
        return slice(int(self.numpy_cluster[part.start]), int(self.numpy_cluster[part.stop - 1]) + 1)

    def _repeated_in(self, part: slice) -> NDArray[np.int64]:
        first, last = np.searchsorted(self.repeated, [part.start, part.stop])
        return self.repeated[first:last]
