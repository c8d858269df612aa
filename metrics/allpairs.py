"""Verification over all pairs of a set of features, exact at any size, in total and cell by cell.

A cell is a pair of classes, here of poses. One pass over the pairs gives everything that is reported for a mode: the
metrics at each cell's own thresholds, the rates in each cell at the thresholds of all pairs together, curves for plots,
and the counts by subject that `bootstrap` resamples. Which class a row belongs to is left to the caller (`poses`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metrics.cosine import SCORES_PER_UNIT, Features, unit_rows
from metrics.dyads import Classes, Dyads, add, count_dyads
from metrics.pair_counts import COARSE_BINS, GRID_POINTS, CellCounts, Rows, count_pairs, used_counters
from metrics.score_counts import ScoreCounts
from metrics.variance import Curves, Influence, influence
from metrics.verification import (
    FMR_POINTS,
    DetCurve,
    OperatingPoint,
    ScoreHistogram,
    Verification,
    det_curve,
    fmr_by_score,
    rates_at,
    score_histogram,
    summarise,
)
from schemas.metrics import ALL, AUC, EER, MetricId
from schemas.reports import Estimate, ScoreFmr

_CLUSTER_SEED = 19795  # any fixed number: two modes on the same rows must get the same clusters


@dataclass(frozen=True, eq=False)
class ClusterCounts:
    """Pairs by cluster of subjects and coarse score: what the bootstrap over subjects draws from.

    Column b counts scores in [-1 + b/1024, -1 + (b+1)/1024); the last column the score 1. `genuine` int64
    `[clusters, 2049]` counts pairs, `impostor_ends` int64 of the same shape counts ends of pairs: an impostor pair
    counts once in the cluster of either subject.
    """

    genuine: NDArray[np.int64]
    impostor_ends: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cell:
    """Results of one cell: metrics at its own thresholds, curves, counts by cluster.

    `at_global` has FMR and FNMR inside the cell at the thresholds where *all pairs together* have an FMR of at most the
    target. A rate is None when the cell has no such pairs. `influences` has those of metrics on enough false matches.
    """

    name: str
    verification: Verification
    at_global: tuple[OperatingPoint, ...]
    det: DetCurve
    histogram: ScoreHistogram
    counts: ClusterCounts
    influences: Mapping[MetricId, Influence] = field(default_factory=dict, repr=False)

    def estimates(self) -> dict[MetricId, Estimate]:
        """Return every metric, exact and without an interval."""
        auc_missing = "not estimable: one kind of pair is missing"
        found = {EER: self.verification.eer, AUC: _estimate(self.verification.auc, auc_missing)}
        for own in self.verification.points:
            found[MetricId.at("fnmr", own.target_fmr)] = _estimate(own.fnmr, own.reason)
        for point in self.at_global:
            found[MetricId.at("fnmr_global", point.target_fmr)] = _estimate(point.fnmr, point.reason)
            found[MetricId.at("fmr_global", point.target_fmr)] = _estimate(point.fmr, point.reason)
        return found


def _estimate(value: float | None, reason: str | None) -> Estimate:
    return Estimate(value=value, reason=None if value is not None else reason or "not estimable")


@dataclass(frozen=True, eq=False)
class AllPairs:
    """Results of all cells. `clusters` int64 `[N]` is the cluster of subjects that each row was counted in."""

    overall: Cell
    cells: dict[str, Cell]
    clusters: NDArray[np.int64]
    fmr_by_score: ScoreFmr | None = None
    draws: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Cell]:
        yield self.overall
        yield from self.cells.values()


def all_pairs(
    features: Features,
    subjects: NDArray[np.integer[Any]],
    *,
    classes: NDArray[np.integer[Any]] | None = None,
    class_names: Sequence[str] = (),
    duplicates: NDArray[np.integer[Any]] | None = None,
    fmr_points: Sequence[float] = FMR_POINTS,
    max_clusters: int = 512,
    device: str = "cpu",
    workers: int | None = None,
) -> AllPairs:
    """Compare every row with every other row by cosine and compute all verification metrics, exactly.

    Args:
        features: `[N, D]`, any float type; rows are L2-normalised here, so they need not be.
        subjects: integer codes `[N]`; a pair is genuine when both codes are equal.
        classes: integer codes `[N]` into `class_names`; None: no cells, only the total.
        class_names: names of the classes. Class a with class b makes the cell "a-b", in this order.
        duplicates: integer codes `[N]`; rows with the same code (same id, same bytes) never form a pair.
        fmr_points: the false match rates asked for.
        max_clusters: more subjects than this are assigned to so many clusters, at random but reproducibly, and the
            bootstrap draws clusters. Bounds memory: 33 kB for each cluster and cell.
        device: "cpu" or a CUDA device of torch.
        workers: threads; by default as many as torch is set to use.

    Scores are float32 cosines on the grid that `cosine` describes; counts are integers, so the results are those of
    sorting all scores. Beside a sorted copy of the features it takes less than 1 GB at any N for the four pose classes
    on a few cores (see `count_pairs`).

    Raises ValueError for shapes that do not fit together, codes without a name, zero or non-finite rows.

    >>> rows, subjects = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, -0.8]]), np.array([0, 0, 1])
    >>> found = all_pairs(rows, subjects, classes=np.array([0, 1, 1]), class_names=("frontal", "profile"))
    >>> cell = found.cells["frontal-profile"].verification
    >>> cell.n_genuine, cell.n_impostor
    (1, 1)
    >>> found.overall.verification.auc
    1.0
    """
    n_rows = len(features)
    subjects = _codes("subjects", subjects, n_rows)
    classes = np.zeros(n_rows, dtype=np.int64) if classes is None else _codes("classes", classes, n_rows)
    duplicates = np.arange(n_rows) if duplicates is None else _codes("duplicates", duplicates, n_rows)
    n_classes = max(1, len(class_names))
    if n_rows and not 0 <= classes.min() <= classes.max() < n_classes:
        raise ValueError(
            f"classes hold {classes.min()} … {classes.max()}, but there are {len(class_names)} class names"
        )
    if max_clusters < 1:
        raise ValueError(f"max_clusters = {max_clusters}; pass a positive number")
    known, subject_rank = np.unique(subjects, return_inverse=True)
    cluster_of_subject = _clusters(len(known), max_clusters)
    clusters = cluster_of_subject[subject_rank]
    order = np.lexsort((subject_rank, clusters, classes))
    # A rank that rises with (cluster, subject): the order in which the rows of a class are sorted.
    rank_of_subject = np.empty(len(known), dtype=np.int64)
    rank_of_subject[np.lexsort((np.arange(len(known)), cluster_of_subject))] = np.arange(len(known))
    rows = Rows(
        unit=unit_rows(features, device, order),
        cluster=clusters[order],
        subject=rank_of_subject[subject_rank[order]],
        starts=np.searchsorted(classes[order], np.arange(n_classes + 1)),
        duplicate=duplicates[order],
        n_clusters=int(cluster_of_subject.max(initial=-1)) + 1,
    )
    threads = 1 if rows.unit.is_cuda else workers or torch.get_num_threads()
    counted = list(count_pairs(rows, threads))

    total = _total([counts for _, _, counts in counted], rows.n_clusters)
    scores = _score_counts(total)
    verification = summarise(scores, fmr_points)
    overall = _cell(ALL, total, scores, verification, verification.points)
    cells: dict[Classes, Cell] = {}
    if class_names:
        for first, second, counts in counted:
            name = f"{class_names[first]}-{class_names[second]}"
            cell_scores = _score_counts(counts)
            own = summarise(cell_scores, fmr_points)
            cells[first, second] = _cell(name, counts, cell_scores, own, verification.points)
    overall, cells = _with_influences(rows, overall, cells, threads)
    found = {cell.name: cell for cell in cells.values()}
    return AllPairs(overall, found, clusters, fmr_by_score(scores, fmr_points))


def _with_influences(
    rows: Rows, overall: Cell, cells: Mapping[Classes, Cell], threads: int
) -> tuple[Cell, dict[Classes, Cell]]:
    """Count the dyads of all cells, and return the cells with the influences of their metrics."""
    if rows.n_clusters < 2:
        return overall, dict(cells)
    there = [
        (first, second)
        for first in range(len(rows.starts) - 1)
        for second in range(first, len(rows.starts) - 1)
        if rows.starts[first + 1] > rows.starts[first] and rows.starts[second + 1] > rows.starts[second]
    ]
    curves = {key: Curves.of(cell.counts.genuine, cell.counts.impostor_ends) for key, cell in cells.items()}
    of_all = Curves.of(overall.counts.genuine, overall.counts.impostor_ends)
    shared = _edges(of_all, overall.verification)
    own = {key: _edges(curves[key], cell.verification) for key, cell in cells.items()}
    wanted = {key: sorted({*shared.values(), *own.get(key, {}).values()}) for key in there}
    dyads = count_dyads(rows, wanted, threads)
    of_total = add([dyads[key].at(list(shared.values())) for key in there])
    at_global = {metric: edge for metric, edge in shared.items() if metric.kind == "fnmr"}

    def influences(cell: Curves, own: Mapping[MetricId, int], counted: Dyads) -> dict[MetricId, Influence]:
        found = {metric: influence(metric, cell, cell, counted, edge) for metric, edge in own.items()}
        for metric, edge in at_global.items():
            name = MetricId.at("fnmr_global", metric.fmr_text)
            found[name] = influence(metric, cell, of_all, of_total, edge) if cell.genuine.any() else None
        return {metric: one for metric, one in found.items() if one is not None}

    return replace(overall, influences=influences(of_all, shared, of_total)), {
        key: replace(cell, influences=influences(curves[key], own[key], dyads[key])) for key, cell in cells.items()
    }


def _edges(curves: Curves, verification: Verification) -> dict[MetricId, int]:
    """Return the coarse edge of every threshold with enough false matches."""
    if not (verification.n_genuine and verification.n_impostor):
        return {}
    found = {EER: curves.crossing()}
    for point in verification.points:
        if point.fmr is not None:
            edge = curves.edge(point.fmr * verification.n_impostor)
            found[MetricId.at("fnmr", point.target_fmr)] = edge
    return {metric: edge for metric, edge in found.items() if edge is not None}


def _codes(name: str, codes: NDArray[np.integer[Any]], n_rows: int) -> NDArray[np.int64]:
    array = np.asarray(codes)
    if array.shape != (n_rows,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: {array.dtype} of shape {array.shape}; pass one integer code for each of {n_rows} rows"
        )
    return array.astype(np.int64)


def _clusters(n_subjects: int, max_clusters: int) -> NDArray[np.int64]:
    """Deal subjects into clusters of nearly equal size; one subject each while there are few enough."""
    if n_subjects <= max_clusters:
        return np.arange(n_subjects)
    return np.random.default_rng(_CLUSTER_SEED).permutation(n_subjects) % max_clusters


def _total(counted: Sequence[CellCounts], n_clusters: int) -> CellCounts:
    if len(counted) == 1:
        return counted[0]
    impostor = np.zeros(GRID_POINTS, dtype=np.int64)
    genuine_by_cluster = np.zeros((n_clusters, COARSE_BINS), dtype=np.int64)
    ends_by_cluster = np.zeros((n_clusters, COARSE_BINS), dtype=np.int64)
    for counts in counted:
        impostor += counts.impostor
        genuine_by_cluster += counts.genuine_by_cluster
        ends_by_cluster += counts.ends_by_cluster
    genuine = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *(counts.genuine for counts in counted)]))
    return CellCounts(impostor, genuine, genuine_by_cluster, ends_by_cluster)


def _score_counts(counts: CellCounts) -> ScoreCounts:
    # The coarse counts show where to look; most of the eight million counters are never used.
    used = used_counters(counts.ends_by_cluster)
    observed = used.start + np.flatnonzero(counts.impostor[used])
    return ScoreCounts.from_counts(_score(counts.genuine), _score(observed), counts.impostor[observed])


def _score(grid_numbers: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Return the score of each grid number; exact, for its multiples of 2^-22 up to 1 are float32 numbers."""
    return (grid_numbers / SCORES_PER_UNIT - 1).astype(np.float32)


def _cell(
    name: str,
    counts: CellCounts,
    scores: ScoreCounts,
    verification: Verification,
    global_points: Sequence[OperatingPoint],
) -> Cell:
    return Cell(
        name=name,
        verification=verification,
        at_global=tuple(_at_global(scores, point) for point in global_points),
        det=det_curve(scores),
        histogram=score_histogram(scores),
        counts=ClusterCounts(counts.genuine_by_cluster, counts.ends_by_cluster),
    )


def _at_global(scores: ScoreCounts, point: OperatingPoint) -> OperatingPoint:
    if point.threshold is None:
        return point
    fmr, fnmr = rates_at(scores, point.threshold)
    return OperatingPoint(point.target_fmr, point.threshold, fmr, fnmr)
