"""Records of an evaluation: numbers or reasons, never a silent not-a-number, unchanged through `metrics.json`."""

import json

import pytest
from pydantic import ValidationError

from schemas.reports import CellResult, Curve, Estimate, Histogram, ModeResult, Population

MISSING = Estimate(value=None, reason="not estimable: 12 impostor pairs are too few")
CELL = CellResult(
    n_genuine=3,
    n_impostor=12,
    eer=Estimate(value=1 / 3, low=0.0, high=0.5),
    auc=Estimate(value=0.9),
    d_prime=None,
    fnmr={"1e-1": Estimate(value=0.25), "1e-3": MISSING},
    fnmr_global={"1e-1": Estimate(value=0.25), "1e-3": MISSING},
    fmr_global={"1e-1": 0.1, "1e-3": None},
    det=Curve(fmr=[0.0, 0.1], fnmr=[1.0, 0.25]),
    histogram=Histogram(edges=[-1.0, 0.0, 1.0], genuine=[0.0, 1.0], impostor=[1.0, 0.0]),
)


def population(cell: CellResult) -> Population:
    mode = ModeResult(mode="raw", model_digest=None, thresholds={"1e-1": 0.4, "1e-3": None}, cells={"all": cell})
    return Population(name="all", n_rows=9, n_subjects=3, left_out_subjects=0, left_out_rows=0, modes={"raw": mode})


def test_values_and_reasons_come_back_from_json_as_they_were() -> None:
    before = population(CELL)
    text = before.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Population.model_validate_json(text) == before


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused_where_it_arises(number: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Estimate(value=number)
    with pytest.raises(ValidationError, match="finite number"):
        Curve(fmr=[0.0, number], fnmr=[1.0, 0.5])
    with pytest.raises(ValidationError, match="finite number"):
        CellResult(**{**dict(CELL), "d_prime": number})
