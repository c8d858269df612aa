"""The release record survives the store to the last digit, and its name follows from its content."""

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from schemas.releases import IndexRef, ModelRef, Release, release_name
from schemas.reports import DataQuality, Estimate, GateDecision, ShardFault

RELEASE = Release(
    release="r00007-0123abcd",
    number=7,
    created=datetime(2026, 3, 14, 2, 0, 0, 123456, tzinfo=UTC),
    content="0123abcd" * 4,
    source="s3://faces/shards",
    features_version=41,
    quarantine_version=None,
    models={"per_sample": ModelRef(path="models/x", file_digest="a", digest="b", statistic="frozen", dim=192)},
    indexes={
        "raw": IndexRef(
            path="i", digest="d", size=2**40, ids_path="j", ids_digest="e", rows=2**33, dim=192, factory="Flat"
        )
    },
    data=DataQuality(
        shards=2,
        rows_read=9,
        rows_features=6,
        quarantined={"zero_norm": 3},
        bad_shards=[ShardFault(shard="ü\n<b>", reason="truncated", kept=True)],
    ),
    gate=GateDecision(promoted=False, reason="worse by 0.3 points"),
    gated={"raw": Estimate(value=0.1 + 0.2, low=1e-300, high=1.0), "per_sample": Estimate(value=None, reason="few")},
    gated_name="frontal–profile EER",
    report=None,
    settings={"columns": {"keep": ["camera"]}, "wait": 0.5},
)


def test_a_record_comes_back_from_json_as_it_was() -> None:
    again = Release.model_validate_json(RELEASE.model_dump_json())
    assert again == RELEASE
    assert again.created.utcoffset() is not None
    assert again.gated["raw"].value == 0.30000000000000004


def test_an_older_program_does_not_misread_a_newer_record() -> None:
    newer = RELEASE.model_dump_json().replace('"number":7', '"number":7,"shards_per_index":3')
    with pytest.raises(ValidationError, match="shards_per_index"):
        Release.model_validate_json(newer)


def test_equal_content_under_one_number_has_one_name_and_names_sort_by_number() -> None:
    assert release_name(7, RELEASE.content) == RELEASE.release
    assert release_name(7, "f" * 32) != RELEASE.release
    numbers = [1, 9, 10, 99, 12_345]
    names = [release_name(number, "f" * 32) for number in numbers]
    assert names == sorted(names)
