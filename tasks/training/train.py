"""Train: split the subjects, fit a network, let unseen people choose and measure it, write the checkpoint.

Subjects fall into train, validation and test by a salted hash of their name, so no person is in two parts. The rows
come from `tasks.training.rows`; the loop is `models.training`; what the figures mean is `metrics`.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from metrics.allpairs import AllPairs, Cell, all_pairs
from metrics.bootstrap import paired_bootstrap
from models.architectures import build, check_arguments
from models.checkpoint import library_versions, to_bytes
from models.dual_branch import DualBranchSENet
from models.inference import normalise, torch_device
from models.split import split_of, subject_key, with_enough_validation
from models.training import Candidate, Fitted, LabelledTensor, fit
from schemas.errors import TrainingError
from schemas.metrics import EER, FRONTAL_FRONTAL, FRONTAL_PROFILE, POSE_CLASSES, RAW, MetricId
from schemas.models import ModelCard
from schemas.reports import Estimate
from schemas.settings import TrainingSettings
from schemas.split import SplitRule
from storage.location import Location
from tasks.training.model_card import card_markdown
from tasks.training.rows import BLOCK_ROWS, TrainingRows, read_training_rows

log = logging.getLogger("frontalis.train")

FEWEST_SUBJECTS = 10
FEWEST_WITH_PAIRS = 2  # subjects of several rows, in train as in validation
WHITENING = 0.5  # chosen on validation folds of either network, with Recipe.lengthening (docs/training.md)
JUDGED_ROWS = 20_000  # all pairs of these take a second; more would not choose better
PROFILE = POSE_CLASSES.index("profile")
ERROR_RATES = (EER, *(MetricId.at(kind, fmr) for kind in ("fnmr", "fnmr_global") for fmr in (1e-2, 1e-3)))
# Frontal-frontal errors are rare, so on some fifty validation subjects the harm is five times as uncertain as the gain
# (standard errors of about 12% and 2.5%); with more weight its noise decides (docs/training.md).
HARM_WEIGHT = 0.25
HANDFUL = 5  # pairs that are added to both error counts, so that a handful of pairs decides nothing

Rates = dict[MetricId, float | None]
Differences = dict[str, dict[MetricId, Estimate]]


@dataclass(frozen=True)
class Trained:
    """What training came to.

    `improved` is False where no candidate beat the raw embeddings on validation. `rates` holds `ERROR_RATES` by mode
    and cell, `difference` the change to raw by cell, both on the subjects of the part `measured_on`.
    """

    out: str
    card: ModelCard
    improved: bool
    interrupted: bool
    best: Candidate
    rates: dict[str, dict[str, Rates]]
    difference: Differences
    measured_on: str
    parts: dict[str, int]


def train_model(settings: TrainingSettings, *, should_stop: Callable[[], bool] = lambda: False) -> Trained:
    """Train one checkpoint and write it with its card.

    Equal settings and rows give equal files, bit for bit, on one machine's CPU. Once `should_stop` returns True, the
    training ends; the best model so far is measured and written.

    Raises:
        TrainingError: too few subjects, no subject with two rows, no subject column, mixed dimensions, NaN.
        SettingsError: a source does not exist.
    """
    rows = _read(settings, settings.sources)
    rule = SplitRule(
        salt=settings.salt,
        train=1 - settings.validation - settings.test,
        validation=settings.validation,
        test=settings.test,
    )
    names, rows_each = np.unique(rows.subjects, return_counts=True)
    rule = with_enough_validation(rule, names[rows_each > 1], FEWEST_WITH_PAIRS)
    if rule.validation > settings.validation:
        log.warning("train: few subjects: %.0f%% of them choose the model, not %.0f%%", 100 * rule.validation,
                    100 * settings.validation)  # fmt: skip
    parts = _split(rows, rule)
    _check(rows, parts)
    learn, data = parts["train"], rows.digest
    if settings.augment:
        more = _read(settings, settings.augment)
        learn = _joined(learn, more.take(np.isin(more.subjects, np.unique(learn.subjects))))
        data = hashlib.blake2b((rows.digest + more.digest).encode(), digest_size=16).hexdigest()
    dim = rows.x.shape[1]
    mean_norm = float(np.linalg.norm(learn.x.astype(np.float64), axis=1).mean())
    arguments = _arguments(settings, dim)
    counts = {name: len(np.unique(part.subjects)) for name, part in parts.items()}
    log.info(
        "train: %d subjects and %d rows to learn from, %d subjects to choose, %d to measure; D = %d",
        counts["train"], len(learn), counts["validation"], counts["test"], dim,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    model = build(settings.architecture, arguments)
    scorer = ValidationScorer(parts["validation"].at_most(JUDGED_ROWS), mean_norm)
    fitted = _fit(settings, model, learn, scorer, mean_norm, should_stop)
    improved = fitted.best.score < 0
    if fitted.interrupted:
        log.warning("train: interrupted; step %d is kept, and the part to measure is measured", fitted.best.step)
    if not improved:
        log.warning(
            "train: %s (score %+.4f, 0 is raw). %s %s",
            "interrupted BEFORE IT WAS BETTER THAN RAW on the validation subjects"
            if fitted.interrupted
            else "NO STEP WAS BETTER THAN RAW on the validation subjects",
            fitted.best.score,
            "The model written gives raw embeddings back."
            if fitted.best.score == 0
            else "The model written is WORSE than raw: do not serve it.",
            "Let it train longer." if fitted.interrupted else "Train on more subjects or views.",
        )
    measured_on = "test" if _has_pairs(parts["test"]) else "validation"
    rates, difference = _measure(fitted.model, parts[measured_on].at_most(JUDGED_ROWS), mean_norm, settings)
    card = ModelCard(
        architecture=settings.architecture,
        arguments=arguments,
        mode=settings.mode,
        embedding_dim=dim,
        normalisation="mean_norm",
        mean_norm=mean_norm,
        training_data=data,
        split=rule,
        metrics={
            "loss": settings.loss,
            "seed": settings.seed,
            "best_step": fitted.best.step,
            "change_scaled_by": fitted.best.share,
            "improved_on_validation": improved,
            "validation_scores": [[one.step, one.share, one.score] for one in fitted.candidates],
            "alpha": [m.alpha.item() for m in fitted.model.modules() if isinstance(m, DualBranchSENet)],
            "measured_on": measured_on,
            "rates": _json(rates),
            "difference": {
                cell: {metric: one.model_dump() for metric, one in found.items()} for cell, found in difference.items()
            },
            "subjects": _json(counts),
            "rows": _json({name: len(part) for name, part in parts.items()}),
            "augmented_rows": len(learn) - len(parts["train"]),
            "left_out": _json(rows.skipped),
        },
        versions=library_versions(),
    )
    seen = np.unique(np.concatenate([parts["train"].subjects, parts["validation"].subjects]))
    keys = np.array([subject_key(name, rule.salt) for name in seen], np.int64)
    Location(settings.out).write_bytes(to_bytes(card, fitted.model, keys))
    Location(f"{settings.out}.md").write_bytes(card_markdown(card).encode())
    return Trained(
        out=settings.out,
        card=card,
        improved=improved,
        interrupted=fitted.interrupted,
        best=fitted.best,
        rates=rates,
        difference=difference,
        measured_on=measured_on,
        parts=counts,
    )


class ValidationScorer:
    """Scores models on the subjects it was given, against the raw embeddings; keeps the figures behind each score."""

    def __init__(self, rows: TrainingRows, mean_norm: float) -> None:
        _, self._codes = np.unique(rows.subjects, return_inverse=True)
        self._classes = rows.classes
        self._x = _scaled(rows.x, mean_norm)
        self.raw = sweep(rows.x, self._codes, rows.classes)
        self.seen: dict[float, Rates] = {}  # of the cell that decides; whole sweeps would fill the memory

    def __call__(self, model: nn.Module) -> float:
        """Return the `validation_score` of a model."""
        pairs = sweep(features(model, self._x), self._codes, self._classes)
        score = validation_score(pairs, self.raw)
        self.seen[score] = error_rates(_told(pairs, self.raw)[0])
        return score


def validation_score(pairs: AllPairs, raw: AllPairs) -> float:
    """Return what the choice among candidates minimises: gain plus a quarter of the harm; raw has 0, better is less.

    Gain is the mean log ratio to raw of five error rates of frontal–profile pairs: EER, and FNMR at FMR 1e-2 and 1e-3,
    at the cell's own thresholds and at those of all pairs. One rate alone is a poor guide: the EER goes on falling long
    after the low-FMR end has turned. Harm is the sum of what frontal–frontal EER and FNMR at the FMR 1e-3 of all pairs
    have got worse, as log ratios. Without frontal–profile pairs, gain is about all pairs. Rates that are not estimable
    on these subjects stay out.
    """
    cell, base = _told(pairs, raw)
    gains = _log_ratios(cell, base, ERROR_RATES)
    harms = []
    if FRONTAL_FRONTAL in raw.cells:
        frontal, raw_frontal = pairs.cells[FRONTAL_FRONTAL], raw.cells[FRONTAL_FRONTAL]
        harms = _log_ratios(frontal, raw_frontal, (EER, MetricId("fnmr_global@1e-3")))
    return sum(gains) / max(len(gains), 1) + HARM_WEIGHT * sum(max(0.0, harm) for harm in harms)


def error_rates(cell: Cell) -> Rates:
    """Return `ERROR_RATES` of a cell, None for what is not estimable."""
    found = cell.estimates()
    return {metric: found[metric].value for metric in ERROR_RATES}


def sweep(x: np.ndarray, subjects: np.ndarray, classes: np.ndarray) -> AllPairs:
    """Compare all rows by pose pair, at the false match rates that training looks at."""
    return all_pairs(x, subjects, classes=classes, class_names=POSE_CLASSES, fmr_points=(1e-2, 1e-3))


def features(model: nn.Module, x: Tensor) -> np.ndarray:
    """Return front of a model in eval mode for scaled rows, float32 `[N, D]`."""
    with torch.inference_mode():
        return np.concatenate([model(block).numpy() for block in torch.split(x, BLOCK_ROWS)])


def _fit(
    settings: TrainingSettings,
    model: nn.Module,
    learn: TrainingRows,
    judge: ValidationScorer,
    mean_norm: float,
    should_stop: Callable[[], bool],
) -> Fitted:
    def report(step: int, loss: float, best: Candidate) -> None:
        base = _told(judge.raw, judge.raw)[0]
        log.info(
            "train: step %d of %d, loss %.4f; validation: score %+.4f with the change scaled by %g, %s EER %s (raw %s)",
            step, settings.steps, loss, best.score, best.share, base.name,
            _percent(judge.seen[best.score][EER]), _percent(base.verification.eer.rate),
        )  # fmt: skip

    _, subjects = np.unique(learn.subjects, return_inverse=True)
    rows = LabelledTensor(
        _scaled(learn.x, mean_norm), torch.from_numpy(subjects), torch.from_numpy(learn.classes == PROFILE)
    )
    return fit(
        model,
        rows,
        judge,
        steps=settings.steps,
        seed=settings.seed,
        loss=settings.loss,
        device=torch_device(settings.device),
        report=report,
        should_stop=should_stop,
    )


def _measure(
    model: nn.Module, rows: TrainingRows, mean_norm: float, settings: TrainingSettings
) -> tuple[dict[str, dict[str, Rates]], Differences]:
    """Return the rates by mode and cell, and the paired differences to raw with their 95% intervals."""
    _, codes = np.unique(rows.subjects, return_inverse=True)
    raw = sweep(rows.x, codes, rows.classes)
    ours = sweep(features(model, _scaled(rows.x, mean_norm)), codes, rows.classes)
    rates = {
        mode: {cell.name: error_rates(cell) for cell in pairs if cell.verification.n_genuine}
        for mode, pairs in ((RAW, raw), (settings.mode, ours))
    }
    if settings.resamples == 0:
        return rates, {}
    paired = paired_bootstrap(raw, ours, resamples=settings.resamples, seed=settings.seed)
    difference = {name: {metric: paired[name][metric] for metric in ERROR_RATES} for name in rates[RAW]}
    return rates, difference


def _told(pairs: AllPairs, raw: AllPairs) -> tuple[Cell, Cell]:
    """Return the cell that says whether a model helps, of both: frontal–profile pairs, or all without such."""
    cell, base = pairs.cells.get(FRONTAL_PROFILE), raw.cells.get(FRONTAL_PROFILE)
    if cell is None or base is None or base.verification.eer.rate is None:
        return pairs.overall, raw.overall
    return cell, base


def _log_ratios(cell: Cell, base: Cell, metrics: Sequence[MetricId]) -> list[float]:
    new, old = error_rates(cell), error_rates(base)
    few = HANDFUL / max(base.verification.n_genuine, 1)
    both = [(new[name], old[name]) for name in metrics]
    return [math.log((a + few) / (b + few)) for a, b in both if a is not None and b is not None]


def _read(settings: TrainingSettings, sources: tuple[str, ...]) -> TrainingRows:
    return read_training_rows(sources, settings.columns, settings.max_rows, skip_bad_rows=settings.skip_bad_rows)


def _scaled(x: np.ndarray, mean_norm: float) -> Tensor:
    return normalise(torch.from_numpy(x), "mean_norm", mean_norm)


def _split(rows: TrainingRows, rule: SplitRule) -> dict[str, TrainingRows]:
    names, inverse = np.unique(rows.subjects, return_inverse=True)
    part = np.array([split_of(name, rule) for name in names], dtype=object)[inverse]
    return {name: rows.take(part == name) for name in ("train", "validation", "test")}


def _arguments(settings: TrainingSettings, dim: int) -> dict[str, JsonValue]:
    size: dict[str, JsonValue] = {"channels": dim} if settings.architecture == "se" else {"feature_dim": dim}
    if settings.architecture == "dual_branch_ensemble":
        size["whitening"] = WHITENING
    reduction = min(16, max(dim // 4, 1))  # no bottleneck of fewer than four units where D allows it
    return check_arguments(
        settings.architecture, {**size, "reduction": reduction, "use_batch_stat": settings.mode == "batch_stat"}
    ).model_dump()


def _check(rows: TrainingRows, parts: Mapping[str, TrainingRows]) -> None:
    names = np.unique(rows.subjects)
    if len(names) < FEWEST_SUBJECTS:
        raise TrainingError(
            f"{len(names)} subjects are too few to train, choose and measure on; {FEWEST_SUBJECTS} are the least, some "
            "hundred are wanted."
        )
    if not _has_pairs(rows, subjects=1):
        raise TrainingError(
            f"each of the {len(names)} subjects has a single row, so there is no genuine pair to learn from; add more "
            "samples of the same subjects."
        )
    for name in ("train", "validation"):
        if not _has_pairs(parts[name]):
            others = "--validation or --test" if name == "train" else "--test"
            raise TrainingError(
                f"the {name} part has {len(np.unique(parts[name].subjects))} subjects, too few for a genuine and an "
                f"impostor pair; pass more subjects with several rows each, or a smaller {others}."
            )


def _has_pairs(rows: TrainingRows, subjects: int = 2) -> bool:
    _, counts = np.unique(rows.subjects, return_counts=True)
    return len(counts) >= subjects and bool((counts > 1).any())


def _joined(first: TrainingRows, second: TrainingRows) -> TrainingRows:
    if len(second) == 0:
        raise TrainingError("--augment: has no row of a training subject; pass further views of the same subjects.")
    if first.x.shape[1] != second.x.shape[1]:
        raise TrainingError(
            f"--augment: embeddings have {second.x.shape[1]} numbers, the sources {first.x.shape[1]}; "
            "use those of the same network."
        )
    return TrainingRows(
        np.concatenate([first.x, second.x]),
        np.concatenate([first.subjects, second.subjects]),
        np.concatenate([first.classes, second.classes]),
        first.digest,
        first.skipped,
    )


def _json(value: Mapping[str, object]) -> dict[str, JsonValue]:
    return dict(value)  # type: ignore[arg-type]


def _percent(rate: float | None) -> str:
    return "n/e" if rate is None else f"{100 * rate:.2f}%"
