"""`frontalis.open_store`: searches agree with NumPy, options do what they say, and no answer mixes two releases."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import frontalis
from models.checkpoint import load
from models.inference import Reweighter
from models.split import split_of
from schemas.errors import SettingsError, StoreError
from storage.location import Location
from storage.releases import Releases
from tasks.query.opened import OpenRelease
from tests.pipeline_fixtures import TINY_SPLIT


def unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix.astype(np.float64), axis=1, keepdims=True)


@pytest.fixture(scope="module")
def rows(tiny_source: Path) -> pl.DataFrame:
    return pl.read_parquet(tiny_source / "*.parquet")


@pytest.fixture(scope="module")
def store(measured_store: str):
    with frontalis.open_store(measured_store) as opened:
        yield opened


@pytest.fixture(scope="module")
def features(rows: pl.DataFrame, tiny_models) -> np.ndarray:
    """Features of all rows in mode per_sample, at length 1, in the order of `rows`."""
    return unit(Reweighter(load(tiny_models.by_mode["per_sample"])).query(rows["embedding"].to_numpy()))


def nearest(scores: np.ndarray, names: np.ndarray, k: int) -> np.ndarray:
    return names[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def test_vectors_and_ids_find_what_numpy_finds(store, rows, features) -> None:
    names = rows["id"].to_numpy()
    assert (store.release.release, store.modes) == ("r1", ("raw", "per_sample", "batch_stat"))
    np.testing.assert_allclose(
        unit(store.reweight("per_sample", rows["embedding"].to_numpy()[:9])), features[:9], atol=1e-6
    )
    cosines = features[:40] @ features.T
    found = store.index("per_sample").search(features[:40], 5, columns=["yaw"])
    assert (found.ids == nearest(cosines, names, 5)).all()
    np.testing.assert_allclose(found.scores, -np.sort(-cosines, axis=1)[:, :5], atol=1e-6)
    by_id = rows.select("id", "subject", "yaw").rows_by_key("id", unique=True)
    for at in np.ndindex(found.ids.shape):
        subject, yaw = by_id[found.ids[at]]
        assert (found.columns["subject"][at], found.columns["yaw"][at]) == (
            subject,
            pytest.approx(yaw, abs=1e-4, nan_ok=True),
        )
    np.fill_diagonal(cosines, -2)
    assert (store.neighbours("per_sample", names[:40].tolist(), 5).ids == nearest(cosines, names, 5)).all()
    assert (store.neighbours("per_sample", names[:40].tolist(), 1, include_self=True).ids[:, 0] == names[:40]).all()


def test_filters_and_unique_subjects_go_deeper_until_there_are_k(store, rows, features) -> None:
    names, subjects = rows["id"].to_numpy(), rows["subject"].to_numpy()
    index, cosines = store.index("per_sample"), features[:6] @ features.T
    passes = ((rows["yaw"] > 40) | (rows["yaw"] < -60)).fill_null(value=False).to_numpy()
    assert 20 < passes.sum() < 200
    found = index.search(features[:6], 20, where="yaw > 40 or yaw < -60")
    assert (found.ids == nearest(np.where(passes, cosines, -2), names, 20)).all()
    best = [[cosines[at, subjects == one].max() for one in np.unique(subjects)] for at in range(6)]
    found = index.search(features[:6], 25, unique_subject=True)
    np.testing.assert_allclose(found.scores[:, :20], -np.sort(-np.array(best), axis=1), atol=1e-6)
    assert [len(set(row[:20])) for row in found.columns["subject"]] == [20] * 6
    assert (found.ids[:, 20:] == None).all()  # noqa: E711
    assert np.isneginf(found.scores[:, 20:]).all()
    few = index.search(features[:1], 9, where="id = '%s'" % names[3])  # noqa: UP031
    assert few.ids[0].tolist() == [names[3], *[None] * 8]
    assert (index.search(features[:2], 50, min_score=0.5).scores[:, 0] >= 0.5).all()
    cut = index.search(features[:2], 280, min_score=0.5).scores
    assert ((cut >= 0.5) | np.isneginf(cut)).all()


def test_threshold_and_fmr_are_those_of_the_held_out_impostor_pairs(store, rows, features) -> None:
    chosen = np.array([split_of(name, TINY_SPLIT) == "test" for name in rows["subject"]])
    ours, of = features[chosen], rows["subject"].to_numpy()[chosen]
    one, other = np.triu_indices(len(ours), 1)
    impostor = (ours @ ours.T)[one, other][of[one] != of[other]]
    count, noise = len(impostor), 5e-7
    for asked, tabulated in ((0.1, 0.1), ("1e-2", 0.01), (0.003, 0.0025), (1e-3, 1e-3)):  # ten FMRs a decade
        threshold = store.threshold("per_sample", asked)
        matches = int((impostor >= threshold - noise).sum())
        assert matches == int(tabulated * count)
        assert store.fmr("per_sample", threshold) == matches / count
    scores = np.linspace(-1, 0.99, 200)
    true, bound = np.array([(impostor >= score + noise).sum() for score in scores]), store.fmr("per_sample", scores)
    assert (bound * count >= true - 1e-6).all()
    assert (bound * count <= np.maximum(1.28 * true + 2, 1)).all()
    assert np.isnan(store.fmr("per_sample", -np.inf))
    with pytest.raises(
        SettingsError, match=rf"fmr 1e-9: not estimable from {count:,} impostor pairs; the smallest FMR"
    ):
        store.threshold("per_sample", 1e-9)
    with pytest.raises(SettingsError, match="fmr: 2 is no rate"):
        store.threshold("per_sample", 2)


def test_a_release_that_was_not_measured_gives_no_fmr(measured_store, monkeypatch) -> None:
    monkeypatch.setattr("tasks.query.rates.report_folder", lambda release: "nowhere")
    with (
        frontalis.open_store(measured_store) as unmeasured,
        pytest.raises(StoreError, match="FMR of raw was not measured"),
    ):
        unmeasured.fmr("raw", 0.5)


def test_expansion_follows_its_formula_and_scores_stay_cosines(store, rows, features) -> None:
    names, index = rows["id"].to_numpy(), store.index("per_sample")
    queries = features[:8]
    cosines = queries @ features.T
    cosines[np.arange(8), np.arange(8)] = -2
    near = np.argsort(-cosines, axis=1)[:, :3]
    weights = np.take_along_axis(cosines, near, 1).clip(0) ** 3
    moved = unit(queries + (weights[..., None] * features[near]).sum(axis=1)) @ features.T
    moved[np.arange(8), np.arange(8)] = -2
    found = index.search(queries, 10, expand=3, exclude_self_ids=names[:8].tolist())
    order = np.argsort(-moved, axis=1)[:, :10]
    assert (found.ids == names[order]).all()
    np.testing.assert_allclose(found.expanded, np.take_along_axis(moved, order, 1), atol=1e-6)
    np.testing.assert_allclose(found.scores, np.take_along_axis(cosines, order, 1), atol=1e-6)
    inside = index.search(queries, 5, expand=3, where="yaw > 40")
    assert all(yaw > 40 for yaw in rows.filter(pl.col("id").is_in(inside.ids.ravel().tolist()))["yaw"])


def test_templates_are_means_without_the_query_itself(store, rows, features) -> None:
    subjects = rows["subject"].to_numpy()
    known = np.unique(subjects)
    sums = np.array([features[subjects == one].sum(axis=0) for one in known])
    found = store.neighbours("per_sample", rows["id"][:5].to_list(), 20, by="subject")
    for at in range(5):
        own = sums - (known == subjects[at])[:, None] * features[at]
        cosines = unit(own) @ features[at]
        assert found.ids[at].tolist() == known[np.argsort(-cosines)].tolist()
        np.testing.assert_allclose(found.scores[at], -np.sort(-cosines), atol=1e-6)
    assert set(found.columns["rows"].ravel()) == {14}
    some = store.index("per_sample").search(features[:1], 25, by="subject", where="yaw > 60")
    passing = rows.filter(pl.col("yaw") > 60)
    assert sum(count for count in some.columns["rows"][0] if count) == len(passing)
    assert {name for name in some.ids[0] if name} == set(passing["subject"])


def test_a_store_stays_at_its_release_until_refreshed(
    measured_store, pipeline_of, serve_stages, tiny_source, tmp_path
) -> None:
    uri = str(shutil.copytree(measured_store, tmp_path / "store"))
    with frontalis.open_store(uri) as pinned, frontalis.open_store(uri, "r1") as named:
        held = pinned.index("raw")
        pinned.reweight("per_sample", np.ones((1, 32), np.float32))
        assert not pinned.refresh()
        serve_stages(pipeline_of(tiny_source, uri))
        stop, seen = threading.Event(), set()

        def ask() -> None:
            while not stop.is_set():
                opened = pinned.opened
                seen.add((opened.record.release, opened.index("raw").search(np.ones((1, 32)), 1).release))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert (pinned.release.release, pinned.refresh(), pinned.release.release) == ("r1", True, "r2")
        stop.set()
        for thread in threads:
            thread.join()
        assert seen <= {("r1", "r1"), ("r2", "r2")}
        assert (held.release, named.refresh(), named.release.release) == ("r1", False, "r1")
        Releases(Location(uri)).serve("r1")
        assert (pinned.refresh(), pinned.release.release) == (True, "r1")
    with pytest.raises(ValueError, match="the store is closed"):
        pinned.index("raw")


def test_unchanged_indexes_and_settings_of_the_release_are_used(store, measured_store, tmp_path) -> None:
    uri = Location(str(shutil.copytree(measured_store, tmp_path / "store")))
    old = OpenRelease(uri, store.release)
    expected, embeddings = old.index("raw").search(np.ones((1, 32)), 3, expand=2), np.ones((1, 32), np.float32)
    moved = old.reweight("per_sample", embeddings)
    new = OpenRelease(uri, store.release.replaced(release="r2", settings={"query": {"expand": 2}}))
    for path in ("indexes/r1/raw/index.faiss", "models"):  # what is shared is not read again
        (tmp_path / "store" / path).rename(tmp_path / Path(path).name)
    new.reuse(old)
    found = new.index("raw").search(np.ones((1, 32)), 3)
    assert (found.release, found.ids.tolist()) == ("r2", expected.ids.tolist())
    np.testing.assert_array_equal(found.expanded, expected.expanded)
    np.testing.assert_array_equal(new.reweight("per_sample", embeddings), moved)


def test_what_cannot_be_asked_is_refused(store) -> None:
    index, query = store.index("raw"), np.ones((1, 32), np.float32)
    for options, says in (
        ({"k": 0}, "k 0: must be 1 to 10000"),
        ({"expand": 101}, "expand 101: must be 0"),
        ({"by": "pose"}, "by pose: must be row or subject"),
        ({"by": "subject", "expand": 3}, "queries are not expanded with templates"),
        ({"columns": ["front"]}, "column 'front': is not stored; there are id, subject, shard, pose, yaw, pitch, roll"),
        ({"exclude_self_ids": ["a", "b"]}, "has 2 ids for 1 queries"),
    ):
        with pytest.raises(SettingsError, match=says):
            index.search(query, **{"k": 1, **options})
    for call, says in (
        (lambda: store.index("none"), "mode none: release r1 has raw, per_sample, batch_stat"),
        (lambda: store.reweight("raw", query[0]), r"embeddings have shape \[32\], mode raw wants \[n, 32\]"),
        (lambda: store.neighbours("raw", ["x"], 1), "id 'x': is not in release r1"),
    ):
        with pytest.raises(SettingsError, match=says):
            call()


@pytest.mark.e2e
def test_opening_a_store_imports_neither_prefect_nor_torch() -> None:
    code = "import frontalis, sys; frontalis.open_store; print({'prefect', 'torch', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "set()\n"
