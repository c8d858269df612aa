"""The layout: every name that Frontalis gives is its own, no other is, and versions are read from names."""

import pytest

from schemas.features import FeatureKey
from storage import layout

KEY = FeatureKey("raw", "part-0", "0a", "0b")
RELEASE = "r00007-0123abcd"
OWN = [
    f"{layout.FEATURES}/{KEY.path}",
    f"{layout.QUARANTINE}/{KEY.quarantine_path}",
    f"{layout.RELEASES}/{layout.history_name(12, '0c')}",
    f"{layout.index_folder(RELEASE, 'raw')}/{layout.INDEX_FILE}",
    f"{layout.index_folder(RELEASE, 'raw')}/{layout.IDS_FILE}",
    f"{layout.report_folder(RELEASE)}/{layout.REPORT_PAGE}",
    f"{layout.report_folder(RELEASE)}/{layout.REPORT_METRICS}",
    f"{layout.report_folder(RELEASE)}/{layout.REPORT_PLOTS}/det.svg",
    layout.model_path("0d"),
    layout.SHARD_RECORDS,
    layout.row_keys_path("0e", "0f"),
]


@pytest.mark.parametrize("name", OWN)
def test_a_given_name_is_recognised_exactly(name: str) -> None:
    assert layout.is_own(name)
    assert not layout.is_own(f"backup/{name}")
    assert not layout.is_own(f"{name}.bak")
    assert not layout.is_temporary(name)


@pytest.mark.parametrize("name", [layout.LOCK, layout.TOMBSTONES, layout.FORGET_LOG, "features/_delta_log/0.json"])
def test_the_files_of_the_store_itself_are_never_unreferenced(name: str) -> None:
    assert not layout.is_own(name)
    assert not layout.is_temporary(name)


def test_temporary_names_differ_and_are_recognised_in_folders_of_the_store() -> None:
    first, second = layout.temporary_name(), layout.temporary_name()
    assert first != second
    assert layout.is_temporary(first)
    assert layout.is_temporary(f"{layout.FEATURES}/mode=raw/shard=a/{first}")
    assert not layout.is_temporary(f"notes/{first}")


def test_the_version_is_that_of_a_file_of_the_history() -> None:
    assert layout.history_version(f"{layout.RELEASES}/{layout.history_name(12, '0c')}") == 12
    assert layout.history_version(f"{layout.RELEASES}/0c.parquet") is None  # of an earlier build
    assert layout.history_version(OWN[0]) is None
