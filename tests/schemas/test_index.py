"""Settings that cannot be meant are refused where they are written."""

import pytest
from pydantic import ValidationError

from schemas.index import IndexSettings


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_budget_gb": 0},
        {"memory_budget_gb": float("inf")},
        {"training_rows": 10},
        {"nprobe": 0},
        {"ef_search": 0},
        {"rebuild_share": 1.1},
        {"gpu": "always"},
        {"seed": -1},
        {"factory": ""},
        {"n_probe": 4},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_meant_is_refused_by_name(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        IndexSettings.model_validate(wrong)


def test_settings_do_not_change_behind_a_run():
    with pytest.raises(ValidationError, match="frozen"):
        IndexSettings().nprobe = 3
