"""Identification: 1:N search with frontal rows enrolled and profile rows as probes, exact and through a FAISS index.

One subject in five is left out of the gallery, so that there are searches whose right answer is "nobody" (non-mated
probes, ISO/IEC 19795-1). A probe is never a row of the gallery, nor does it find a byte-identical copy of itself there.
The rates are those of `metrics.identification` under exact search. The same search with query expansion is measured
beside it: a probe is expanded with rows of this gallery alone, never with another probe or a copy of itself. So is an
index that the settings build over this gallery, unless it is exact itself. The index of the release holds other rows
and may be of another kind: its recall is measured when it is written (`tasks.index`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from metrics.expansion import expanded
from metrics.identification import Identification, exact_search, identification_difference, identify, recall_at_k
from metrics.poses import FRONTAL, PROFILE
from models.inference import torch_device
from schemas.index import IndexSettings
from schemas.reports import Estimate, ExpandedRates, ExpansionResult, IdentificationResult
from schemas.settings import EvaluationSettings
from storage.vectors.exact import unit_rows
from storage.vectors.index import EXACT_KIND, build, choose_factory

RANKS = (1, 5, 10)
FPIRS = ("1e-1", "1e-2", "1e-3")
NON_MATED_SHARE = 5
MEASURED_EXPAND = 5
"""Rows of the query expansion that is measured where `[query] expand` is 0."""
ENROLLED = {"1": (1, 1), "2 to 4": (2, 4), "5 or more": (5, None)}
_BLOCK_NUMBERS = 2**22  # of rows that expand some probes
_Lists = tuple[np.ndarray, np.ndarray]
"""Scores and gallery rows `[probes, k]`, best first."""


def identify_mode(
    features: np.ndarray,
    subjects: np.ndarray,
    classes: np.ndarray,
    duplicates: np.ndarray,
    index: IndexSettings,
    settings: EvaluationSettings,
    expand: int = MEASURED_EXPAND,
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
        expand: with how many rows a query is expanded.
    """
    chosen = _experiment(subjects, classes, duplicates, settings.seed)
    if chosen is None:
        return None
    gallery, probes = chosen.gallery, chosen.probes
    mated = np.isin(subjects[probes], subjects[gallery])
    # So deep that ten subjects are seen, however many rows each of them has enrolled, and after copies are taken out.
    depth = min(len(gallery), max(RANKS[-1] * _most(subjects[gallery]), expand))
    k = min(len(gallery), depth + _most(duplicates[gallery]))

    def without_copies(scores: np.ndarray, rows: np.ndarray) -> _Lists:
        """Return scores and gallery rows, those that are no copies of the probe, then row -1."""
        found = (rows >= 0) & (duplicates[gallery][rows] != duplicates[probes][:, None])
        order = np.argsort(~found, axis=1, kind="stable")[:, :depth]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(np.where(found, rows, -1), order, axis=1)

    def rates(lists: _Lists, among: np.ndarray | None = None, resamples: int = settings.resamples) -> Identification:
        scores, rows = lists
        return identify(
            np.where(rows < 0, -1, subjects[gallery][rows]),
            scores,
            subjects[probes],
            mated,
            among=among,
            ranks=RANKS,
            fpir_points=tuple(map(float, FPIRS)),
            resamples=resamples,
            seed=settings.seed,
        )

    device = torch_device(settings.device)
    scores, rows = exact_search(features[gallery], features[probes], k, device=device)
    plain = without_copies(scores, rows)
    exact = rates(plain)
    moved = _expanded(features[gallery], features[probes], plain[0][:, :expand], plain[1][:, :expand])
    with_it = without_copies(*exact_search(features[gallery], moved, k, device=device))
    everybody = _compared("any", exact, rates(with_it))
    groups = [everybody]
    enrolled = np.bincount(subjects[gallery], minlength=int(subjects.max()) + 1)[subjects[probes]]
    for name, (least, most) in ENROLLED.items():
        among = mated & (enrolled >= least) & (enrolled <= (most or len(gallery)))
        if among.any() and among.sum() == mated.sum():
            groups.append(everybody.replaced(enrolled=name))
        elif among.any():
            groups.append(_compared(name, rates(plain, among), rates(with_it, among)))
    kind, by_index, recall = choose_factory(len(gallery), features.shape[1], index), exact, dict.fromkeys((1, 10), 1.0)
    if kind != EXACT_KIND:
        through = build(
            lambda: iter([(np.arange(len(gallery), dtype=np.int64), features[gallery])]),
            len(gallery),
            features.shape[1],
            index,
        )
        index_scores, keys = through.search(features[probes], k)
        by_index = rates(without_copies(index_scores, keys), resamples=0)
        recall = {depth: recall_at_k(keys, rows, depth) for depth in recall if depth <= k}
    return IdentificationResult(
        gallery=chosen.names[0],
        probes=chosen.names[1],
        n_gallery=len(gallery),
        n_gallery_subjects=len(np.unique(subjects[gallery])),
        n_mated=exact.n_mated,
        n_non_mated=exact.n_non_mated,
        rank=_by_rank(exact.rank),
        fnir=_by_fpir(exact.fnir),
        index_kind=kind,
        index_rank={str(rank): by_index.rank[rank].value for rank in RANKS},
        index_recall={str(depth): found for depth, found in recall.items() if depth <= k},
        expansion=ExpansionResult(rows=expand, groups=groups),
    )


def _expanded(gallery: np.ndarray, probes: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return probes expanded with the gallery rows found for each, float32 `[P, D]` at length 1; row -1 is none."""
    dim = gallery.shape[1]
    unit, moved = unit_rows(gallery, dim), unit_rows(probes, dim)
    step = max(1, _BLOCK_NUMBERS // (max(1, rows.shape[1]) * dim))
    for start in range(0, len(moved), step):
        part = slice(start, start + step)
        moved[part] = expanded(moved[part], unit[rows[part]], np.where(rows[part] < 0, -np.inf, scores[part]))
    return moved


def _compared(enrolled: str, plain: Identification, with_it: Identification) -> ExpandedRates:
    rank, fnir = identification_difference(plain, with_it)
    return ExpandedRates(
        enrolled=enrolled,
        n_mated=with_it.n_mated,
        rank=_by_rank(with_it.rank),
        fnir=_by_fpir(with_it.fnir),
        rank_difference=_by_rank(rank),
        fnir_difference=_by_fpir(fnir),
    )


def _by_rank(found: Mapping[int, Estimate]) -> dict[str, Estimate]:
    return {str(rank): found[rank] for rank in RANKS}


def _by_fpir(found: Mapping[float, Estimate]) -> dict[str, Estimate]:
    return {name: found[float(name)] for name in FPIRS}


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
