"""Labelled rows: the subject index, samples of whole subjects, and vectors equal to those in the files."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from schemas.metrics import RAW
from schemas.settings import EvaluationSettings, PipelineSettings
from storage.location import Location
from storage.tables import Snapshot
from tasks.evaluation.rows import SubjectIndex, read_labelled, read_subject_index, sample_subjects, stored_ids

MODES = [RAW, "per_sample", "batch_stat"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_source, pipeline_of) -> PipelineSettings:
    """The tiny source with every ninth row nameless."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "source").mkdir()
    for file in tiny_source.glob("*.parquet"):
        rows = pl.read_parquet(file).with_row_index("row")
        named = rows.with_columns(pl.when(pl.col("row") % 9 > 0).then(pl.col("subject")).alias("subject")).drop("row")
        named.write_parquet(folder / "source" / file.name)
    return pipeline_of(folder / "source", folder / "store")


@pytest.fixture(scope="module")
def features(settings, run_stages) -> Snapshot:
    return run_stages(settings).published.features


@pytest.fixture(scope="module")
def store(settings) -> Location:
    return Location(settings.store)


@pytest.fixture(scope="module")
def labelled(store, features) -> SubjectIndex:
    return read_subject_index(store, features)


@pytest.fixture(scope="module")
def stored(settings) -> pl.DataFrame:
    """All labelled rows as polars reads them, ordered by shard; rows of a file keep their order."""
    rows = pl.scan_delta(f"{settings.store}/features").filter(pl.col("subject").is_not_null()).collect()
    return rows.sort("shard", maintain_order=True)


def test_the_index_holds_every_labelled_row(labelled, store, features, stored, settings) -> None:
    raw = stored.filter(pl.col("mode") == RAW)
    assert [labelled.names[code] for code in labelled.subjects] == raw["subject"].to_list()
    assert [labelled.shards[code] for code in labelled.shard] == raw["shard"].to_list()
    assert labelled.names == sorted(raw["subject"].unique())
    assert labelled.unlabelled == 280 - raw.height > 0
    every = pl.scan_delta(f"{settings.store}/features").filter(mode=RAW).collect()
    assert set(stored_ids(store, features).to_pylist()) == set(every["id"])


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_rows_come_with_their_own_vectors_in_every_mode(labelled, store, features, stored, step) -> None:
    rows = np.arange(3, len(labelled), step)
    read = read_labelled(store, features, labelled, rows, MODES, EvaluationSettings())
    for mode in MODES:
        expected = stored.filter(pl.col("mode") == mode)[rows]
        assert read.ids == expected["id"].to_list()
        np.testing.assert_array_equal(read.features[mode], np.stack(expected["front"].to_list()))
    assert [read.names[code] for code in read.subjects] == expected["subject"].to_list()


def test_rows_that_are_not_read_need_no_file(labelled, store, features) -> None:
    first = np.flatnonzero(labelled.shard == 0)
    files = {path: file for path, file in features.files.items() if file.shard == labelled.shards[0]}
    whole = read_labelled(store, features, labelled, first, MODES, EvaluationSettings())
    alone = read_labelled(store, Snapshot(0, files), labelled, first, MODES, EvaluationSettings())
    assert whole.ids == alone.ids


def test_samples_are_whole_subjects_and_no_more_than_asked_for(labelled) -> None:
    everybody = np.arange(len(labelled))
    assert sample_subjects(labelled, everybody, len(labelled)) == (everybody, None)
    some, of = sample_subjects(labelled, everybody, 60)
    assert of == 20
    assert 30 < len(some) <= 60
    chosen = set(labelled.subjects[some].tolist())
    assert np.isin(labelled.subjects, list(chosen)).sum() == len(some)
    fewer, _ = sample_subjects(labelled, everybody, 30)
    assert set(fewer.tolist()) < set(some.tolist())


def test_nobody_is_known(tmp_path: Path) -> None:
    nothing = read_subject_index(Location(str(tmp_path)), Snapshot(-1, {}))
    assert (len(nothing), nothing.names, nothing.unlabelled) == (0, [], 0)
