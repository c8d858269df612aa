"""Compare two releases of a store by the evaluations that were stored with them. Nothing is measured again."""

import json

from pydantic import BaseModel, Field, ValidationError

from schemas.errors import StoreError, first_line
from schemas.metrics import ALL, EER, HELD_OUT, MAIN_CELLS, MetricId
from schemas.releases import Release
from schemas.reports import Estimate, Evaluation
from storage.layout import REPORT_METRICS, report_folder
from storage.location import Location
from storage.releases import Releases

METRICS = (EER, MetricId("fnmr_global@1e-3"))


class ComparedRate(BaseModel):
    """One metric of one mode in one pose-pair cell, in both releases."""

    cell: str
    mode: str
    metric: str
    first: float | None
    second: float | None
    difference: Estimate | None = Field(
        description="second − first; with an interval, paired over the same subjects, where `second` was compared with "
        "`first` when it was made"
    )


class Comparison(BaseModel):
    """Two releases side by side, over held-out subjects or, without any, all labelled ones."""

    first: str
    second: str
    population: str
    rows: tuple[int, int] = Field(description="with features")
    subjects: tuple[int, int] = Field(description="measured on")
    models_changed: list[str] = Field(description="modes whose model differs")
    paired: bool = Field(description="whether differences are paired and have intervals")
    rates: list[ComparedRate]


def compare(store: str, first: str, second: str) -> Comparison:
    """Return two releases side by side.

    Args:
        store: local path or s3://…
        first: the one to start from, by name.
        second: the other one.

    Raises:
        SettingsError: there is no such store or release.
        StoreError: one of them was not measured, or its evaluation was removed or cannot be read.
    """
    place = Location(store)
    history = Releases.of(place)
    releases = history.named(first), history.named(second)
    before, after = (_evaluation(place, one.release) for one in releases)
    named = HELD_OUT if HELD_OUT in before.populations and HELD_OUT in after.populations else ALL
    old, new = before.populations.get(named), after.populations.get(named)
    if old is None or new is None:
        raise StoreError(f"{first}, {second}: have no population in common that was measured.")
    paired = releases[1].gate.compared_with == releases[0].release
    rates = []
    for cell in MAIN_CELLS:
        for mode in [one for one in new.modes if one in old.modes]:
            was, now = old.modes[mode].cells.get(cell), new.modes[mode].cells.get(cell)
            for metric in METRICS if was is not None and now is not None else ():
                values = [one.estimate(metric) for one in (was, now) if one is not None]
                one, two = (found.value if found is not None else None for found in values)
                known = new.modes[mode].difference_to_served(cell, metric) if paired else None
                plain = Estimate(value=two - one) if one is not None and two is not None else None
                rates.append(
                    ComparedRate(cell=cell, mode=mode, metric=metric, first=one, second=two, difference=known or plain)
                )
    return Comparison(
        first=first,
        second=second,
        population=named,
        rows=(releases[0].data.rows_features, releases[1].data.rows_features),
        subjects=(old.n_subjects, new.n_subjects),
        models_changed=_changed(*releases),
        paired=paired,
        rates=rates,
    )


def _changed(first: Release, second: Release) -> list[str]:
    digests = [{mode: model.digest for mode, model in one.models.items()} for one in (first, second)]
    return sorted(mode for mode in digests[0] | digests[1] if digests[0].get(mode) != digests[1].get(mode))


def _evaluation(store: Location, release: str) -> Evaluation:
    place = store / f"{report_folder(release)}/{REPORT_METRICS}"
    try:
        return Evaluation.model_validate(json.loads(place.read_bytes())["evaluation"])
    except FileNotFoundError as error:
        raise StoreError(f"{place.uri}: is missing, so {release} was not measured, or was vacuumed.") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise StoreError(
            f"{place.uri}: cannot be read as an evaluation ({first_line(error)}); `frontalis evaluate --release "
            f"{release}` measures again."
        ) from error
