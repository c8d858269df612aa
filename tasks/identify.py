"""Identify: 1:N search with frontal rows enrolled and profile rows as probes, exact and through a FAISS index.

One subject in five is left out of the gallery, so that there are searches whose right answer is "nobody" (non-mated
probes, ISO/IEC 19795-1). Probes are never rows of the gallery, so its recall is not flattered. The rates are those of
`metrics.identification`; the exact search is the truth, the index's loss stands beside it.
"""

import numpy as np

from metrics.identification import Bounds, exact_search, identify, identify_intervals, recall_at_k
from metrics.poses import POSE_CLASSES
from schemas.index import IndexSettings
from schemas.reports import Estimate, IdentificationResult
from schemas.settings import EvaluationSettings
from storage.indexes import build

RANKS = (1, 5, 10)
FPIRS = ("1e-1", "1e-2", "1e-3")
NON_MATED_SHARE = 5


def identify_mode(
    features: np.ndarray, subjects: np.ndarray, classes: np.ndarray, index: IndexSettings, settings: EvaluationSettings
) -> IdentificationResult | None:
    """Measure identification of one mode; None where no subject has both a gallery row and a probe.

    Args:
        features: float32 `[N, D]`, not normalised.
        subjects: int64 codes `[N]`.
        classes: codes into `POSE_CLASSES`. Where there is no frontal or no profile row, each subject's first row is
            enrolled and the others are probes.
        index: how the gallery's index is built.
        settings: the seed that draws the subjects left out.
    """
    frontal = classes == POSE_CLASSES.index("frontal")
    profile = classes == POSE_CLASSES.index("profile")
    names = ("frontal", "profile")
    if not len(np.intersect1d(subjects[frontal], subjects[profile])):
        frontal = np.zeros(len(subjects), bool)
        frontal[np.unique(subjects, return_index=True)[1]] = True
        profile, names = ~frontal, ("first row", "other rows")
    both = np.intersect1d(subjects[frontal], subjects[profile])
    if len(both) < 2:
        return None
    left_out = np.random.default_rng(settings.seed).permutation(both)[: max(1, len(both) // NON_MATED_SHARE)]
    gallery = np.flatnonzero(frontal & ~np.isin(subjects, left_out))
    probes = np.flatnonzero(profile)
    if not len(gallery):
        return None
    mated = np.isin(subjects[probes], subjects[gallery])
    # So deep that ten subjects are seen, however many rows each of them has enrolled.
    k = min(len(gallery), RANKS[-1] * int(np.unique(subjects[gallery], return_counts=True)[1].max()))
    scores, rows = exact_search(features[gallery], features[probes], k)
    exact = identify(
        subjects[gallery][rows], scores, subjects[probes], mated, ranks=RANKS, fpir_points=tuple(map(float, FPIRS))
    )
    by_rank, by_fpir = _intervals(subjects[gallery][rows], scores, subjects[probes], mated, settings)
    served = build(
        lambda: iter([(np.arange(len(gallery), dtype=np.int64), features[gallery])]),
        len(gallery),
        features.shape[1],
        index,
    )
    served_scores, keys = served.search(features[probes], k)
    through = identify(
        np.where(keys < 0, -1, subjects[gallery][keys]), served_scores, subjects[probes], mated, ranks=RANKS
    )
    return IdentificationResult(
        gallery=names[0],
        probes=names[1],
        n_gallery=len(gallery),
        n_gallery_subjects=len(np.unique(subjects[gallery])),
        n_mated=exact.n_mated,
        n_non_mated=exact.n_non_mated,
        rank={str(one.rank): _estimate(one.rate, one.reason, by_rank.get(one.rank)) for one in exact.ranks},
        fnir={
            name: _estimate(point.fnir, point.reason, by_fpir.get(point.target_fpir))
            for name, point in zip(FPIRS, exact.points, strict=True)
        },
        served_rank={str(one.rank): one.rate for one in through.ranks},
        recall={str(depth): recall_at_k(keys, rows, depth) for depth in (1, 10) if depth <= k},
    )


def _intervals(
    candidates: np.ndarray, scores: np.ndarray, subjects: np.ndarray, mated: np.ndarray, settings: EvaluationSettings
) -> tuple[dict[int, Bounds], dict[float, Bounds]]:
    if not settings.resamples or len(np.unique(subjects)) < 2:
        return {}, {}
    return identify_intervals(
        candidates,
        scores,
        subjects,
        mated,
        ranks=RANKS,
        fpir_points=tuple(map(float, FPIRS)),
        resamples=settings.resamples,
        seed=settings.seed,
    )


def _estimate(value: float | None, reason: str | None, bounds: Bounds) -> Estimate:
    if value is None or bounds is None:
        return Estimate(value=value, reason=reason)
    return Estimate(value=value, low=bounds[0], high=bounds[1])
