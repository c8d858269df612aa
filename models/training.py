"""Training a network on embeddings: balanced batches, noise, weight averaging, and stopping where unseen people say so.

The loop knows tensors only. Reading and splitting the rows is left to `tasks.train`, which also passes the score that
decides when to stop, since models never judge themselves.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.inference import normalise
from models.losses import make_loss
from models.se import gather_statistics


@dataclass(frozen=True)
class Recipe:
    """What is done in every step. Defaults were chosen on real embeddings (`docs/training.md`)."""

    subjects_per_batch: int = 64
    rows_per_subject: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 1e-2
    noise: float = 0.03
    temperature: float = 0.03
    average: float = 0.98
    clip: float = 1.0
    validate_every: int = 20
    patience: int = 5


@dataclass(frozen=True)
class LabelledTensor:
    """Rows to train on: `x` float32 `[N, D]` as stored, `subjects` int64 codes `[N]`."""

    x: Tensor
    subjects: Tensor


@dataclass
class Fitted:
    """The network that scored best, at which step, and the scores seen on the way (step → score, lower is better)."""

    model: nn.Module
    best_step: int
    scores: dict[int, float] = field(default_factory=dict)
    interrupted: bool = False


def fit(
    model: nn.Module,
    rows: LabelledTensor,
    score: Callable[[nn.Module], float],
    *,
    steps: int,
    seed: int,
    recipe: Recipe | None = None,
    report: Callable[[int, float, float], None] | None = None,
) -> Fitted:
    """Train `model` and return the averaged weights that score best on unseen subjects; step 0 competes too.

    A network that starts at the identity is returned as it is when no step beats it. Ctrl-C ends the training and keeps
    the best so far. Equal seeds give equal weights on one machine and thread count.

    Args:
        model: the network; its weights are changed.
        rows: the training rows; subjects with one row are only negatives.
        score: lower is better; called every `validate_every` steps in eval mode.
        steps: at most so many.
        seed: of batches, noise and dropout.
        recipe: the settings of a step.
        report: called with (step, loss, score) at each validation.
    """
    recipe = recipe or Recipe()
    torch.manual_seed(seed)
    x = normalise(rows.x, "l2")
    draw = torch.Generator().manual_seed(seed)
    loss_of = make_loss("supcon", temperature=recipe.temperature)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    average = copy.deepcopy(model)
    best = copy.deepcopy(model)
    fitted = Fitted(best, 0, {0: _judged(average, x, score)})
    batches = balanced_batches(rows.subjects, recipe.subjects_per_batch, recipe.rows_per_subject, draw)
    try:
        for step in range(1, steps + 1):
            model.train()
            at = next(batches)
            noisy = x[at] + recipe.noise * torch.randn(x[at].shape, generator=draw) / x.shape[1] ** 0.5
            loss = loss_of(model(noisy), rows.subjects[at])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            _move(average, model, recipe.average)
            if step % recipe.validate_every == 0 or step == steps:
                fitted.scores[step] = _judged(average, x, score)
                if report:
                    report(step, float(loss.detach()), fitted.scores[step])
                if fitted.scores[step] < fitted.scores[fitted.best_step]:
                    fitted.best_step, fitted.model = step, copy.deepcopy(average)
                elif step - fitted.best_step >= recipe.patience * recipe.validate_every:
                    break
    except KeyboardInterrupt:
        fitted.interrupted = True
    gather_statistics(fitted.model, [x])
    fitted.model.eval()
    return fitted


def balanced_batches(subjects: Tensor, per_batch: int, per_subject: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Yield row numbers of batches without end: `per_batch` subjects, up to `per_subject` rows of each.

    Subjects come in random order, all of them once before any comes again.
    """
    order = torch.argsort(subjects, stable=True)
    counts = torch.bincount(subjects)
    starts = torch.cumsum(counts, 0) - counts
    present = torch.nonzero(counts).flatten()
    queue = present[:0]
    while True:
        while len(queue) < min(per_batch, len(present)):
            queue = torch.cat([queue, present[torch.randperm(len(present), generator=draw)]])
        chosen, queue = queue[:per_batch], queue[per_batch:]
        rows = []
        for subject in chosen.tolist():
            mine = order[starts[subject] : starts[subject] + counts[subject]]
            rows.append(mine[torch.randperm(len(mine), generator=draw)[:per_subject]])
        yield torch.cat(rows)


def _judged(model: nn.Module, x: Tensor, score: Callable[[nn.Module], float]) -> float:
    gather_statistics(model, [x])
    model.eval()
    return score(model)


def _move(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Move the average of the weights towards the model's; buffers (batch statistics) likewise, counters copied."""
    with torch.no_grad():
        for mine, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.dtype.is_floating_point:
                mine.lerp_(new, 1 - keep)
            else:
                mine.copy_(new)
