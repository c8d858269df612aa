"""What training reads: every usable labelled row once, and clear words about the rest."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import SettingsError, TrainingError
from schemas.metrics import POSE_CLASSES
from schemas.settings import ColumnNames
from tasks.training.rows import read_training_rows

DIM = 8


def vectors(rows: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def shard(path, x, subjects, *, free_length=False, **columns):
    lists = pa.array(list(x), pa.list_(pa.float32())) if free_length else None
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(list(x))), len(x[0])) if lists is None else lists
    names = {"id": [f"{path.stem}-{i}" for i in range(len(x))], "embedding": fixed}
    if subjects is not None:
        names["subject"] = subjects
    pq.write_table(pa.table({**names, **columns}), path)


def read(folder, **options):
    return read_training_rows([str(folder)], ColumnNames(), **options)


def test_rows_come_as_stored_with_subject_and_pose_class(tmp_path):
    x = vectors(6)
    yaw = pa.array([0.0, 20.0, -50.0, None, 3.0, 1.0], pa.float32())
    shard(tmp_path / "a.parquet", x, list("ppqqrr"), yaw=yaw, pose=["", None, None, None, "profile", "Frontal"])
    rows = read(tmp_path)
    np.testing.assert_array_equal(rows.x, x)
    assert rows.x.dtype == np.float32
    assert rows.subjects.tolist() == list("ppqqrr")
    classes = [POSE_CLASSES[code] for code in rows.classes]
    assert classes == ["frontal", "half", "profile", "unknown", "profile", "frontal"]
    assert rows.skipped == {}


def test_without_any_pose_column_every_pose_is_unknown(tmp_path):
    shard(tmp_path / "a.parquet", vectors(3), list("ppq"))
    assert {POSE_CLASSES[code] for code in read(tmp_path).classes} == {"unknown"}


def test_bad_unlabelled_and_repeated_rows_are_left_out_and_counted(tmp_path, caplog):
    x = vectors(8)
    x[1, 3], x[2], x[5] = np.nan, 0, x[4]
    shard(tmp_path / "a.parquet", x, ["p", "p", "p", None, "q", "q", "q", "q"])
    shard(tmp_path / "b.parquet", np.concatenate([x[:1], vectors(1, 9)]), ["p", "p"])
    rows = read(tmp_path)
    np.testing.assert_array_equal(rows.x, np.concatenate([x[[0, 4, 6, 7]], vectors(1, 9)]))
    assert rows.skipped == {"not_finite": 1, "zero_norm": 1, "no_subject": 1, "read_before": 2}
    assert "5 rows were left out: 1 no_subject, 1 not_finite, 2 read_before, 1 zero_norm" in caplog.text


def test_digest_follows_vectors_names_and_poses(tmp_path):
    digests = set()
    for number, (seed, name, pose) in enumerate(
        [(0, "p", "frontal"), (1, "p", "frontal"), (0, "q", "frontal"), (0, "p", "half")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        shard(folder / "a.parquet", vectors(2, seed), [name, name], pose=[pose, pose])
        digests.add(read(folder).digest)
        assert read(folder).digest in digests
    assert len(digests) == 4


def test_more_rows_than_fit_are_sampled_by_whole_subjects(tmp_path, caplog):
    subjects = [f"s{number // 5}" for number in range(1000)]
    shard(tmp_path / "a.parquet", vectors(600), subjects[:600])
    shard(tmp_path / "b.parquet", vectors(400, 1), subjects[600:])
    rows = read(tmp_path, max_rows=300)
    _, counts = np.unique(rows.subjects, return_counts=True)
    assert set(counts) == {5}
    assert 200 < len(rows) < 400
    assert "sample of subjects" in caplog.text
    assert set(read(tmp_path, max_rows=200).subjects) < set(rows.subjects)
    assert set(rows.at_most(100).subjects) < set(rows.subjects)
    assert rows.at_most(10**6) is rows


def test_shard_without_subjects_is_refused(tmp_path):
    shard(tmp_path / "faces.parquet", vectors(3), None)
    with pytest.raises(TrainingError, match=r"shard faces: has no column 'subject'.*--column subject=NAME"):
        read(tmp_path)


@pytest.mark.parametrize("free_length", [False, True])
def test_mixed_dimensions_are_refused(tmp_path, free_length):
    shard(tmp_path / "a.parquet", vectors(3), list("ppq"), free_length=free_length)
    shard(tmp_path / "b.parquet", vectors(3, dim=5), list("ppq"), free_length=free_length)
    with pytest.raises(TrainingError, match="shard b: embeddings have 5 numbers, those before 8"):
        read(tmp_path)


def test_a_few_rows_of_another_length_are_bad_rows(tmp_path):
    x = [*vectors(1, dim=5), *vectors(4)]
    shard(tmp_path / "a.parquet", x, list("ppqqr"), free_length=True)
    rows = read(tmp_path)
    assert rows.x.shape == (4, DIM)
    assert rows.skipped == {"wrong_length": 1}
    with pytest.raises(TrainingError, match=r"shard a, row 0: the embedding has another length .* --skip-bad-rows"):
        read(tmp_path, skip_bad_rows=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_refused_unless_asked(tmp_path, value):
    x = vectors(5)
    x[3, 2] = value
    shard(tmp_path / "a.parquet", x, list("ppqqr"))
    with pytest.raises(TrainingError, match="shard a, row 3: the embedding holds NaN or infinity; fix the shard, or"):
        read(tmp_path, skip_bad_rows=False)
    assert read(tmp_path).skipped == {"not_finite": 1}


def test_rows_without_a_face_are_left_out_even_so(tmp_path):
    x = vectors(5)
    x[3] = 0
    shard(tmp_path / "a.parquet", x, list("ppqqr"))
    assert read(tmp_path, skip_bad_rows=False).skipped == {"zero_norm": 1}


def test_nothing_usable_is_refused(tmp_path):
    shard(tmp_path / "a.parquet", np.full((3, DIM), np.nan, np.float32), list("ppq"))
    with pytest.raises(TrainingError, match="no row with a subject and a usable embedding"):
        read(tmp_path)


@pytest.mark.parametrize("max_rows", [None, 100])
def test_broken_shard_is_refused_and_missing_source_named(tmp_path, max_rows):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(TrainingError, match=r"shard a: .* Fix it or leave it out"):
        read(tmp_path, max_rows=max_rows)
    with pytest.raises(SettingsError, match="does not exist"):
        read(tmp_path / "nowhere")
