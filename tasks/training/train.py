"""Train: split the subjects, fit a network, select and measure it on held-out subjects, write the checkpoint.

Subjects fall into train, validation and test by a salted hash of their name, so no subject is in two parts. Rows come
from `tasks.training.rows`, the loop from `models.training`, the score from `tasks.training.selection`.
"""

import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import JsonValue
from torch import nn

from metrics.bootstrap import paired_bootstrap
from metrics.poses import PROFILE
from models.architectures import build, check_arguments
from models.checkpoint import library_versions, to_bytes
from models.dual_branch import DualBranchSENet
from models.inference import torch_device
from models.seen import Seen
from models.split import split_of, with_enough_validation
from models.training import Candidate, Fitted, LabelledTensor, fit
from schemas.errors import TrainingError
from schemas.metrics import EER, RAW
from schemas.models import ModelCard
from schemas.reports import Differences
from schemas.settings import TrainingSettings
from schemas.split import SplitRule
from storage.location import Location
from tasks.training.model_card import card_markdown
from tasks.training.rows import TrainingRows, read_training_rows
from tasks.training.selection import (
    ERROR_RATES,
    SCORED_ROWS,
    Rates,
    ValidationScorer,
    compare_by_pose,
    error_rates,
    front,
    scaled,
)

log = logging.getLogger("frontalis.train")

FEWEST_SUBJECTS = 10
FEWEST_WITH_PAIRS = 2  # subjects with several rows, in train as in validation
WHITENING = 0.5  # chosen on validation folds of either network, with Recipe.lengthening (docs/training.md)


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    `improved` is False where no candidate beat the raw embeddings on validation. `rates` holds `ERROR_RATES` by mode
    and cell, `difference` the change to raw by cell, both on the subjects of the part `measured_on`. `parts` counts the
    subjects of each part.
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

    Equal settings and rows give equal weights, bit for bit, on one machine's CPU; files differ in the random key of the
    hashes of training subjects. Once `should_stop` returns True, the
    training ends; the best model so far is measured and written.

    Raises:
        TrainingError: too few subjects, no subject with two rows, no subject column, mixed dimensions, NaN.
        SettingsError: a source does not exist.
    """
    rows = _read(settings, settings.sources)
    rule = _split_rule(settings, rows)
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
        "train: %d subjects and %d rows to train on, %d validation subjects, %d test subjects; D = %d",
        counts["train"], len(learn), counts["validation"], counts["test"], dim,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    model = build(settings.architecture, arguments)
    scorer = ValidationScorer(parts["validation"].at_most(SCORED_ROWS), mean_norm)
    fitted = _fit(settings, model, learn, scorer, mean_norm, should_stop)
    improved = fitted.best.score < 0
    _warn(fitted, improved)
    measured_on = "test" if _has_pairs(parts["test"]) else "validation"
    rates, difference = _measure(fitted.model, parts[measured_on].at_most(SCORED_ROWS), mean_norm, settings)
    key = secrets.token_hex(16)
    card = ModelCard(
        architecture=settings.architecture,
        arguments=arguments,
        mode=settings.mode,
        embedding_dim=dim,
        normalisation="mean_norm",
        mean_norm=mean_norm,
        training_data=data,
        split=rule,
        seen_key=key,
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
    subjects = np.unique(np.concatenate([parts["train"].subjects, parts["validation"].subjects]))
    seen = Seen.of(subjects, [learn.x, parts["validation"].x], key)
    Location(settings.out).write_bytes(to_bytes(card, fitted.model, seen))
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


def _fit(
    settings: TrainingSettings,
    model: nn.Module,
    learn: TrainingRows,
    scorer: ValidationScorer,
    mean_norm: float,
    should_stop: Callable[[], bool],
) -> Fitted:
    def report(step: int, loss: float, best: Candidate) -> None:
        base = scorer.raw_cell
        log.info(
            "train: step %d of %d, loss %.4f; validation: %s EER %s (raw %s): %s",
            step, settings.steps, loss, base.name,
            _percent(scorer.rates[best.score][EER]), _percent(base.verification.eer.value),
            "better than raw" if best.score < 0 else "not better than raw",
            extra={"stage": "train", "done": step, "total": settings.steps},
        )  # fmt: skip

    log.info("train: %d steps", settings.steps, extra={"stage": "train", "done": 0, "total": settings.steps})
    _, subjects = np.unique(learn.subjects, return_inverse=True)
    rows = LabelledTensor(
        scaled(learn.x, mean_norm), torch.from_numpy(subjects), torch.from_numpy(learn.classes == PROFILE)
    )
    return fit(
        model,
        rows,
        scorer,
        steps=settings.steps,
        seed=settings.seed,
        loss=settings.loss,
        device=torch_device(settings.device),
        report=report,
        should_stop=should_stop,
    )


def _warn(fitted: Fitted, improved: bool) -> None:
    if fitted.interrupted:
        log.warning("train: interrupted; step %d is kept and measured", fitted.best.step)
    if improved:
        return
    log.warning(
        "train: %s (score %+.4f, raw is 0). %s %s",
        "interrupted BEFORE IT WAS BETTER THAN RAW on the validation subjects"
        if fitted.interrupted
        else "NO STEP WAS BETTER THAN RAW on the validation subjects",
        fitted.best.score,
        "The model written gives raw embeddings back."
        if fitted.best.score == 0
        else "The model written is WORSE than raw: do not serve it.",
        "Let it train longer." if fitted.interrupted else "Train on more subjects or views.",
    )


def _measure(
    model: nn.Module, rows: TrainingRows, mean_norm: float, settings: TrainingSettings
) -> tuple[dict[str, dict[str, Rates]], Differences]:
    """Return the error rates by mode and cell, and the paired differences to raw by cell, with 95% intervals."""
    _, codes = np.unique(rows.subjects, return_inverse=True)
    raw = compare_by_pose(rows.x, codes, rows.classes)
    ours = compare_by_pose(front(model, scaled(rows.x, mean_norm)), codes, rows.classes)
    rates = {
        mode: {cell.name: error_rates(cell) for cell in pairs if cell.verification.n_genuine}
        for mode, pairs in ((RAW, raw), (settings.mode, ours))
    }
    if settings.resamples == 0:
        return rates, {}
    paired = paired_bootstrap(raw, ours, resamples=settings.resamples, seed=settings.seed)
    difference = {name: {metric: paired[name][metric] for metric in ERROR_RATES} for name in rates[RAW]}
    return rates, difference


def _read(settings: TrainingSettings, sources: tuple[str, ...]) -> TrainingRows:
    return read_training_rows(sources, settings.columns, settings.max_rows, skip_bad_rows=settings.skip_bad_rows)


def _split_rule(settings: TrainingSettings, rows: TrainingRows) -> SplitRule:
    rule = SplitRule(
        salt=settings.salt,
        train=1 - settings.validation - settings.test,
        validation=settings.validation,
        test=settings.test,
    )
    names, rows_each = np.unique(rows.subjects, return_counts=True)
    rule = with_enough_validation(rule, names[rows_each > 1], FEWEST_WITH_PAIRS)
    if rule.validation > settings.validation:
        log.warning(
            "train: few subjects: %.0f%% of them are used for validation, not %.0f%%",
            100 * rule.validation, 100 * settings.validation,
        )  # fmt: skip
    return rule


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
