"""What a score means: the FMR of a release at a score, and the score at an FMR, from its evaluation.

The evaluation counts all impostor pairs of the held-out subjects and keeps the counts at fixed FMRs, ten a decade
(`metrics.verification.fmr_by_score`). Nothing is interpolated: between two of them the larger FMR is returned.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from schemas.errors import SettingsError, StoreError, first_line
from schemas.metrics import ALL, HELD_OUT, rate_text
from schemas.releases import Release
from schemas.reports import ScoreFmr
from storage.layout import REPORT_METRICS, report_folder
from storage.location import Location


@dataclass(frozen=True)
class ReleaseRates:
    """The FMR by score of each mode that was measured."""

    release: str
    by_mode: Mapping[str, ScoreFmr]

    def of(self, mode: str) -> ScoreFmr:
        """Return that of a mode. Raises StoreError where it was not measured."""
        found = self.by_mode.get(mode)
        if found is None:
            raise StoreError(
                f"release {self.release}: the FMR of {mode} was not measured, for want of labelled held-out subjects."
            )
        return found


def release_rates(store: Location, release: Release) -> ReleaseRates:
    """Return the FMR by score of each mode of a release, over held-out subjects, else over all labelled ones.

    Raises:
        StoreError: its evaluation cannot be read.
    """
    place = store / f"{report_folder(release.release)}/{REPORT_METRICS}"
    found: dict[str, ScoreFmr] = {}
    try:
        populations = json.loads(place.read_bytes())["evaluation"]["populations"]
        for name in (ALL, HELD_OUT):
            for mode, result in populations.get(name, {"modes": {}})["modes"].items():
                rates = _rates_of(result)
                if rates.scores:
                    found[mode] = rates
    except FileNotFoundError:
        return ReleaseRates(release.release, {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{place.uri}: cannot be read as an evaluation ({first_line(error)}); restore it from a backup."
        ) from error
    return ReleaseRates(release.release, found)


def _rates_of(result: dict[str, Any]) -> ScoreFmr:
    """Return the FMR by score in the record of a mode; earlier builds wrote the points of `[evaluation] fmrs` only."""
    if result.get("fmr_by_score"):
        return ScoreFmr.model_validate(result["fmr_by_score"])
    pairs = result["cells"][ALL]
    points = [
        (float(fmr), score, pairs["fmr_global"][fmr])
        for fmr, score in result["thresholds"].items()
        if score is not None
    ]
    points.sort(reverse=True)
    return ScoreFmr(
        n_impostor=pairs["n_impostor"],
        targets=[target for target, _, _ in points],
        scores=[score for _, score, _ in points],
        fmr=[reached for _, _, reached in points],
    )


def threshold_at(rates: ScoreFmr, fmr: float | str, of: str) -> float:
    """Return the smallest tabulated score whose FMR is at most `fmr`.

    Args:
        rates: of a mode.
        fmr: between 0 and 1.
        of: release and mode, for the message.

    Raises:
        SettingsError: `fmr` is no rate, or so small that the impostor pairs do not show it.
    """
    try:
        wanted = float(rate_text(fmr))
    except ValueError as error:
        raise SettingsError(f"fmr: {error}.") from error
    for score, reached in zip(rates.scores, rates.targets, strict=True):
        if reached <= wanted:
            return score
    raise SettingsError(
        f"fmr {rate_text(fmr)}: not estimable from {rates.n_impostor:,} impostor pairs; the smallest FMR that was "
        f"measured for {of} is {rate_text(rates.targets[-1])}."
    )


def fmr_at(rates: ScoreFmr, scores: Any) -> Any:
    """Return the FMR at a score or at an array of scores, NaN at −inf: the share of impostor pairs that score as high.

    Between two tabulated scores it is the FMR at the lower one, so the truth is at most what is returned.
    """
    at = np.searchsorted(np.asarray(rates.scores), np.asarray(scores, np.float64), side="right") - 1
    found = np.where(at < 0, 1.0, np.asarray(rates.fmr)[np.maximum(at, 0)])
    found = np.where(np.isneginf(scores), np.nan, found)
    return float(found) if np.ndim(scores) == 0 else found
