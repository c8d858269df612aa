"""Partition columns: values from the names of folders, typed as they are used, and their digest."""

import pyarrow as pa
import pytest

from schemas.settings import ColumnNames
from storage.partitions import Partition, hive_partitions, partition_digest

COLUMNS = ColumnNames(keep=("year", "site"))


def values_of(*folders: str, columns: ColumnNames = COLUMNS) -> list[dict[str, object]]:
    found = hive_partitions([f"{folder}/part-0.parquet" for folder in folders], columns)
    return [{one.name: one.value.as_py() for one in of_file} for of_file in found]


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("pose=frontal", {"pose": "frontal"}),
        ("pose=frontal/yaw=-12.5", {"pose": "frontal", "yaw": -12.5}),
        ("below/pose=a%20b%2Fc%3D%25", {"pose": "a b/c=%"}),
        ("subject=J%C3%BCrgen", {"subject": "Jürgen"}),
        ("subject=%ff", {"subject": "%ff"}),
        ("subject=007", {"subject": "007"}),
        ("subject=1.50", {"subject": "1.50"}),
        ("pose=__HIVE_DEFAULT_PARTITION__", {"pose": None}),
        ("pose=", {"pose": None}),
        ("yaw=045", {"yaw": 45.0}),
        ("yaw=left", {"yaw": "left"}),
        ("yaw=__HIVE_DEFAULT_PARTITION__", {"yaw": None}),
        ("pose=frontal/pose=profile", {"pose": "profile"}),
        ("year=2026", {"year": 2026}),
        ("year=-1.5e3", {"year": -1500.0}),
        ("year=2026-01-31", {"year": "2026-01-31"}),
        ("year=", {"year": None}),
        ("id=18", {"id": 18}),
        ("id=000018", {"id": "000018"}),
        ("id=12345678901234567890", {"id": "12345678901234567890"}),
        ("date=2026-01-31", {}),
        ("Pose=frontal", {}),
        ("pose", {}),
        ("shard=a/mode=raw", {}),
        (".", {}),
    ],
)
def test_the_folders_of_a_file_give_the_columns_that_the_settings_name(folder: str, found: dict[str, object]) -> None:
    assert values_of(folder) == [found]


def test_a_file_name_is_no_folder() -> None:
    assert hive_partitions(["pose=frontal.parquet", "a.parquet"], COLUMNS) == [(), ()]


def test_a_kept_column_has_one_type_in_all_files_and_an_angle_its_own() -> None:
    assert values_of("year=1", "year=2", "other") == [{"year": 1}, {"year": 2}, {}]
    assert values_of("year=1", "year=2.5", "year=") == [{"year": 1.0}, {"year": 2.5}, {"year": None}]
    assert values_of("year=1", "year=05") == [{"year": "1"}, {"year": "05"}]
    assert values_of("yaw=1", "yaw=left") == [{"yaw": 1.0}, {"yaw": "left"}]


def test_renamed_columns_are_found_under_their_own_name() -> None:
    columns = ColumnNames(subject="person", pose="view")
    assert values_of("person=7/view=frontal/pose=no", columns=columns) == [{"person": "7", "view": "frontal"}]


def test_the_digest_follows_names_types_and_values_and_a_null_is_a_missing_column() -> None:
    def digest(*values: tuple[str, object, pa.DataType]) -> str:
        return partition_digest(tuple(Partition(name, pa.scalar(value, kind)) for name, value, kind in values))

    text, number = pa.string(), pa.int64()
    assert digest() == digest(("pose", None, text)) == ""
    different = [
        digest(("pose", "a", text)),
        digest(("pose", "b", text)),
        digest(("subject", "a", text)),
        digest(("year", 1, number)),
        digest(("year", "1", text)),
        digest(("pose", "a", text), ("year", 1, number)),
    ]
    assert len(set(different)) == len(different)
