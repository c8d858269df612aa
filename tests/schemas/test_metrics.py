"""Metric ids and pose cells: one spelling each, whatever was typed."""

import pickle

import pytest
from pydantic import BaseModel, ValidationError

from schemas.metrics import AUC, EER, MetricId, measured_modes, pose_cell, rate_text


class Holder(BaseModel):
    metric: MetricId
    values: dict[MetricId, float] = {}


@pytest.mark.parametrize(
    ("text", "kind", "fmr", "is_global"),
    [
        ("eer", "eer", None, False),
        ("auc", "auc", None, False),
        ("fnmr@1e-3", "fnmr", 1e-3, False),
        ("fnmr_global@1e-3", "fnmr_global", 1e-3, True),
        ("fmr_global@2.5e-2", "fmr_global", 0.025, True),
    ],
)
def test_an_id_is_read_and_printed(text: str, kind: str, fmr: float | None, is_global: bool) -> None:
    metric = MetricId(text)
    assert (str(metric), metric.kind, metric.fmr, metric.is_global) == (text, kind, fmr, is_global)
    assert metric.fmr_text == text.partition("@")[2]


@pytest.mark.parametrize("spelling", ["0.001", "1e-3", "1E-03", ".001", "1.0e-3"])
def test_a_rate_has_one_spelling(spelling: str) -> None:
    assert rate_text(spelling) == "1e-3"
    assert MetricId(f"fnmr@{spelling}") == MetricId.at("fnmr", 0.001) == "fnmr@1e-3"


@pytest.mark.parametrize(
    "text", ["", "EER", "rank", "eer@1e-3", "auc@", "fnmr", "fnmr@", "fnmr@eer", "fnmr@1", "fnmr@nan"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is unknown; use 'eer'|is no rate between 0 and 1"):
        MetricId(text)
    with pytest.raises(ValidationError):
        Holder(metric=text)  # type: ignore[arg-type]


def test_it_goes_through_json_and_pickle_as_itself() -> None:
    holder = Holder(metric=EER, values={AUC: 0.5, MetricId("fnmr@0.01"): 0.25})
    assert holder.model_dump_json() == '{"metric":"eer","values":{"auc":0.5,"fnmr@1e-2":0.25}}'
    again = Holder.model_validate_json(holder.model_dump_json())
    assert again == holder
    assert {type(metric) for metric in (again.metric, *again.values)} == {MetricId}
    assert type(pickle.loads(pickle.dumps(EER))) is MetricId


def test_cells_and_modes_have_one_order() -> None:
    assert pose_cell("profile", "frontal") == pose_cell("frontal", "profile") == "frontal-profile"
    assert pose_cell("unknown", "half") == "half-unknown"
    with pytest.raises(ValueError, match="left"):
        pose_cell("left", "half")
    assert measured_modes({"batch_stat": 1, "per_sample": 2}) == ["raw", "per_sample", "batch_stat"]
    assert measured_modes(["batch_stat"]) == ["raw", "batch_stat"]
