"""Count the scores of all pairs of rows, exactly and once, in a bounded amount of memory.

The pairs are visited in tiles of a matrix product that stay near the processor. Each score is rounded to its grid
(`cosine`), so that its float32 bits are the number of a counter; nothing is kept but counters, and the few genuine
scores. What the counts mean is left to `allpairs` and `verification`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metrics.cosine import SCORES_PER_UNIT, shift_to_grid
from metrics.pair_kernel import THREADS, count_tile

GRID_POINTS = 2 * SCORES_PER_UNIT + 1  # scores -1 … 1, both ends included
COARSE_SHIFT = 12
COARSE_BINS = (GRID_POINTS - 1 >> COARSE_SHIFT) + 1  # 2,049 bins of width 2^-10; the last holds the score 1 alone

# A code is a grid number + _MARGIN; code 0 marks a pair that does not count. The margin is one coarse bin wide.
_MARGIN = 1 << COARSE_SHIFT
_BITS_OF_TWO = 0x40000000
_COARSE_CODES = COARSE_BINS + 1
_FLUSH_AT = 2**31 - 1  # pairs after which a 32-bit counter could overflow
_TILE = {"cpu": (512, 2048), "cuda": (4096, 8192)}


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows sorted by class, then cluster, then subject, so that rows of one subject are adjacent.

    `unit` holds unit vectors float32 `[N, D]`; `cluster` and `subject` are int64 `[N]`, `subject` being a rank that
    does not fall within a class; `starts[c] : starts[c + 1]` are the rows of class c. Rows with the same `duplicate`
    code (int64 `[N]`; a code of one row alone has no effect) never form a pair.
    """

    unit: torch.Tensor
    cluster: NDArray[np.int64]
    subject: NDArray[np.int64]
    starts: NDArray[np.int64]
    duplicate: NDArray[np.int64]
    n_clusters: int


@dataclass(frozen=True, eq=False)
class CellCounts:
    """All pairs of one class with another (or with itself).

    `impostor` (int32 where that is enough, else int64) `[GRID_POINTS]`: impostor pairs by score. `genuine` int64
    `[n]`: grid number of each genuine score, ascending. `genuine_by_cluster`, `ends_by_cluster` int64
    `[clusters, COARSE_BINS]`: genuine pairs, and ends of impostor pairs (each pair has two), by cluster and coarse
    score.
    """

    impostor: NDArray[np.integer[Any]]
    genuine: NDArray[np.int64]
    genuine_by_cluster: NDArray[np.int64]
    ends_by_cluster: NDArray[np.int64]


def count_pairs(rows: Rows, workers: int) -> Iterator[tuple[int, int, CellCounts]]:
    """Yield (class, other class, counts) for every two classes with rows in them, class <= other class.

    Workers are threads with one torch thread each, which on a shared machine are faster than torch's own; torch's
    thread setting is restored at the end. The counts do not depend on the number of workers. Memory beside
    the features: 32 MB and a tile's buffers (20 MB; on a GPU 134 MB) for each worker, 32 MB for each cell that the
    caller keeps, 16 bytes for each genuine pair.
    """
    n_classes = len(rows.starts) - 1
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counters = [_new_counter(rows) for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            for first in range(n_classes):
                for second in range(first, n_classes):
                    todo = _row_blocks(rows, first, second)
                    if not todo.empty():
                        list(pool.map(_Counter.drain, counters, [todo] * workers))
                        yield first, second, _collect(counters, rows.n_clusters)
    finally:
        torch.set_num_threads(torch_threads)


Block = tuple[slice, slice]


def _row_blocks(rows: Rows, first: int, second: int) -> SimpleQueue[Block]:
    """Cut a cell into blocks of rows, each with all its columns; of a class with itself only the upper triangle."""
    height = _TILE[rows.unit.device.type][0]
    blocks: SimpleQueue[Block] = SimpleQueue()
    columns = slice(int(rows.starts[second]), int(rows.starts[second + 1]))
    for start in range(int(rows.starts[first]), int(rows.starts[first + 1]), height):
        stop = min(start + height, int(rows.starts[first + 1]))
        left = start if first == second else columns.start
        if left < columns.stop:
            blocks.put((slice(start, stop), slice(left, columns.stop)))
    return blocks


def used_counters(ends: NDArray[np.int64]) -> slice:
    """Return where, among the eight million counters by grid number, those that are not zero can be."""
    bins = np.flatnonzero(ends.any(axis=0))
    return slice(int(bins[0]) << COARSE_SHIFT, int(bins[-1]) + 1 << COARSE_SHIFT) if len(bins) else slice(0, 0)


def _collect(counters: list["_Counter"], n_clusters: int) -> CellCounts:
    pairs = sum(counter.pairs + counter.flushed_pairs for counter in counters)
    width: type[np.integer[Any]] = np.int32 if pairs <= _FLUSH_AT else np.int64
    impostor: NDArray[np.integer[Any]] = np.zeros(GRID_POINTS, dtype=width)
    ends = np.sum([counter.take_ends() for counter in counters], axis=0)
    used = used_counters(ends)
    for counter in counters:
        counter.move_impostors_to(impostor, used)
    genuine = np.concatenate([counter.take_genuine() for counter in counters], axis=1)
    keys = genuine[1] * COARSE_BINS + (genuine[0] >> COARSE_SHIFT)
    by_cluster = np.bincount(keys, minlength=n_clusters * COARSE_BINS).reshape(n_clusters, COARSE_BINS)
    return CellCounts(impostor, np.sort(genuine[0]), by_cluster, ends)


def _new_counter(rows: Rows) -> "_Counter":
    """Return a counter that uses the kernel where there is a GPU and it can be compiled."""
    if rows.unit.is_cuda:
        kernel = count_tile(COARSE_BINS=COARSE_BINS, COARSE_SHIFT=COARSE_SHIFT, ENDS_WIDTH=_COARSE_CODES)
        if kernel is not None:
            return _KernelCounter(rows, kernel)
    return _StepCounter(rows)


class _Counter:
    """The counters of one worker, and the product of a tile."""

    def __init__(self, rows: Rows) -> None:
        device = rows.unit.device
        height, width = _TILE[device.type]
        self.rows = rows
        self.scores = torch.empty(height * width, device=device)
        self.impostor = torch.zeros(GRID_POINTS + _MARGIN, dtype=torch.int32, device=device)
        self.ends = torch.zeros(rows.n_clusters, _COARSE_CODES, dtype=torch.int64, device=device)
        self.pairs = 0  # since the 32-bit counters were last emptied
        self.flushed_pairs = 0
        self.flushed: torch.Tensor | None = None

    def drain(self, todo: SimpleQueue[Block]) -> None:
        """Work on blocks until none is left."""
        device = self.rows.unit.device
        width = _TILE[device.type][1]
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread has no CUDA context until it asks for one
        while True:
            try:
                block, columns = todo.get_nowait()
            except Empty:
                return
            for start in range(columns.start, columns.stop, width):
                self.count(block, slice(start, min(start + width, columns.stop)))

    def count(self, rows: slice, columns: slice) -> None:
        """Count the pairs of one tile; columns begin at or after the first row."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        size = height * width
        if self.pairs + size > _FLUSH_AT:
            self.flush()
        self.pairs += size
        scores = self.scores[:size].view(height, width)
        torch.mm(self.rows.unit[rows], self.rows.unit[columns].T, out=scores)
        self.count_scores(scores, rows, columns)

    def count_scores(self, scores: torch.Tensor, rows: slice, columns: slice) -> None:
        """Count the scores of a tile; they may be overwritten."""
        raise NotImplementedError

    def take_genuine(self) -> NDArray[np.int64]:
        """Return grid numbers and clusters of the genuine pairs, `[2, n]`, and start again without any."""
        raise NotImplementedError

    def flush(self) -> None:
        """Move the 32-bit counts into 64-bit ones."""
        if self.flushed is None:
            self.flushed = torch.zeros(GRID_POINTS, dtype=torch.int64, device=self.impostor.device)
        self.flushed += self.impostor[_MARGIN:]
        self.impostor.zero_()
        self.flushed_pairs += self.pairs
        self.pairs = 0

    def move_impostors_to(self, total: NDArray[np.integer[Any]], used: slice) -> None:
        """Add all counts to the total, where `used` has all that are not zero, and start again from zero."""
        total[used] += self.impostor[_MARGIN:][used].cpu().numpy()
        if self.flushed is not None:
            total[used] += self.flushed[used].cpu().numpy()
        self.impostor.zero_()
        self.pairs, self.flushed_pairs, self.flushed = 0, 0, None

    def take_ends(self) -> NDArray[np.int64]:
        ends = self.ends[:, 1:].cpu().numpy().copy()
        self.ends.zero_()
        return ends


class _StepCounter(_Counter):
    """Counts a tile step by step with torch, on any device."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        device, size = rows.unit.device, len(self.scores)
        self.genuine: list[torch.Tensor] = []
        self.codes = torch.empty(size, dtype=torch.int32, device=device)
        self.wide_codes = torch.empty(size, dtype=torch.int64, device=device)
        self.ones = torch.ones(size, dtype=torch.int32, device=device)
        self.subject = torch.as_tensor(rows.subject, device=device)
        self.cluster = torch.as_tensor(rows.cluster, device=device)
        self.duplicate = torch.as_tensor(rows.duplicate, device=device)
        codes, inverse, counts = np.unique(rows.duplicate, return_inverse=True, return_counts=True)
        self.repeated = np.flatnonzero(counts[inverse] > 1) if len(codes) else np.empty(0, dtype=np.int64)

    def count_scores(self, scores: torch.Tensor, rows: slice, columns: slice) -> None:
        size = scores.numel()
        codes = self.codes[:size].view(scores.shape)
        torch.sub(shift_to_grid(scores).view(torch.int32), _BITS_OF_TWO - _MARGIN, out=codes)
        self.drop_duplicates(codes, rows, columns)
        self.drop_lower_triangle(codes, rows, columns)
        self.take_out_genuine(codes, rows, columns)
        wide = self.wide_codes[:size].copy_(codes.view(-1))
        self.impostor.scatter_add_(0, wide, self.ones[:size])
        bins = codes.bitwise_right_shift_(COARSE_SHIFT)
        keys = scores.view(torch.int32)
        self.count_ends(torch.add(bins, self.first_keys(rows)[:, None], out=keys), rows)
        self.count_ends(torch.add(bins, self.first_keys(columns), out=keys), columns)

    def drop_duplicates(self, codes: torch.Tensor, rows: slice, columns: slice) -> None:
        these, those = self._repeated_in(rows), self._repeated_in(columns)
        if len(these) and len(those):
            same = self.duplicate[these][:, None] == self.duplicate[those]
            one, other = same.nonzero().cpu().numpy().T
            codes[these[one] - rows.start, those[other] - columns.start] = 0

    def drop_lower_triangle(self, codes: torch.Tensor, rows: slice, columns: slice) -> None:
        if columns.start < rows.stop:
            # Column j of the tile is row j + shift of the block; a pair counts where the column is after the row.
            codes.triu_(diagonal=1 + rows.start - columns.start)

    def take_out_genuine(self, codes: torch.Tensor, rows: slice, columns: slice) -> None:
        """Move the genuine scores of a tile to a list; subjects are sorted, so one small rectangle holds them."""
        subject = self.rows.subject
        low = max(subject[rows.start], subject[columns.start])
        high = min(subject[rows.stop - 1], subject[columns.stop - 1])
        if low > high:
            return
        top, bottom = np.searchsorted(subject[rows], [low, high + 1])
        left, right = np.searchsorted(subject[columns], [low, high + 1])
        inside = codes[top:bottom, left:right]
        block_subjects = self.subject[rows][top:bottom, None]
        same = (block_subjects == self.subject[columns][left:right]) & (inside > 0)
        clusters = self.cluster[rows][top:bottom, None].expand_as(inside)
        self.genuine.append(torch.stack([inside[same].long() - _MARGIN, clusters[same]]))
        inside.masked_fill_(same, 0)

    def first_keys(self, part: slice) -> torch.Tensor:
        """Return the number of the first coarse counter of each row's cluster, counted from the first row's."""
        cluster = self.cluster[part]
        return ((cluster - cluster[0]) * _COARSE_CODES).to(torch.int32)

    def count_ends(self, keys: torch.Tensor, part: slice) -> None:
        first, last = int(self.rows.cluster[part.start]), int(self.rows.cluster[part.stop - 1])
        n_clusters = last + 1 - first
        counts = self.bincount(keys.view(-1), n_clusters * _COARSE_CODES)
        self.ends[first : last + 1] += counts.view(n_clusters, _COARSE_CODES)

    def bincount(self, keys: torch.Tensor, size: int) -> torch.Tensor:
        """Count the keys of a tile, all below `size`; `wide_codes` is free by now."""
        if not keys.is_cuda:
            return torch.bincount(keys, minlength=size)
        counts = torch.zeros(size, dtype=torch.int32, device=keys.device)  # torch.bincount takes four times as long
        return counts.scatter_add_(0, self.wide_codes[: len(keys)].copy_(keys), self.ones[: len(keys)])

    def take_genuine(self) -> NDArray[np.int64]:
        taken = torch.cat(self.genuine, dim=1).cpu().numpy() if self.genuine else np.empty((2, 0), dtype=np.int64)
        self.genuine.clear()
        return np.asarray(taken)

    def _repeated_in(self, part: slice) -> NDArray[np.int64]:
        first, last = np.searchsorted(self.repeated, [part.start, part.stop])
        return self.repeated[first:last]


class _KernelCounter(_Counter):
    """Counts a tile on a GPU with one kernel."""

    def __init__(self, rows: Rows, kernel: Callable[..., Any]) -> None:
        super().__init__(rows)
        self.kernel = kernel
        changes = np.flatnonzero(np.diff(rows.cluster)) + 1
        self.edges = np.unique(np.concatenate([rows.starts, changes, [0, len(rows.cluster)]]))
        self.edges_on_device = self._on_device(self.edges)
        _, duplicate = np.unique(rows.duplicate, return_inverse=True)  # a caller's codes may need 64 bits
        self.codes = [self._on_device(codes) for codes in (rows.subject, rows.cluster, duplicate)]
        _, copies = np.unique(rows.subject, return_counts=True)
        n_genuine = int((copies * (copies - 1) // 2).sum())
        self.genuine = torch.empty(n_genuine, 2, dtype=torch.int32, device=rows.unit.device)
        self.n_genuine = torch.zeros(1, dtype=torch.int64, device=rows.unit.device)

    def _on_device(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        return torch.as_tensor(numbers.astype(np.int32), device=self.rows.unit.device)

    def count_scores(self, scores: torch.Tensor, rows: slice, columns: slice) -> None:
        bounds = [rows.start, rows.stop, columns.start, columns.stop]
        first_row, first_column = np.searchsorted(self.edges, [rows.start, columns.start], side="right").tolist()
        last_row, last_column = np.searchsorted(self.edges, [rows.stop, columns.stop]).tolist()
        edges = [self.edges_on_device, first_row - 1, first_column - 1]
        counters = [self.impostor[_MARGIN:], self.ends.view(-1)[1:], self.genuine, self.n_genuine]
        self.kernel(
            grid=(last_column - first_column + 1, last_row - first_row + 1, 1),
            block=(THREADS, 1, 1),
            args=[scores, scores.shape[1], *bounds, *edges, *self.codes, *counters],
        )

    def take_genuine(self) -> NDArray[np.int64]:
        taken = self.genuine[: int(self.n_genuine)].T.long().cpu().numpy()
        self.n_genuine.zero_()
        return np.asarray(taken)
