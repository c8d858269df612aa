"""Release: the record of a published result, and the files of its report.

The page itself is rendered by `reports.html`, the history kept by `storage.releases`. Channel weights are measured on a
sample of the raw rows of the release.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import faiss
import numpy as np
import torch

from models.checkpoint import Checkpoint, library_versions
from models.explain import agreement, member_weights, summarise, top_channels
from models.inference import normalise
from schemas.features import digest_of
from schemas.metrics import RAW, measured_modes
from schemas.releases import IndexRef, ModelRef, Release, release_name
from schemas.reports import (
    ChannelWeights,
    DataQuality,
    Evaluation,
    GateDecision,
    ReportInput,
    ShardFault,
    StageCost,
    TrendPoint,
)
from schemas.settings import PipelineSettings, checked
from storage.features import features_table, matrix_of, read_rows
from storage.layout import REPORT_METRICS, REPORT_PAGE, REPORT_PLOTS, report_folder
from storage.location import Location
from storage.tables import Snapshot
from storage.tombstones import Tombstones
from tasks.checkpoints import stored_checkpoint
from tasks.gate import gated

SAMPLE_ROWS = 2048
TREND_RELEASES = 59  # before the release itself


def release_content(
    settings: PipelineSettings, feature_files: Iterable[str], bad_shards: Iterable[ShardFault], pairs: str | None
) -> str:
    """Return the digest of all that a release depends on: equal content needs no new release.

    Args:
        settings: of these, the ones that shape index, evaluation and gate.
        feature_files: paths of the feature files.
        bad_shards: shards that could not be used.
        pairs: digest of the pairs file, if there is one.
    """
    chosen = settings.model_dump(
        mode="json",
        include={"index", "evaluation", "gate", "query"},
        exclude={"evaluation": {"device"}, "gate": {"drop_modes"}},
    )
    return digest_of(
        *(path.encode() for path in sorted(feature_files)),
        repr(sorted(chosen.items())).encode(),
        repr(sorted(fault.shard for fault in bad_shards)).encode(),
        (pairs or "").encode(),
    )


def next_release_name(earlier: Sequence[Release], content: str) -> str:
    """Return the name of the release that follows `earlier`: equal for equal content."""
    return release_name(_next_number(earlier), content)


def build_release(
    settings: PipelineSettings,
    earlier: Sequence[Release],
    *,
    content: str,
    features: Snapshot,
    quarantine: Snapshot,
    models: Mapping[str, ModelRef],
    indexes: Mapping[str, IndexRef],
    data: DataQuality,
    evaluation: Evaluation,
    gate: GateDecision,
    tombstones: Tombstones,
    source_version: int | None = None,
    stages: Sequence[StageCost] = (),
) -> Release:
    """Return the record of a new release. Nothing is written: see `write_report` and `storage.releases`.

    Args:
        settings: those it was made with.
        earlier: the history it follows.
        content: see `release_content`.
        features: the features table.
        quarantine: the quarantine table.
        models: by mode.
        indexes: by mode, raw included.
        data: where the rows read have gone.
        evaluation: what was measured.
        gate: whether it is promoted.
        tombstones: the list that the rows of features and quarantine were matched with.
        source_version: of the Delta table that was read, None for a folder.
        stages: what the stages of the run took so far.
    """
    measured = gated(evaluation, settings.gate)
    name = next_release_name(earlier, content)
    return Release(
        release=name,
        number=_next_number(earlier),
        created=datetime.now(UTC),
        content=content,
        source=settings.source,
        source_version=source_version,
        features_version=features.version,
        quarantine_version=quarantine.version if quarantine.exists else None,
        models=dict(models),
        indexes=dict(indexes),
        data=data,
        gate=gate,
        gated=measured.values,
        gated_name=measured.name,
        report=f"{report_folder(name)}/{REPORT_PAGE}",
        tombstones=tombstones.digest,
        tombstone_count=len(tombstones.entries),
        settings=settings.model_dump(mode="json"),
        stages=list(stages),
    )


def _next_number(earlier: Sequence[Release]) -> int:
    return earlier[-1].number + 1 if earlier else 1


def write_report(store: Location, release: Release, evaluation: Evaluation, earlier: Sequence[Release]) -> None:
    """Write `index.html`, `metrics.json` and the plots of a release.

    Raises:
        StoreError: the store cannot be written.
    """
    from reports import html  # Matplotlib loads only once there is something to draw

    gate = checked(PipelineSettings, release.settings).gate
    report = ReportInput(
        release=release.release,
        created=release.created,
        evaluation=evaluation,
        gate=release.gate,
        gated=gated(evaluation, gate).metric,
        quality=release.data,
        stages=release.stages,
        weights=release_weights(store, release),
        trend=[_point(old) for old in [*earlier[-TREND_RELEASES:], release] if old.gated_name == release.gated_name],
        provenance=provenance(release),
    )
    folder = report_folder(release.release)
    drawn = html.draw(report)
    for plot in (plot for figure in drawn for plot in figure.plots):
        (store / f"{folder}/{REPORT_PLOTS}/{plot.name}.svg").write_bytes(plot.svg)
    metrics = {"release": json.loads(release.model_dump_json()), "evaluation": json.loads(evaluation.model_dump_json())}
    (store / f"{folder}/{REPORT_METRICS}").write_bytes(json.dumps(metrics, indent=1).encode())
    (store / f"{folder}/{REPORT_PAGE}").write_bytes(html.render_report(report, drawn).encode())


def release_weights(store: Location, release: Release) -> list[ChannelWeights]:
    """Return the channel weights of every SE block of the release's models over a sample of its raw rows."""
    sample = _raw_sample(store, release)
    weights = []
    for mode in measured_modes(release.models)[1:]:
        checkpoint = stored_checkpoint(store, release.models[mode])
        weights += model_weights(checkpoint, mode, sample) if len(sample) else []
    return weights


def model_weights(checkpoint: Checkpoint, mode: str, rows: np.ndarray, k: int = 10) -> list[ChannelWeights]:
    """Return mean, spread and the `k` top channels of each SE block over rows `[n, D]` (not normalised)."""
    card = checkpoint.card
    x = normalise(torch.from_numpy(np.ascontiguousarray(rows)), card.normalisation, card.mean_norm)
    found = []
    for branch, members in member_weights(checkpoint.model, x).items():
        summary = summarise(members.mean(axis=0))
        found.append(
            ChannelWeights(
                mode=mode,
                branch=branch,
                mean=summary.mean.tolist(),
                spread=summary.spread.tolist(),
                top=top_channels(summary.mean, k),
                agreement=agreement(members),
            )
        )
    return found


def provenance(release: Release) -> dict[str, Any]:
    """Return digests, versions and settings of a release as JSON."""
    return {
        "source": release.source,
        **({} if release.source_version is None else {"source version": release.source_version}),
        "features version": release.features_version,
        "content": release.content,
        "models": {mode: model.digest for mode, model in release.models.items()},
        "model files": {mode: model.file_digest for mode, model in release.models.items()},
        "indexes": {mode: f"{index.factory}, {index.digest}" for mode, index in release.indexes.items()},
        "versions": library_versions() | run_versions(),
        "settings": release.settings,
    }


def run_versions() -> dict[str, str]:
    """Return the versions of Frontalis and of what else decides a release's files and metrics."""
    names = ("frontalis", "pyarrow", "deltalake", "prefect")
    return {name: metadata.version(name) for name in names} | {"faiss": faiss.__version__}


def _point(release: Release) -> TrendPoint:
    return TrendPoint(
        release=release.release, created=release.created, promoted=release.gate.promoted, values=release.gated
    )


def _raw_sample(store: Location, release: Release) -> np.ndarray:
    """Return up to `SAMPLE_ROWS` raw rows, the same number from every file."""
    table = features_table(store)
    snapshot = table.snapshot(release.features_version)
    files = [file for file in snapshot.of_mode(RAW) if file.rows]
    share = max(1, SAMPLE_ROWS // max(1, len(files)))
    parts = []
    for file in files[:SAMPLE_ROWS]:
        for batch in read_rows(table, file, ["front"], rows=share):
            parts.append(matrix_of(batch.column("front"), file.path))
            break
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
