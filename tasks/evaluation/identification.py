"""Identification: 1:N search with frontal rows enrolled and profile rows as probes, exact and through a FAISS index.

One subject in five is left out of the gallery, so that there are searches whose right answer is "nobody" (non-mated
probes, ISO/IEC 19795-1). A probe is never a row of the gallery, nor does it find a byte-identical copy of itself there.
The rates are those of `metrics.identification` under exact search. An index that the settings build over this gallery
is measured beside it, unless it is exact itself. The index of the release holds other rows and may be of another kind:
its recall is measured when it is written (`tasks.index`).
"""

from dataclasses import dataclass

import numpy as np

from metrics.identification import exact_search, identify, recall_at_k
from metrics.poses import FRONTAL, PROFILE
from models.inference import torch_device
from schemas.index import IndexSettings
from schemas.reports import IdentificationResult
from schemas.settings import EvaluationSettings
from storage.vectors.index import EXACT_KIND, build, choose_factory

RANKS = (1, 5, 10)
FPIRS = ("1e-1", "1e-2", "1e-3")
NON_MATED_SHARE = 5


def identify_mode(
    features: np.ndarray,
    subjects: np.ndarray,
    classes: np.ndarray,
    duplicates: np.ndarray,
    index: IndexSettings,
    settings: EvaluationSettings,
) -> IdentificationResult | None:
    """Measure identification of one mode; None where fewer than two subjects have both a gallery row and a probe.

    Args:
        features: float32 `[N, D]`, not normalised.
        subjects: int64 codes `[N]`.
        classes: codes into `POSE_CLASSES`. Where there is no frontal or no profile row, each subject's first row is
            enrolled and the others are probes.
        duplicates: int64 codes `[N]`; rows of one code are never found by one another. A probe whose subject is
            enrolled with nothing but copies of it is left out.
        index: how the gallery's index is built.
        settings: the seed that draws the subjects left out, the resamples, the device.
    """
    chosen = _experiment(subjects, classes, duplicates, settings.seed)
    if chosen is None:
        return None
    gallery, probes = chosen.gallery, chosen.probes
    mated = np.isin(subjects[probes], subjects[gallery])
    # So deep that ten subjects are seen, however many rows each of them has enrolled, and after copies are taken out.
    depth = min(len(gallery), RANKS[-1] * _most(subjects[gallery]))
    k = min(len(gallery), depth + _most(duplicates[gallery]))

    def candidates(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return subjects and scores of gallery rows found, those that are no copies of the probe, then -1."""
        found = (rows >= 0) & (duplicates[gallery][rows] != duplicates[probes][:, None])
        order = np.argsort(~found, axis=1, kind="stable")[:, :depth]
        names = np.where(found, subjects[gallery][rows], -1)
        return np.take_along_axis(names, order, axis=1), np.take_along_axis(scores, order, axis=1)

    scores, rows = exact_search(features[gallery], features[probes], k, device=torch_device(settings.device))
    names, sorted_scores = candidates(rows, scores)
    exact = identify(
        names,
        sorted_scores,
        subjects[probes],
        mated,
        ranks=RANKS,
        fpir_points=tuple(map(float, FPIRS)),
        resamples=settings.resamples,
        seed=settings.seed,
    )
    kind, by_index, recall = choose_factory(len(gallery), features.shape[1], index), exact, dict.fromkeys((1, 10), 1.0)
    if kind != EXACT_KIND:
        through = build(
            lambda: iter([(np.arange(len(gallery), dtype=np.int64), features[gallery])]),
            len(gallery),
            features.shape[1],
            index,
        )
        index_scores, keys = through.search(features[probes], k)
        by_index = identify(*candidates(keys, index_scores), subjects[probes], mated, ranks=RANKS)
        recall = {depth: recall_at_k(keys, rows, depth) for depth in recall if depth <= k}
    return IdentificationResult(
        gallery=chosen.names[0],
        probes=chosen.names[1],
        n_gallery=len(gallery),
        n_gallery_subjects=len(np.unique(subjects[gallery])),
        n_mated=exact.n_mated,
        n_non_mated=exact.n_non_mated,
        rank={str(rank): exact.rank[rank] for rank in RANKS},
        fnir={name: exact.fnir[float(name)] for name in FPIRS},
        index_kind=kind,
        index_rank={str(rank): by_index.rank[rank].value for rank in RANKS},
        index_recall={str(depth): found for depth, found in recall.items() if depth <= k},
    )


@dataclass(frozen=True)
class _Experiment:
    """Which rows are searched for in which, and what the two are called."""

    gallery: np.ndarray
    probes: np.ndarray
    names: tuple[str, str]


def _experiment(subjects: np.ndarray, classes: np.ndarray, duplicates: np.ndarray, seed: int) -> _Experiment | None:
    frontal = classes == FRONTAL
    profile = classes == PROFILE
    names = ("frontal", "profile")
    if not len(np.intersect1d(subjects[frontal], subjects[profile])):
        frontal = np.zeros(len(subjects), bool)
        frontal[np.unique(subjects, return_index=True)[1]] = True
        profile, names = ~frontal, ("first row", "other rows")
    both = np.intersect1d(subjects[frontal], subjects[profile])
    if len(both) < 2:
        return None
    left_out = np.random.default_rng(seed).permutation(both)[: max(1, len(both) // NON_MATED_SHARE)]
    gallery = np.flatnonzero(frontal & ~np.isin(subjects, left_out))
    probes = np.flatnonzero(profile)
    _, own = np.unique(np.stack([subjects, duplicates]), axis=1, return_inverse=True)
    enrolled = np.bincount(subjects[gallery], minlength=int(subjects.max()) + 1)[subjects]
    copies = np.bincount(own[gallery], minlength=int(own.max()) + 1)[own]
    probes = probes[(enrolled[probes] == 0) | (copies[probes] < enrolled[probes])]
    return _Experiment(gallery, probes, names) if len(gallery) and len(probes) else None


def _most(codes: np.ndarray) -> int:
    """Return how often the commonest code occurs."""
    return int(np.unique(codes, return_counts=True)[1].max())
