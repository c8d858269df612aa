"""Train: split the subjects, fit a network, choose how far it goes, measure it on test subjects, write the checkpoint.

Subjects fall into train, validation and test by a salted hash of their name, so no subject is in two parts. Rows come
from `tasks.training.rows`, the loop from `models.training`, the choice from `tasks.training.length`.
"""

import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
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
from models.split import split_of
from models.training import Candidate, Fitted, LabelledTensor, fit
from schemas.errors import TrainingError
from schemas.metrics import RAW
from schemas.models import ModelCard
from schemas.reports import Differences
from schemas.settings import TrainingSettings
from schemas.split import SplitRule
from storage.location import Location
from tasks.training.length import (
    FEWEST,
    Choice,
    Unseen,
    at_length,
    choose_length,
    deciding_subjects,
    folds_of,
    raw_choice,
)
from tasks.training.model_card import card_markdown, change_percent
from tasks.training.rows import TrainingRows, read_training_rows
from tasks.training.selection import (
    ERROR_RATES,
    SCORED_ROWS,
    Rates,
    compare_by_pose,
    error_rates,
    front,
    scaled,
)

log = logging.getLogger("frontalis.train")

FEWEST_SUBJECTS = 10
FEWEST_TO_CHOOSE = 100  # validation subjects; on fewer the noise of the score chooses
FOLDS = 3
WHITENING = 0.5  # chosen on validation folds of either network, with Recipe.lengthening (docs/training.md)


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    `improved` is the claim that it is better than raw, see `tasks.training.length.Choice`; `chosen_on` says on what the
    length of its change was chosen. `rates` holds `ERROR_RATES` by mode and cell, `difference` the change to raw by
    cell, both on the subjects of the part `measured_on`, None and empty where no part is left to measure on. `parts`
    counts the subjects of each part.
    """

    out: str
    card: ModelCard
    improved: bool
    interrupted: bool
    steps: int
    choice: Choice
    chosen_on: str
    rates: dict[str, dict[str, Rates]]
    difference: Differences
    measured_on: str | None
    parts: dict[str, int]


def train_model(settings: TrainingSettings, *, should_stop: Callable[[], bool] = lambda: False) -> Trained:
    """Train one checkpoint and write it with its card.

    The length of the network's change is chosen on subjects that it has not seen: on the validation part where that
    has at least `FEWEST_TO_CHOOSE` subjects, else by cross-validation. There the validation part is trained on, too.

    Equal settings and rows give equal weights, bit for bit, on one machine's CPU; files differ in the random key of the
    hashes of training subjects. Once `should_stop` returns True, the training ends. What cross-validation needs is then
    trained for as many steps; the model is measured and written.

    Raises:
        TrainingError: too few subjects, no subject with two rows, no subject column, mixed dimensions, NaN.
        SettingsError: a source does not exist.
    """
    rows = _read(settings, settings.sources)
    more = _read(settings, settings.augment) if settings.augment else None
    rule, parts, learn = split_rows(settings, rows, more)
    data = rows.digest
    if more is not None:
        data = hashlib.blake2b((rows.digest + more.digest).encode(), digest_size=16).hexdigest()
    dim = rows.x.shape[1]
    counts = {name: len(np.unique(part.subjects)) for name, part in parts.items()}
    log.info(
        "train: %d subjects and %d rows to train on, %d validation subjects, %d test subjects; D = %d",
        counts["train"], len(learn), counts["validation"], counts["test"], dim,
    )  # fmt: skip
    learnt = learn_length(settings, parts, learn, should_stop)
    fitted, choice, mean_norm = learnt.fitted, learnt.choice, learnt.mean_norm
    model = at_length(fitted.model, choice.best.share)
    _report(learnt)
    measured_on = next((part for part in ("test", "validation") if _has_pairs(parts[part])), None)
    rates, difference = (
        ({}, {})
        if measured_on is None
        else _measure(model, parts[measured_on].at_most(SCORED_ROWS), mean_norm, settings)
    )
    key = secrets.token_hex(16)
    card = ModelCard(
        architecture=settings.architecture,
        arguments=_arguments(settings, dim),
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
            "steps": fitted.best.step,
            "change_scaled_by": choice.best.share,
            "improved": choice.improved,
            "chosen_on": learnt.chosen_on,
            "chosen_on_subjects": choice.subjects,
            "chosen_by_cell": choice.cell,
            "lengths": [
                {"share": one.share, "score": one.score, "error": one.error, "eer": one.eer.model_dump()}
                for one in choice.scored
            ],
            "alpha": [m.alpha.item() for m in model.modules() if isinstance(m, DualBranchSENet)],
            "measured_on": measured_on,
            "rates": _json(rates),
            "difference": {
                cell: {metric: one.model_dump() for metric, one in found.items()} for cell, found in difference.items()
            },
            "subjects": _json(counts),
            "frontal_only_subjects": _frontal_only(parts["train"]),
            "rows": _json({name: len(part) for name, part in parts.items()}),
            "augmented_rows": len(learn) - len(parts["train"]),
            "left_out": _json(rows.skipped),
        },
        versions=library_versions(),
    )
    subjects = np.unique(np.concatenate([parts["train"].subjects, parts["validation"].subjects]))
    seen = Seen.of(subjects, [learn.x, parts["validation"].x], key)
    Location(settings.out).write_bytes(to_bytes(card, model, seen))
    Location(f"{settings.out}.md").write_bytes(card_markdown(card).encode())
    return Trained(
        out=settings.out,
        card=card,
        improved=choice.improved,
        interrupted=fitted.interrupted,
        steps=fitted.best.step,
        choice=choice,
        chosen_on=learnt.chosen_on,
        rates=rates,
        difference=difference,
        measured_on=measured_on,
        parts=counts,
    )


def split_rows(
    settings: TrainingSettings, rows: TrainingRows, more: TrainingRows | None = None
) -> tuple[SplitRule, dict[str, TrainingRows], TrainingRows]:
    """Return the rule of the split, the rows of each part, and the rows to learn from: of train, and further views.

    Raises `TrainingError` where they cannot support a model.
    """
    rule = _split_rule(settings, rows)
    parts = _split(rows, rule)
    _check(rows, parts)
    learn = parts["train"]
    if more is not None:
        learn = _joined(learn, more.take(np.isin(more.subjects, np.unique(learn.subjects))))
    return rule, parts, learn


@dataclass(frozen=True)
class Learnt:
    """A network with the whole change that it learnt, what its rows are scaled by, and how long the change is to be."""

    fitted: Fitted
    mean_norm: float
    choice: Choice
    chosen_on: str


def learn_length(
    settings: TrainingSettings,
    parts: Mapping[str, TrainingRows],
    learn: TrainingRows,
    should_stop: Callable[[], bool] = lambda: False,
) -> Learnt:
    """Train a network on the rows of `learn`, and choose the length of its change.

    It is chosen on the validation part where there is one, else by networks of folds of the training subjects, which
    are trained for as many steps as the network was.
    """
    arguments = _arguments(settings, learn.x.shape[1])
    fitted, mean_norm = _fit(settings, arguments, learn, settings.steps, should_stop)
    if len(parts["validation"]):
        unseen = [Unseen(fitted.model, parts["validation"].at_most(SCORED_ROWS), mean_norm)]
        chosen_on = "validation"
    else:
        folds = folds_of(parts["train"], FOLDS)
        unseen = _unseen_by_folds(settings, arguments, parts["train"], learn, folds, fitted.best.step)
        chosen_on = f"cross-validation in {len(folds)} folds"
    choice = choose_length(unseen, settings.seed) if unseen and fitted.best.step else raw_choice()
    return Learnt(fitted, mean_norm, choice, chosen_on)


def _fit(
    settings: TrainingSettings,
    arguments: Mapping[str, JsonValue],
    learn: TrainingRows,
    steps: int,
    should_stop: Callable[[], bool] = lambda: False,
    of: str = "",
) -> tuple[Fitted, float]:
    """Return the network of the last step, and the mean norm that its rows are scaled by."""

    def report(step: int, loss: float, _: Candidate) -> None:
        log.info("train: %sstep %d of %d, loss %.4f", of, step, steps, loss, extra={**stage, "done": step})

    stage = {"stage": "cross-validate" if of else "train", "total": steps}
    log.info("train: %s%d steps", of, steps, extra={**stage, "done": 0})
    mean_norm = float(np.linalg.norm(learn.x.astype(np.float64), axis=1).mean())
    torch.manual_seed(settings.seed)
    model = build(settings.architecture, arguments)
    _, subjects = np.unique(learn.subjects, return_inverse=True)
    rows = LabelledTensor(
        scaled(learn.x, mean_norm), torch.from_numpy(subjects), torch.from_numpy(learn.classes == PROFILE)
    )
    fitted = fit(
        model,
        rows,
        steps=steps,
        seed=settings.seed,
        loss=settings.loss,
        device=torch_device(settings.device),
        report=report,
        should_stop=should_stop,
    )
    return fitted, mean_norm


def _unseen_by_folds(
    settings: TrainingSettings,
    arguments: Mapping[str, JsonValue],
    rows: TrainingRows,
    learn: TrainingRows,
    folds: Sequence[np.ndarray],
    steps: int,
) -> list[Unseen]:
    """Train a network for each fold on the subjects of the others. An ensemble has one member there, to save time."""
    unseen = []
    arguments = {**arguments, **({"members": 1} if "members" in arguments else {})}
    for number, subjects in enumerate(folds):
        others = learn.take(~np.isin(learn.subjects, subjects))
        fitted, norm = _fit(settings, arguments, others, steps, of=f"fold {number + 1} of {len(folds)}, ")
        left_out = rows.take(np.isin(rows.subjects, subjects)).at_most(SCORED_ROWS // len(folds))
        unseen.append(Unseen(fitted.model, left_out, norm))
    return unseen


def _report(learnt: Learnt) -> None:
    fitted, choice, chosen_on = learnt.fitted, learnt.choice, learnt.chosen_on
    for one in choice.scored:
        log.info(
            "train: change scaled by %s: score %+.4f, standard error %.4f; %s EER %s of raw",
            "0, and nothing mixed in" if one.share is None else f"{one.share:g}",
            one.score, one.error, choice.cell, change_percent(one.eer),
        )  # fmt: skip
    if fitted.interrupted:
        log.warning("train: interrupted; step %d is kept and measured", fitted.best.step)
    if choice.best.share is None:
        log.warning(
            "train: NO LENGTH OF THE CHANGE WAS BETTER THAN RAW by a standard error (%s, %d subjects). The model "
            "written gives raw embeddings back. %s", chosen_on, choice.subjects,
            "Let it train longer." if fitted.interrupted else "Train on more subjects or views.",
        )  # fmt: skip
    elif not choice.improved:
        log.warning(
            "train: the model is NOT SHOWN TO BE BETTER THAN RAW: %s EER %s of raw (%s, %d subjects; a claim needs %d)",
            choice.cell, change_percent(choice.best.eer), chosen_on, choice.subjects, FEWEST,
        )  # fmt: skip


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
    """Return the rule of the settings, without a validation part where that would be too small to choose on."""
    rule = SplitRule(
        salt=settings.salt,
        train=1 - settings.validation - settings.test,
        validation=settings.validation,
        test=settings.test,
    )
    deciding = sum(split_of(name, rule) == "validation" for name in deciding_subjects(rows))
    if deciding >= FEWEST_TO_CHOOSE:
        return rule
    return SplitRule(salt=settings.salt, train=1 - settings.test, validation=0.0, test=settings.test)


def _frontal_only(rows: TrainingRows) -> int:
    """Return how many subjects have no profile row."""
    return len(np.unique(rows.subjects)) - len(np.unique(rows.subjects[rows.classes == PROFILE]))


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
        if len(parts[name]) + (name == "train") and not _has_pairs(parts[name]):
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
