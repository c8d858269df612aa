"""Identification (1:N) metrics from search results, after ISO/IEC 19795-1:2021, and exact search as their reference.

The gallery holds one or more samples of each enrolled subject. A subject's score is that of its best sample. A probe is
*mated* when its subject is enrolled. Which rows are gallery and which are probes, and the search through an index, are
left to the caller.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metrics.cosine import SCORES_PER_UNIT, Features, shift_to_grid, unit_rows
from metrics.intervals import with_interval
from metrics.score_counts import ScoreCounts
from metrics.verification import fewest_for, operating_point
from schemas.reports import Estimate

RANKS = (1, 5, 10)
FPIR_POINTS = (1e-1, 1e-2, 1e-3)

_BLOCK = (512, 4_096)  # probes, gallery rows: 8 MB of scores
_FIRST_ROWS = 1024
_BITS_OF_TWO = 0x40000000  # of a float32
_ROW_BITS = 39  # with the 24 bits of a score just within an int64


@dataclass(frozen=True)
class Identification:
    """The metrics of one search experiment; an estimate without a value has the reason.

    `rank` is, by k, the share of mated probes whose subject is among the best k subjects. `fnir` is the false negative
    identification rate, by the false positive identification rate that the threshold *at most* allows. `rank_draws` and
    `fnir_draws` are the same rates in every draw of the bootstrap.
    """

    n_mated: int
    n_non_mated: int
    rank: dict[int, Estimate]
    fnir: dict[float, Estimate]
    rank_draws: dict[int, NDArray[np.float64]] = field(default_factory=dict, repr=False)
    fnir_draws: dict[float, NDArray[np.float64]] = field(default_factory=dict, repr=False)


def identify(
    candidate_subjects: NDArray[np.integer[Any]],
    candidate_scores: NDArray[np.floating[Any]],
    probe_subjects: NDArray[np.integer[Any]],
    mated: NDArray[np.bool_],
    *,
    among: NDArray[np.bool_] | None = None,
    ranks: Sequence[int] = RANKS,
    fpir_points: Sequence[float] = FPIR_POINTS,
    resamples: int = 0,
    seed: int = 0,
    level: float = 0.95,
) -> Identification:
    """Compute the cumulative match characteristic, and FNIR at fixed FPIR, from top-k candidate lists.

    Args:
        candidate_subjects: subject codes of the k best gallery samples of each probe, best first, integer
            `[probes, k]`; -1 where the gallery had no more. A subject may come more than once: its best score counts,
            its other samples take no place.
        candidate_scores: their scores, not rising within a row, `[probes, k]`; ignored where the code is -1.
        probe_subjects: integer `[probes]`, not negative.
        mated: bool `[probes]`: the probe's subject is in the gallery.
        among: bool `[probes]`: the mated probes that are counted, such as those with one row enrolled; None for all.
            The thresholds are those of all non-mated probes in any case.
        ranks: the k of the rank-k rates. Ties count against a subject.
        fpir_points: target FPIRs. The threshold follows the rule of `verification.operating_point`: the smallest
            observed score with FPIR **at most** the target.
        resamples: how many draws of subjects the intervals are from; 0 for none.
        seed: of the draws.
        level: confidence level of the intervals.

    With u the number of *other* subjects whose score is >= that of the probe's own subject:

        rank-k rate = share of mated probes with u < k
        FPIR(t)     = share of non-mated probes with a candidate of score >= t
        FNIR(t)     = share of mated probes whose own subject is absent or has a score < t

    A list that ends before it shows k subjects makes rank k not estimable: search deeper.

    Intervals are percentile intervals by bootstrap over the probes' subjects. Subjects are drawn with replacement, all
    probes of a subject together. The gallery is fixed. The threshold of an FPIR is found again in every draw. There is
    no interval for fewer than two subjects, or where more than 5% of the draws lack the rate.

    Raises ValueError for shapes that do not fit, scores that rise or are not finite, and a non-mated probe whose
    subject is found in the gallery.

    >>> candidates, scores = np.array([[7, 8], [9, 8], [7, 9]]), np.array([[0.9, 0.2], [0.7, 0.6], [0.5, 0.1]])
    >>> found = identify(candidates, scores, np.array([7, 8, 1]), np.array([True, True, False]), ranks=[1, 2])
    >>> found.rank[1].value, found.rank[2].value
    (0.5, 1.0)
    """
    probes = _outcomes(candidate_subjects, candidate_scores, probe_subjects, mated)
    counted = mated if among is None else mated & among
    ranks_of_mated, own, best = probes.rank[counted], probes.own_score[counted], probes.best_score[~mated]
    scores = ScoreCounts.from_counts(np.sort(own), *np.unique(best, return_counts=True))
    too_short = {wanted: int((counted & probes.cut_off & (probes.shown < wanted)).sum()) for wanted in ranks}
    by_rank = {wanted: _rank_rate(wanted, ranks_of_mated, too_short[wanted]) for wanted in ranks}
    fnir = {target: _fnir(scores, target) for target in fpir_points}
    _, subject = np.unique(probe_subjects, return_inverse=True)
    n_subjects = int(subject.max(initial=-1)) + 1
    rank_draws: dict[int, NDArray[np.float64]] = {}
    fnir_draws: dict[float, NDArray[np.float64]] = {}
    if resamples and n_subjects > 1:
        draws = np.random.default_rng(seed).multinomial(n_subjects, np.full(n_subjects, 1 / n_subjects), size=resamples)
        of_mated, of_non_mated = draws[:, subject[counted]], draws[:, subject[~mated]]
        with np.errstate(invalid="ignore", divide="ignore"):
            for wanted, exact in by_rank.items():
                rank_draws[wanted] = of_mated[:, ranks_of_mated <= wanted].sum(axis=1) / of_mated.sum(axis=1)
                by_rank[wanted] = with_interval(exact, rank_draws[wanted], level)
            for target, exact in fnir.items():
                fnir_draws[target] = _fnir_of_draws(own, of_mated, best, of_non_mated, target)
                fnir[target] = with_interval(exact, fnir_draws[target], level)
    return Identification(len(own), len(best), by_rank, fnir, rank_draws, fnir_draws)


def identification_difference(
    base: Identification, other: Identification, level: float = 0.95
) -> tuple[dict[int, Estimate], dict[float, Estimate]]:
    """Return other − base of each rank rate and of each FNIR, paired: both are of the same probes and seed."""

    def difference(
        one: Estimate, two: Estimate, draws: tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]
    ) -> Estimate:
        if one.value is None or two.value is None:
            return Estimate(value=None, reason=one.reason or two.reason)
        exact = Estimate(value=two.value - one.value)
        return exact if draws[0] is None or draws[1] is None else with_interval(exact, draws[1] - draws[0], level)

    rank = {
        key: difference(one, other.rank[key], (base.rank_draws.get(key), other.rank_draws.get(key)))
        for key, one in base.rank.items()
    }
    fnir = {
        key: difference(one, other.fnir[key], (base.fnir_draws.get(key), other.fnir_draws.get(key)))
        for key, one in base.fnir.items()
    }
    return rank, fnir


def exact_search(
    gallery: Features, probes: Features, k: int, *, device: str = "cpu"
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scores float32 `[probes, k]` and gallery row numbers int64 `[probes, k]` of the k best rows, best first.

    Brute force in blocks, the reference for `recall_at_k`. Scores are those of `cosine` (rows are normalised here); of
    equal scores the lower row comes first. Beyond the end of a small gallery: score -inf, row -1.

    Raises ValueError for k < 1, dimensions that differ, and rows that are zero or not finite.

    >>> exact_search(np.eye(3), np.array([[0.0, 2.0, 1.0]]), k=2)[1]
    array([[1, 2]])
    """
    if k < 1 or gallery.shape[1:] != probes.shape[1:]:
        raise ValueError(f"k = {k}, gallery {tuple(gallery.shape)}, probes {tuple(probes.shape)}; k must be positive")
    enrolled, asked = unit_rows(gallery, device), unit_rows(probes, device)

    def search(start: int) -> torch.Tensor:
        these = asked[start : start + _BLOCK[0]]
        first = min(len(enrolled), max(k, _FIRST_ROWS))
        best = _best_of_all(these, enrolled[:first], k)
        while first < len(enrolled):
            # As many rows as were seen: then few of them, about k of each block, are among the best so far.
            last = first + min(_BLOCK[1], first)
            best = _merged(best, these, enrolled[first:last], first)
            first = last
        return best

    # Threads with one torch thread each, which a busy machine slows down far less than torch's own (see `pair_counts`).
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(1 if enrolled.is_cuda else torch_threads) as pool:
            parts = list(pool.map(search, range(0, len(asked), _BLOCK[0])))
    finally:
        torch.set_num_threads(torch_threads)
    keys_found = torch.cat(parts).cpu().numpy() if parts else np.empty((0, k), np.int64)
    rows = (1 << _ROW_BITS) - 1 - (keys_found & ((1 << _ROW_BITS) - 1))
    scores = ((keys_found >> _ROW_BITS) / SCORES_PER_UNIT - 1).astype(np.float32)
    nothing = keys_found < 0
    return np.where(nothing, np.float32(-np.inf), scores), np.where(nothing, -1, rows)


def recall_at_k(served: NDArray[np.integer[Any]], exact: NDArray[np.integer[Any]], k: int) -> float:
    """Return the share of the exact k best that the served k best contain, over all probes; ids `[probes, >= k]`.

        recall@k = Σ |served k best ∩ exact k best| / Σ |exact k best|

    -1 ("none") in `exact` is not counted. Raises ValueError when nothing is counted, or a list is shorter than k.

    >>> recall_at_k(np.array([[4, 9]]), np.array([[4, 5]]), k=2)
    0.5
    """
    if len(served) != len(exact) or min(served.shape[1], exact.shape[1]) < k or k < 1:
        raise ValueError(f"served {served.shape} and exact {exact.shape} do not both hold {k} ids for every probe")
    wanted = exact[:, :k]
    asked = int((wanted >= 0).sum())
    if not asked:
        raise ValueError("the exact search found nothing to compare with")
    hits = sum(int(((wanted[:, [i]] == served[:, :k]).any(axis=1) & (wanted[:, i] >= 0)).sum()) for i in range(k))
    return hits / asked


@dataclass(frozen=True, eq=False)
class _Outcomes:
    """The result of every probe, `[probes]` each.

    `rank` and `own_score` are those of its subject, `best_score` is the best of all. `cut_off` marks a list that ends
    before its subject. `shown` is how many subjects the list shows.
    """

    rank: NDArray[np.int64]
    own_score: NDArray[np.floating[Any]]
    best_score: NDArray[np.floating[Any]]
    cut_off: NDArray[np.bool_]
    shown: NDArray[np.int64]


def _outcomes(
    candidate_subjects: NDArray[np.integer[Any]],
    candidate_scores: NDArray[np.floating[Any]],
    probe_subjects: NDArray[np.integer[Any]],
    mated: NDArray[np.bool_],
) -> _Outcomes:
    _check(candidate_subjects, candidate_scores, probe_subjects, mated)
    present = candidate_subjects >= 0
    scores = np.where(present, candidate_scores, -np.inf)
    own = present & (candidate_subjects == probe_subjects[:, None])
    if (own[~mated]).any():
        probe = int(np.flatnonzero(own.any(axis=1) & ~mated)[0])
        raise ValueError(
            f"probe {probe} is called non-mated, but its subject {probe_subjects[probe]} is in the gallery"
        )
    best = present & _first_of_subject(candidate_subjects)
    own_score = np.where(own, scores, -np.inf).max(axis=1, initial=-np.inf)
    found = own.any(axis=1)
    return _Outcomes(
        rank=np.where(found, (best & (scores >= own_score[:, None])).sum(axis=1), scores.shape[1] + 1),
        own_score=own_score,
        best_score=scores.max(axis=1, initial=-np.inf),
        cut_off=mated & ~found & present.all(axis=1),
        shown=best.sum(axis=1),
    )


def _fnir_of_draws(
    own: NDArray[np.floating[Any]],
    of_mated: NDArray[np.int64],
    non_mated: NDArray[np.floating[Any]],
    of_non_mated: NDArray[np.int64],
    target: float,
) -> NDArray[np.float64]:
    """Return FNIR at FPIR at most `target` in every draw, NaN where not even one false positive is allowed."""
    if not len(own) or not len(non_mated):
        return np.full(len(of_mated), np.nan)
    levels, group = np.unique(-non_mated, return_inverse=True)  # falling scores
    weight = np.zeros((len(of_non_mated), len(levels)))
    np.add.at(weight.T, group, of_non_mated.T)
    positives = weight.cumsum(axis=1)
    allowed = target * positives[:, -1]
    too_low = (positives > allowed[:, None] + 1e-9).argmax(axis=1)  # the highest score at which too many would match
    order = np.argsort(own, kind="stable")
    missed = np.concatenate([np.zeros((len(of_mated), 1)), of_mated[:, order].cumsum(axis=1)], axis=1)
    at = np.searchsorted(own[order], -levels[too_low], side="right")
    fnir = missed[np.arange(len(missed)), at] / missed[:, -1]
    return np.where(allowed >= 1 - 1e-9, fnir, np.nan)


def _check(
    candidate_subjects: NDArray[np.integer[Any]],
    candidate_scores: NDArray[np.floating[Any]],
    probe_subjects: NDArray[np.integer[Any]],
    mated: NDArray[np.bool_],
) -> None:
    shapes = candidate_subjects.shape, candidate_scores.shape, probe_subjects.shape, mated.shape
    if candidate_subjects.ndim != 2 or shapes[0] != shapes[1] or not shapes[2] == shapes[3] == shapes[0][:1]:
        raise ValueError(f"candidates, scores, probes, mated have shapes {shapes}; pass [P, k], [P, k], [P], [P]")
    present = candidate_subjects >= 0
    if not np.isfinite(candidate_scores[present]).all():
        raise ValueError("candidate scores hold NaN or infinity")
    rising = present[:, 1:] & (~present[:, :-1] | (candidate_scores[:, 1:] > candidate_scores[:, :-1]))
    if rising.any():
        raise ValueError(
            f"the candidates of probe {int(np.flatnonzero(rising.any(axis=1))[0])} are not sorted, best first"
        )


def _first_of_subject(candidate_subjects: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Mark the first, so the best, candidate of every subject in each row."""
    first = np.ones(candidate_subjects.shape, dtype=bool)
    for place in range(1, candidate_subjects.shape[1]):
        first[:, place] = (candidate_subjects[:, :place] != candidate_subjects[:, [place]]).all(axis=1)
    return first


def _rank_rate(wanted: int, rank: NDArray[np.int64], too_short: int) -> Estimate:
    if not len(rank):
        return Estimate(value=None, reason="no mated probe")
    if too_short:
        reason = f"the lists of {too_short} probes end before they show {wanted} subjects; search deeper (larger k)"
        return Estimate(value=None, reason=reason)
    return Estimate(value=float(np.mean(rank <= wanted)))


def _fnir(scores: ScoreCounts, target: float) -> Estimate:
    point = operating_point(scores, target)
    if point.threshold is not None:
        return Estimate(value=point.fnmr)
    if not scores.n_genuine:
        reason = "no mated probe"
    elif scores.n_impostor < fewest_for(target):
        reason = f"FPIR {target:g} needs {fewest_for(target)} non-mated probes or more; found {scores.n_impostor}"
    else:
        reason = f"too many non-mated probes tie at the largest score for FPIR {target:g}"
    return Estimate(value=None, reason=reason)


def _best_of_all(asked: torch.Tensor, enrolled: torch.Tensor, k: int) -> torch.Tensor:
    """Return the best keys of each probe among the first gallery rows, `[probes, k]`, falling; -1 where there is none.

    A key is one integer for score and row: the larger one is the better score or, on a tie, the lower row.
    """
    scores = shift_to_grid(asked @ enrolled.T).view(torch.int32)
    scores -= _BITS_OF_TWO
    numbers = torch.arange(len(enrolled), device=scores.device)
    keys = (scores.to(torch.int64) << _ROW_BITS) + ((1 << _ROW_BITS) - 1 - numbers)
    best = keys.new_full((len(asked), k), -1)
    found = min(k, len(enrolled))
    best[:, :found] = keys.topk(found, dim=1).values
    return best


def _merged(best: torch.Tensor, asked: torch.Tensor, enrolled: torch.Tensor, first_row: int) -> torch.Tensor:
    """Return the best keys of each probe, `[probes, k]`, falling, after further gallery rows; see `_best_of_all`."""
    scores = shift_to_grid(asked @ enrolled.T).view(torch.int32)
    scores -= _BITS_OF_TWO
    lowest = (best[:, -1:] >> _ROW_BITS).to(torch.int32)
    probe, row = (scores >= lowest).nonzero(as_tuple=True)
    keys = (scores[probe, row].to(torch.int64) << _ROW_BITS) + ((1 << _ROW_BITS) - 1 - first_row) - row
    found = torch.bincount(probe, minlength=len(best))
    place = torch.arange(len(probe), device=probe.device) - (found.cumsum(0) - found)[probe]
    candidates = best.new_full((len(best), int(found.max())), -1)
    candidates[probe, place] = keys
    return torch.cat([best, candidates], dim=1).topk(best.shape[1], dim=1).values
