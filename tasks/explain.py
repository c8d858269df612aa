"""Explain: which channels a model weights up and down, and whether those are the ones that distinguish people.

Given labelled shards, each channel's identity-relatedness (variance between subjects over variance within a subject
across views) is measured on the raw embeddings and set against the learnt weights. Definitions are those of
`models.explain`, drawing those of `reports.plots`.
"""

import csv
import io
import json
from dataclasses import dataclass

import numpy as np
import torch

from metrics.allpairs import AllPairs
from metrics.bootstrap import relative_bootstrap
from metrics.poses import UNKNOWN
from models.checkpoint import Checkpoint, load
from models.explain import (
    identity_relatedness,
    rank_correlation,
    top_channels,
    with_one_weight,
    with_shuffled_weights,
)
from models.inference import normalise
from models.se import SEBlock
from reports.drawing import plot_files
from reports.plots import channel_relatedness
from reports.plots import channel_weights as draw
from schemas.errors import SettingsError
from schemas.metrics import EER, POSE_CLASSES, MetricId
from schemas.reports import ChannelWeights, Estimate
from schemas.settings import ColumnNames
from storage.location import Location
from tasks.release import model_weights
from tasks.training.length import FEWEST, deciding_subjects
from tasks.training.rows import TrainingRows, read_training_rows
from tasks.training.selection import SCORED_ROWS, compare_by_pose, deciding_cells, front

SAMPLE_ROWS = 20_000
AS_TRAINED, ONE_WEIGHT, SHUFFLED = ABLATED = ("as trained", "one weight for all channels", "weights of other channels")
ABLATION_RATES = (EER, MetricId("fnmr@1e-2"), MetricId("fnmr@1e-3"))
RESAMPLES = 1000


@dataclass(frozen=True)
class Explanation:
    """What was found, and the files that hold it.

    `related` lists the channels most related to identity, `changing` those that change most with the view, the worst
    first, each with its identity-relatedness. Channels without a finite ratio are left out (they vary nowhere, or never
    within a subject; `channels.csv` shows them). `correlation` is, by branch, Spearman's rank correlation of the learnt
    weights with that relatedness, None where it cannot be measured.
    """

    weights: list[ChannelWeights]
    related: list[tuple[int, float]]
    changing: list[tuple[int, float]]
    correlation: dict[str, float | None]
    files: list[str]
    ablation: "Ablation | None" = None


@dataclass(frozen=True)
class Ablation:
    """What the SE weights are worth: error rates with them as trained, made equal, and given to other channels.

    `changes` holds for each of `ABLATED` the relative change of the error rates of `cell` to raw, `against` that of the
    two ablations to the model as trained; 95% intervals over the `subjects`, whom the model has not seen. `text` says
    what follows.
    """

    cell: str
    subjects: int
    changes: dict[str, dict[MetricId, Estimate]]
    against: dict[str, dict[MetricId, Estimate]]
    text: str


def explain_model(
    model: str, source: str | None, out: str, k: int = 10, columns: ColumnNames | None = None
) -> Explanation:
    """Write plots, a table of all channels and a summary of one checkpoint into a folder.

    Args:
        model: checkpoint file.
        source: shards to weigh; needed for `per_sample`, whose weights depend on the row. With subjects and poses in
            it, identity-relatedness is measured too.
        out: folder for `channels.csv`, `explanation.json` and the plots.
        k: how many top channels are listed.
        columns: how the columns of the source are called, where not by their own names.

    Raises:
        SettingsError: no such file, or a source is needed and missing.
        BadModelError: the file is no checkpoint, or the embeddings have another length.
    """
    try:
        checkpoint = load(Location(model).read_bytes())
    except FileNotFoundError as error:
        raise SettingsError(f"--model {model}: there is no such file.") from error
    rows = _rows(checkpoint, model, source, columns or ColumnNames())
    found = model_weights(checkpoint, checkpoint.card.mode, rows.x[:SAMPLE_ROWS], k)
    related = _relatedness(rows) if source is not None else None
    correlation = {
        one.branch: None if related is None else rank_correlation(np.array(one.mean), related) for one in found
    }
    top = [] if related is None else _finite_top(related, k)
    changing = [] if related is None else [(channel, -ratio) for channel, ratio in _finite_top(-related, k)]
    place = Location(out)
    files = []
    ablation = ablate(checkpoint, rows) if source is not None else None
    for name, content in _files(found, related, correlation, top, changing, ablation).items():
        (place / name).write_bytes(content)
        files.append((place / name).uri)
    return Explanation(found, top, changing, correlation, files, ablation)


def ablate(checkpoint: Checkpoint, rows: TrainingRows) -> Ablation | None:
    """Measure the model with its SE weights, with one number for all, and with shuffled ones, on unseen subjects.

    None where the checkpoint does not record whom it has seen, or fewer than `FEWEST` subjects with pairs are left.
    """
    if checkpoint.seen_subjects is None:
        return None
    rows = rows.take(rows.subjects != "")
    rows = rows.take(~checkpoint.has_seen(rows.subjects.tolist())) if len(rows) else rows
    rows = rows.take(~checkpoint.has_seen_rows(rows.x)).at_most(SCORED_ROWS) if len(rows) else rows
    subjects = len(deciding_subjects(rows))
    if subjects < FEWEST:
        return None
    x = normalise(torch.from_numpy(rows.x), checkpoint.card.normalisation, checkpoint.card.mean_norm)
    models = (checkpoint.model, with_one_weight(checkpoint.model, x), with_shuffled_weights(checkpoint.model))
    _, codes = np.unique(rows.subjects, return_inverse=True)
    raw = compare_by_pose(rows.x, codes, rows.classes)
    measured = {
        name: compare_by_pose(front(model, x), codes, rows.classes) for name, model in zip(ABLATED, models, strict=True)
    }
    cell = deciding_cells(raw, raw)[1].name

    def change(before: AllPairs, after: AllPairs) -> dict[MetricId, Estimate]:
        found = relative_bootstrap(before, after, resamples=RESAMPLES)[cell]
        return {metric: found[metric] for metric in ABLATION_RATES}

    changes = {name: change(raw, pairs) for name, pairs in measured.items()}
    against = {name: change(measured[AS_TRAINED], measured[name]) for name in (ONE_WEIGHT, SHUFFLED)}
    return Ablation(cell, subjects, changes, against, _what_follows(against))


def _what_follows(against: dict[str, dict[MetricId, Estimate]]) -> str:
    worse = [
        f"{name} ({metric})"
        for name, found in against.items()
        for metric, one in found.items()
        if one.low is not None and one.low > 0
    ]
    if worse:
        return f"The SE weights help: error rates are higher, beyond the 95% interval, with {', '.join(worse)}."
    return (
        "No error rate is higher, beyond the 95% interval, without the SE weights as trained. On these subjects the "
        "weights are not shown to help; what is gained comes from the other layers."
    )


def ablation_document(ablation: Ablation) -> dict[str, object]:
    """Return an ablation as JSON."""

    def rates(found: dict[str, dict[MetricId, Estimate]]) -> dict[str, dict[str, object]]:
        return {name: {metric: one.model_dump() for metric, one in of.items()} for name, of in found.items()}

    return {
        "cell": ablation.cell,
        "subjects": ablation.subjects,
        "relative_change_to_raw": rates(ablation.changes),
        "relative_change_to_as_trained": rates(ablation.against),
        "text": ablation.text,
    }


def _rows(checkpoint: Checkpoint, model: str, source: str | None, columns: ColumnNames) -> TrainingRows:
    dim = checkpoint.card.embedding_dim
    if source is None:
        blocks = [block for block in checkpoint.model.modules() if isinstance(block, SEBlock)]
        if not all(block.use_batch_stat and block.gathered for block in blocks):
            raise SettingsError(
                f"--model {model}: a {checkpoint.card.mode} model weights each embedding by itself; pass --source."
            )
        # Under a frozen statistic any row gives the one weight vector there is.
        return TrainingRows(np.ones((1, dim), np.float32), np.array(["-"], object), np.array([UNKNOWN]), "")
    rows = read_training_rows([source], columns, labelled=False)
    if rows.x.shape[1] != dim:
        raise SettingsError(f"--source {source}: embeddings have {rows.x.shape[1]} numbers, the model wants {dim}.")
    order = np.random.default_rng(0).permutation(len(rows))
    return rows.take(order)


def _relatedness(rows: TrainingRows) -> np.ndarray | None:
    known = (rows.classes != UNKNOWN) & (rows.subjects != "")
    unit = rows.x[known] / np.linalg.norm(rows.x[known].astype(np.float64), axis=1, keepdims=True)
    try:
        return identity_relatedness(
            unit, rows.subjects[known].tolist(), [POSE_CLASSES[code] for code in rows.classes[known]]
        )
    except ValueError:  # fewer than two subjects were seen in two views
        return None


def _finite_top(related: np.ndarray, k: int) -> list[tuple[int, float]]:
    ranked = top_channels(np.where(np.isfinite(related), related, -np.inf), k)
    return [(channel, ratio) for channel, ratio in ranked if np.isfinite(ratio)]


def _files(
    found: list[ChannelWeights],
    related: np.ndarray | None,
    correlation: dict[str, float | None],
    top: list[tuple[int, float]],
    changing: list[tuple[int, float]],
    ablation: Ablation | None,
) -> dict[str, bytes]:
    table = io.StringIO()
    writer = csv.writer(table)
    heads = [head for one in found for head in (f"{one.branch} weight", f"{one.branch} spread")]
    writer.writerow(["channel", *heads, "identity relatedness"])
    for channel in range(len(found[0].mean)):
        values = [value for one in found for value in (one.mean[channel], one.spread[channel])]
        writer.writerow([channel, *values, "" if related is None else float(related[channel])])
    summary = {
        "mode": found[0].mode,
        "top channels by weight": {one.branch: one.top for one in found},
        "agreement of the members' weights": {one.branch: one.agreement for one in found},
        "top channels by identity relatedness": top,
        "channels that change most with the view": changing,
        "rank correlation of weight and identity relatedness": correlation,
        "ablation of the weights": None if ablation is None else ablation_document(ablation),
    }
    files = {"channels.csv": table.getvalue().encode(), "explanation.json": json.dumps(summary, indent=1).encode()}
    plots = draw(found)
    if related is not None:
        plots += channel_relatedness(found, related.tolist())
    return files | plot_files(plots)
