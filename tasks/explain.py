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

from metrics.poses import UNKNOWN
from models.checkpoint import Checkpoint, load
from models.explain import identity_relatedness, rank_correlation, top_channels
from models.se import SEBlock
from reports.drawing import plot_files
from reports.plots import channel_relatedness
from reports.plots import channel_weights as draw
from schemas.errors import SettingsError
from schemas.metrics import POSE_CLASSES
from schemas.reports import ChannelWeights
from schemas.settings import ColumnNames
from storage.location import Location
from tasks.release import model_weights
from tasks.training.rows import TrainingRows, read_training_rows

SAMPLE_ROWS = 20_000


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
    for name, content in _files(found, related, correlation, top, changing).items():
        (place / name).write_bytes(content)
        files.append((place / name).uri)
    return Explanation(found, top, changing, correlation, files)


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
    }
    files = {"channels.csv": table.getvalue().encode(), "explanation.json": json.dumps(summary, indent=1).encode()}
    plots = draw(found)
    if related is not None:
        plots += channel_relatedness(found, related.tolist())
    return files | plot_files(plots)
