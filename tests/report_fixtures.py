"""A browser, and a realistic report: three modes measured on simulated scores, one release in a series of nine."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from schemas.metrics import RAW
from schemas.reports import (
    CellResult,
    ChannelWeights,
    Curve,
    DataQuality,
    Estimate,
    Evaluation,
    ExpandedRates,
    ExpansionResult,
    GateDecision,
    GatedMetric,
    Histogram,
    IdentificationResult,
    IndexRecall,
    ModeResult,
    PairsResult,
    Population,
    ReportInput,
    ShardFault,
    StageCost,
    TrendPoint,
)

FMRS = ["1e-1", "1e-2", "1e-3", "1e-4", "1e-5"]
# cell → mean genuine score by mode; impostors are N(0.05, 0.11).
GENUINE = {
    "frontal-frontal": {RAW: 0.62, "per_sample": 0.622, "batch_stat": 0.615},
    "frontal-profile": {RAW: 0.36, "per_sample": 0.395, "batch_stat": 0.365},
    "profile-profile": {RAW: 0.34, "per_sample": 0.355, "batch_stat": 0.30},
    "frontal-half": {RAW: 0.55, "per_sample": 0.56, "batch_stat": 0.55},
    "half-half": {RAW: 0.57, "per_sample": 0.57, "batch_stat": 0.56},
    "half-profile": {RAW: 0.42, "per_sample": 0.45, "batch_stat": 0.43},
}
MODES = (RAW, "per_sample", "batch_stat")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RESAMPLES = 40


def _threshold(impostor: np.ndarray, fmr: float) -> float | None:
    allowed = int(fmr * len(impostor))
    return float(np.nextafter(np.sort(impostor)[-allowed - 1], np.inf)) if allowed else None


def _eer(genuine: np.ndarray, impostor: np.ndarray) -> float:
    thresholds = np.linspace(-0.2, 0.9, 400)
    fnmr = np.searchsorted(np.sort(genuine), thresholds) / len(genuine)
    fmr = 1 - np.searchsorted(np.sort(impostor), thresholds) / len(impostor)
    at = np.argmin(abs(fnmr - fmr))
    return float(fnmr[at] + fmr[at]) / 2


def _metrics(genuine: np.ndarray, impostor: np.ndarray, thresholds: dict[str, float | None]) -> dict[str, float | None]:
    values: dict[str, float | None] = {"eer": _eer(genuine, impostor)}
    for kind, at in (("fnmr", {fmr: _threshold(impostor, float(fmr)) for fmr in FMRS}), ("fnmr_global", thresholds)):
        for fmr, threshold in at.items():
            values[f"{kind}@{fmr}"] = None if threshold is None else float((genuine < threshold).mean())
    return values


def _estimate(value: float | None, resampled: list[float | None], reason: str) -> Estimate:
    if value is None:
        return Estimate(value=None, reason=reason)
    low, high = np.quantile([one for one in resampled if one is not None], [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))


def _mode_results(rng: np.random.Generator) -> dict[str, ModeResult]:
    noise = {cell: (rng.standard_normal(1500), rng.standard_normal(12000)) for cell in GENUINE}
    scores = {
        mode: {
            cell: (means[mode] + 0.15 * noise[cell][0], 0.05 + 0.11 * noise[cell][1]) for cell, means in GENUINE.items()
        }
        for mode in MODES
    }
    for cells in scores.values():
        cells["all"] = tuple(np.concatenate([cell[side] for cell in cells.values()]) for side in (0, 1))
    picks = {cell: [rng.integers(0, n, n) for _ in range(RESAMPLES)] for cell in GENUINE for n in (1500,)}
    picks["all"] = [rng.integers(0, 9000, 9000) for _ in range(RESAMPLES)]
    thresholds = {mode: {f: _threshold(cells["all"][1], float(f)) for f in FMRS} for mode, cells in scores.items()}
    bootstrap = {
        mode: {cell: [_metrics(g[pick], i, thresholds[mode]) for pick in picks[cell]] for cell, (g, i) in cells.items()}
        for mode, cells in scores.items()
    }
    results = {}
    for mode, cells in scores.items():
        found, difference = {}, {}
        for cell, (genuine, impostor) in cells.items():
            point = _metrics(genuine, impostor, thresholds[mode])
            raw = _metrics(*scores[RAW][cell], thresholds[RAW])
            reason = f"not estimable: {len(impostor)} impostor pairs are too few"
            edges = np.linspace(-0.5, 1.2, 81)
            levels = np.linspace(0.9, -0.4, 200)
            fmr = 1 - np.searchsorted(np.sort(impostor), levels) / len(impostor)
            found[cell] = CellResult(
                n_genuine=len(genuine),
                n_impostor=len(impostor),
                eer=_estimate(point["eer"], [one["eer"] for one in bootstrap[mode][cell]], reason),
                auc=Estimate(value=0.97, low=0.96, high=0.98),
                d_prime=3.1,
                fnmr={
                    f: _estimate(point[f"fnmr@{f}"], [one[f"fnmr@{f}"] for one in bootstrap[mode][cell]], reason)
                    for f in FMRS
                },
                fnmr_global={
                    f: _estimate(
                        point[f"fnmr_global@{f}"], [one[f"fnmr_global@{f}"] for one in bootstrap[mode][cell]], reason
                    )
                    for f in FMRS
                },
                fmr_global={
                    f: None if threshold is None else float((impostor >= threshold).mean())
                    for f, threshold in thresholds[mode].items()
                },
                det=Curve(fmr=fmr.tolist(), fnmr=(np.searchsorted(np.sort(genuine), levels) / len(genuine)).tolist()),
                histogram=Histogram(
                    edges=edges.tolist(),
                    genuine=np.histogram(genuine, edges, density=True)[0].tolist(),
                    impostor=np.histogram(impostor, edges, density=True)[0].tolist(),
                ),
            )
            if mode != RAW:
                difference[cell] = {
                    metric: Estimate(value=None, reason=reason)
                    if value is None or raw[metric] is None
                    else _estimate(
                        value - raw[metric],
                        [
                            a[metric] - b[metric]
                            for a, b in zip(bootstrap[mode][cell], bootstrap[RAW][cell], strict=True)
                        ],
                        reason,
                    )
                    for metric, value in point.items()
                }
        place = MODES.index(mode)
        results[mode] = ModeResult(
            mode=mode,
            model_digest=None if mode == RAW else f"{place}c0ffee5eed{place}",
            thresholds=thresholds[mode],
            cells=found,
            difference=difference,
            versus_served={"frontal-profile": {"eer": Estimate(value=0.0012, low=-0.004, high=0.006)}}
            if mode == "per_sample"
            else {},
            versus_modes={"per_sample": {"all": {"eer": Estimate(value=0.003, low=0.001, high=0.005)}}}
            if mode == "batch_stat"
            else {},
            pairs=[
                PairsResult(protocol="CFP-FP", n_pairs=4900, missing=3, n_folds=7, accuracy_mean=0.8966 + 0.008 * place,
                            accuracy_sd=0.0182, eer=0.1147)
            ],
            identification=IdentificationResult(
                gallery="frontal",
                probes="profile",
                n_gallery=3478,
                n_gallery_subjects=280,
                n_mated=1120,
                n_non_mated=276,
                rank={
                    k: Estimate(value=v + 0.02 * place, low=v - 0.02 + 0.02 * place, high=v + 0.018 + 0.02 * place)
                    for k, v in (("1", 0.81), ("5", 0.88), ("10", 0.91))
                },
                fnir={
                    "1e-1": Estimate(value=0.31 - 0.02 * place, low=0.28 - 0.02 * place, high=0.34 - 0.02 * place),
                    "1e-2": Estimate(value=0.49 - 0.02 * place, low=0.45 - 0.02 * place, high=0.53 - 0.02 * place),
                    "1e-3": Estimate(value=None, reason="not estimable: 276 non-mated probes are too few"),
                },
                index_kind="IVF64,Flat",
                index_rank={"1": 0.81 + 0.02 * place, "5": 0.88 + 0.02 * place, "10": 0.9},
                index_recall={"1": 0.998, "10": 0.995},
                expansion=_expansion(),
            ),
        )  # fmt: skip
    return results


def _expansion() -> ExpansionResult:
    change = Estimate(value=0.012, low=0.004, high=0.021)
    groups = [
        ExpandedRates(
            enrolled=enrolled,
            n_mated=mated,
            rank={
                k: Estimate(value=v, low=v - 0.02, high=v + 0.02) for k, v in (("1", 0.82), ("5", 0.89), ("10", 0.91))
            },
            fnir={"1e-1": Estimate(value=0.3, low=0.27, high=0.33), "1e-2": Estimate(value=0.47, low=0.43, high=0.51)},
            rank_difference=dict.fromkeys(("1", "5", "10"), change),
            fnir_difference={"1e-1": Estimate(value=-0.01, low=-0.02, high=0.001), "1e-2": change.replaced(value=0.02)},
        )
        for enrolled, mated in (("any", 1120), ("1", 220), ("5 or more", 900))
    ]
    return ExpansionResult(rows=5, groups=groups)


def _weights(rng: np.random.Generator) -> list[ChannelWeights]:
    weights = []
    for mode, branch, centre in (
        ("per_sample", "identity", 0.52),
        ("per_sample", "pose", 0.48),
        ("batch_stat", "identity", 0.5),
        ("batch_stat", "pose", 0.5),
    ):
        mean = np.clip(centre + 0.06 * rng.standard_normal(512), 0, 1)
        order = np.argsort(-mean)[:10]
        spread = 0.03 + 0.01 * rng.random(512) if mode == "per_sample" else np.zeros(512)
        weights.append(
            ChannelWeights(
                mode=mode,
                branch=branch,
                mean=mean.tolist(),
                spread=spread.tolist(),
                top=[(int(channel), float(mean[channel])) for channel in order],
                agreement=0.07 if mode == "per_sample" else None,
            )
        )
    return weights


@pytest.fixture(scope="session")
def report_input() -> ReportInput:
    rng = np.random.default_rng(7)
    modes = _mode_results(rng)
    latest = datetime(2026, 3, 14, 2, 0, tzinfo=UTC)
    gated = {mode: modes[mode].cells["frontal-profile"].eer for mode in MODES}
    trend = [
        TrendPoint(
            release=f"r{back:04d}",
            created=latest - timedelta(days=back),
            promoted=back not in (2, 5),
            values={
                mode: Estimate(value=one.value + shift, low=one.low + shift, high=one.high + shift)
                for mode, one in gated.items()
                for shift in (0.004 * float(rng.standard_normal()) if back else 0.0,)
            },
        )
        for back in range(8, -1, -1)
    ]
    return ReportInput(
        release="20260314T020000Z-5f2a9c",
        created=latest,
        evaluation=Evaluation(
            release="20260314T020000Z-5f2a9c",
            resamples=1000,
            seed=0,
            fmrs=FMRS,
            unlabelled_rows=218,
            notes=["batch_stat: not compared with the served release, which had no such mode"],
            duplicate_rows=4,
            populations={
                "held_out": Population(name="held_out", n_rows=1393, n_subjects=100, left_out_subjects=250,
                                       left_out_rows=3481, modes=modes),
                "all": Population(name="all", n_rows=4874, n_subjects=350, left_out_subjects=0, left_out_rows=0,
                                  sampled_from_subjects=910, modes={RAW: modes[RAW]}),
            },
            indexes={
                RAW: IndexRecall(kind="Flat", rows=4874, recall_at_1=1.0, recall_at_10=1.0, queries=0),
                "per_sample": IndexRecall(kind="IVF256,SQ8", rows=4874, recall_at_1=0.972, recall_at_10=0.9634,
                                         queries=256),
            },
        ),
        gate=GateDecision(
            promoted=True,
            reason="frontal-profile EER of per_sample is 9.83%, 2.36 points below the promoted release "
            "(95% interval −3.10 to −1.61); batch_stat does not differ beyond the tolerance of 0.",
            compared_with="20260313T020000Z-11d0ab",
        ),
        gated=GatedMetric(population="held_out", cell="frontal-profile", metric="eer"),
        quality=DataQuality(
            shards=7,
            rows_read=4911,
            rows_features=4874,
            quarantined={"zero norm": 21, "NaN or Inf": 9, "duplicate id": 4},
            forgotten=3,
            bad_shards=[ShardFault(shard="fold08.parquet", reason="no column 'embedding'", kept=True)],
        ),
        stages=[
            StageCost(stage="plan", seconds=1.94, cpu_seconds=2.5, rows=4911, peak_megabytes=412),
            StageCost(stage="reweight", seconds=0.5, cpu_seconds=0.96, rows=4911, peak_megabytes=1690),
            StageCost(stage="publish", seconds=0.04, cpu_seconds=0.04),
        ],
        weights=_weights(rng),
        trend=trend,
        provenance={
            "features version": 42,
            "model digests": {"per_sample": "1c0ffee5eed1", "batch_stat": "2c0ffee5eed2"},
            "versions": {"torch": "2.13.0", "faiss": "1.15.1", "deltalake": "1.6.6"},
            "settings": {"source": "s3://faces/shards", "gate": {"metric": "eer", "tolerance": 0.0}},
        },
    )  # fmt: skip


class Visit:
    """A page opened in the browser, with what it complained of and what it asked for."""

    def __init__(self, browser: Browser, file: Path | None = None, width: int = 1280, scheme: Any = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        if file is not None:
            self.page.goto(file.as_uri())

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium found: install one (apt-get install chromium) to test the page as it is seen")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"],
        )
        yield browser
        browser.close()
