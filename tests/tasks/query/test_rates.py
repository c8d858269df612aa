"""The FMR of a release is read from its evaluation, also from that of an earlier build; a damaged one is refused."""

import json
import shutil

import pytest

import frontalis
from schemas.errors import StoreError
from storage.layout import REPORT_METRICS, report_folder


def test_evaluations_of_earlier_builds_and_damaged_ones(measured_store, tmp_path) -> None:
    uri = shutil.copytree(measured_store, tmp_path / "store")
    file = uri / report_folder("r1") / REPORT_METRICS
    document = json.loads(file.read_bytes())
    for population in document["evaluation"]["populations"].values():
        for mode in population["modes"].values():
            mode["fmr_by_score"] = None
    file.write_text(json.dumps(document))
    with frontalis.open_store(str(uri)) as old, frontalis.open_store(measured_store) as new:
        for fmr in ("1e-1", "1e-2", "1e-3"):  # the points of `[evaluation] fmrs` are there in either
            threshold = new.threshold("per_sample", fmr)
            assert old.threshold("per_sample", fmr) == threshold
            assert old.fmr("per_sample", threshold) == new.fmr("per_sample", threshold)
        assert old.threshold("per_sample", 0.05) == new.threshold("per_sample", 0.01)
    for content in (b"", b"[]", b'{"evaluation": {"populations": {"all": {"modes": {"raw": {}}}}}}'):
        file.write_bytes(content)
        with (
            frontalis.open_store(str(uri)) as damaged,
            pytest.raises(StoreError, match="cannot be read as an evaluation"),
        ):
            damaged.fmr("raw", 0.5)
