"""What the report of a release is made of: weights over its own rows, the trend of one metric, provenance."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from models.checkpoint import load
from reports import html
from schemas.releases import IndexRef, Release
from schemas.reports import Estimate, Evaluation, GateDecision, ReportInput
from schemas.settings import PipelineSettings
from storage.features import features_table
from storage.location import Location
from tasks import release as release_module
from tasks.plan import prepare_models
from tasks.release import provenance, release_weights, write_report


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_source, pipeline_of) -> PipelineSettings:
    return pipeline_of(tiny_source, tmp_path_factory.mktemp("release-report") / "store")


@pytest.fixture(scope="module")
def release(settings: PipelineSettings, run_stages) -> Release:
    published = run_stages(settings).published
    return Release(
        release="r00003-0123abcd",
        number=3,
        created=datetime(2026, 3, 14, 2, tzinfo=UTC),
        content="0123abcd" * 4,
        source=settings.source,
        features_version=published.features.version,
        quarantine_version=published.quarantine.version,
        models=prepare_models(settings),
        indexes={
            "raw": IndexRef(
                path="i", digest="index-digest", size=1, ids_path="j", ids_digest="e", rows=1, dim=32, factory="Flat"
            )
        },
        data=published.data,
        gate=GateDecision(promoted=True, reason="no worse"),
        gated={"raw": Estimate(value=0.125, low=0.1, high=0.15)},
        gated_name="frontal–profile EER",
        report=None,
        settings=settings.model_dump(mode="json"),
    )


@pytest.fixture(scope="module")
def raw(settings: PipelineSettings, release: Release) -> pl.DataFrame:
    return pl.scan_delta(f"{settings.store}/features").filter(pl.col("mode") == "raw").collect()


def reference(model: bytes, branch: str, x: np.ndarray) -> np.ndarray:
    """Channel weights by the formula: sigmoid(W2 relu(W1 s)), s the L2-normalised row or the frozen mean."""
    se = getattr(load(model).model, f"{branch}_branch").se
    first, second = (weights.detach().double().numpy() for weights in se.fc.parameters())
    s = x / np.linalg.norm(x, axis=1, keepdims=True)
    if se.use_batch_stat:
        s = np.tile(se.frozen_mean.double().numpy().reshape(1, -1), (len(x), 1))
    return 1 / (1 + np.exp(-np.maximum(s @ first.T, 0) @ second.T))


def test_weights_are_those_of_the_models_over_the_raw_rows(settings, release: Release, raw: pl.DataFrame) -> None:
    store = Location(settings.store)
    found = release_weights(store, release)
    assert [(one.mode, one.branch) for one in found] == [
        (mode, branch) for mode in ("per_sample", "batch_stat") for branch in ("identity", "pose")
    ]
    x = np.array(raw["front"].to_list(), np.float64)
    for one in found:
        wanted = reference((store / release.models[one.mode].path).read_bytes(), one.branch, x)
        np.testing.assert_allclose(one.mean, wanted.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(one.spread, wanted.std(axis=0), atol=1e-5)
        order = np.argsort(-np.array(one.mean), kind="stable")[:10]
        assert one.top == [(int(channel), one.mean[channel]) for channel in order]
    assert max(found[0].spread) > 1e-4
    assert max(found[2].spread) < 1e-6


def test_a_large_release_is_sampled_from_every_shard_alike(settings, release, raw, monkeypatch) -> None:
    monkeypatch.setattr(release_module, "SAMPLE_ROWS", 30)
    sample = release_module._raw_sample(Location(settings.store), release)
    wanted = raw.group_by("shard", maintain_order=True).head(10).sort("shard", maintain_order=True)
    assert wanted["shard"].n_unique() == 3
    np.testing.assert_array_equal(sample, np.array(wanted["front"].to_list(), np.float32))


def test_a_release_without_rows_has_no_weights(settings, release: Release, tmp_path: Path) -> None:
    store = Location(settings.store)
    table = features_table(Location(str(tmp_path)))
    empty = table.commit(table.snapshot(), features_table(store).schema(), [], [])
    for model in release.models.values():
        (Location(str(tmp_path)) / model.path).write_bytes((store / model.path).read_bytes())
    bare = release.model_copy(update={"features_version": empty.version})
    assert release_weights(Location(str(tmp_path)), bare) == []


def test_provenance_names_all_that_went_in_and_is_json(settings, release: Release) -> None:
    found = json.loads(json.dumps(provenance(release)))
    assert found["models"] == {mode: model.digest for mode, model in release.models.items()}
    assert found["model files"] == {mode: model.file_digest for mode, model in release.models.items()}
    assert found["indexes"] == {"raw": "Flat, index-digest"}
    assert (found["source"], found["features version"]) == (settings.source, release.features_version)
    assert found["settings"]["columns"]["id"] == "id"
    assert {"python", "torch", "frontalis", "faiss", "deltalake", "pyarrow", "prefect"} <= found["versions"].keys()


def older(release: Release, back: int, **more: object) -> Release:
    changes = {"release": f"r{back}", "created": release.created - timedelta(days=back), **more}
    return release.model_copy(update=changes)


@pytest.fixture
def reported(settings, release, report_input: ReportInput, monkeypatch: pytest.MonkeyPatch):
    """`reported(earlier)`: what the page of the release was rendered from; its plots are left out, to be quick."""
    evaluation = report_input.evaluation.model_copy(update={"release": release.release})
    seen: list[ReportInput] = []
    true = html.render_report
    monkeypatch.setattr(html, "draw", lambda report: [])
    monkeypatch.setattr(html, "render_report", lambda report, drawn: seen.append(report) or true(report, drawn))

    def write(earlier: list[Release]) -> ReportInput:
        write_report(Location(settings.store), release, evaluation, earlier)
        return seen[-1]

    return write


@pytest.mark.usefixtures("with_plots")
def test_page_metrics_and_plots_are_written_below_the_release(
    settings, release: Release, report_input: ReportInput
) -> None:
    evaluation = report_input.evaluation.model_copy(update={"release": release.release})
    write_report(Location(settings.store), release, evaluation, [])
    folder = Path(settings.store) / "reports/r00003-0123abcd"
    page = (folder / "index.html").read_text()
    assert release.release in page
    metrics = json.loads((folder / "metrics.json").read_text())
    assert Release.model_validate(metrics["release"]) == release
    assert Evaluation.model_validate(metrics["evaluation"]) == evaluation
    plots = {file.name for file in (folder / "plots").iterdir()}
    assert len(plots) > 20
    assert all((folder / "plots" / name).read_bytes().rstrip().endswith(b"</svg>") for name in plots)
    assert {Path(name).suffix for name in plots} == {".svg"}


def test_the_trend_holds_only_the_same_metric_this_release_last(reported, release: Release) -> None:
    other = {"gated_name": "all-pairs EER"}
    earlier = [older(release, back, **(other if back % 3 == 0 else {})) for back in range(9, 0, -1)]
    report = reported(earlier)
    assert [point.release for point in report.trend] == ["r8", "r7", "r5", "r4", "r2", "r1", release.release]
    assert report.trend[-1].values == release.gated


def test_the_trend_does_not_grow_for_ever(reported, release: Release) -> None:
    report = reported([older(release, back) for back in range(100, 0, -1)])
    assert len(report.trend) == 60
    assert (report.trend[0].release, report.trend[-1].release) == ("r59", release.release)
