import numpy as np
import pytest

from metrics.poses import UNKNOWN, pose_classes
from schemas.metrics import POSE_CLASSES


def names(codes: np.ndarray) -> list[str]:
    return [POSE_CLASSES[code] for code in codes]


def test_both_sides_are_profile_and_unknown_words_are_unknown() -> None:
    labels = ["frontal", "half", "left", "right", "profile", "Frontal", "upside-down", "", None]
    assert names(pose_classes(labels)) == [
        *["frontal", "half", "profile", "profile", "profile", "frontal"],
        *["unknown", "unknown", "unknown"],
    ]


def test_yaw_decides_only_where_no_label_does() -> None:
    yaw = np.array([80.0, 0.0, -80.0, 10.0, np.nan])
    assert names(pose_classes(["frontal", "profile", None, "smiling", None], yaw)) == [
        *["frontal", "profile", "profile", "frontal", "unknown"],
    ]


def test_edges_belong_to_the_class_that_is_written_down() -> None:
    yaw = np.array([0, 15, -15, 15.1, 34.9, 35, -90, np.nan], dtype=np.float32)
    assert names(pose_classes(None, yaw)) == [
        *["frontal", "frontal", "frontal", "half", "half", "profile", "profile", "unknown"],
    ]
    assert names(pose_classes(None, yaw, edges=(0.0, 91.0)))[:3] == ["frontal", "half", "half"]


def test_another_vocabulary_can_be_named() -> None:
    assert names(pose_classes(["FACE", "side"], mapping={"face": "frontal", "Side": "profile"})) == [
        *["frontal", "profile"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None}, "pass labels, yaw, or both"),
        ({"labels": ["half"], "yaw": np.zeros(2)}, "1 labels, but 2 yaw angles"),
        ({"labels": ["half"], "edges": (40.0, 15.0)}, "do not rise"),
        ({"labels": ["half"], "mapping": {"half": "semi"}}, "semi"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pose_classes(**arguments)


def test_no_rows_give_no_codes() -> None:
    assert pose_classes([]).shape == (0,)
    assert pose_classes([None]).tolist() == [UNKNOWN]
