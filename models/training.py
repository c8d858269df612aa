"""Training of a network on embeddings: balanced batches, noise, weight averaging, model selection by a given score.

The loop knows tensors only. `tasks.training.train` reads and splits the rows, and passes the score that selects among
the candidates.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.dual_branch import members_of, scale_change, whitening_of
from models.losses import make_loss
from models.se import gather_statistics

SCORED_BLOCK = 16_384


@dataclass(frozen=True)
class Recipe:
    """The settings of a step. Defaults were chosen on validation subjects of real embeddings (docs/training.md).

    A batch has `paired_subjects`, with up to `rows_per_view` profile rows and as many others each, and
    `other_subjects`, seen in one of these views only, with up to `rows_per_other` rows. Where there is only one of
    these two kinds of subjects, the batch has as many of it as of both together, with up to `2 * rows_per_view` rows.

    - `noise` is Gaussian, per channel; inputs are scaled to channels of order 1.
    - `average` is the decay of the mean of the weights, less in the first steps.
    - `clip` bounds the norm of a gradient. It is above all norms of ordinary training.
    - `shares` are the lengths that the finished change is scored at.
    - `shrinkage` and `lengthening` are for a network with whitening. That is solved for on the same rows, shrunk by
      `shrinkage`. The mixture makes the network's change shorter, so it is first made longer by `lengthening`.

    `validate_every`, `report_every` and `shares` matter where a score chooses. `train` takes the last step, and chooses
    the length of its change by what unseen subjects say (`tasks.training.length`).
    """

    paired_subjects: int = 32
    rows_per_view: int = 3
    other_subjects: int = 32
    rows_per_other: int = 2
    learning_rate: float = 8e-4
    weight_decay: float = 0.05
    noise: float = 0.3
    average: float = 0.99
    clip: float = 10.0
    shrinkage: float = 3.0
    lengthening: float = 1.25
    validate_every: int = 360
    report_every: int = 40
    shares: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class LabelledTensor:
    """Rows to train on.

    `x` float32 `[N, D]`, scaled as the network wants them; `subjects` int64 codes `[N]`; `profile` bool `[N]`, False
    where the pose is not known.
    """

    x: Tensor
    subjects: Tensor
    profile: Tensor


@dataclass(frozen=True)
class Candidate:
    """A model that was scored: after `step` steps, its change scaled by `share`. Lower scores are better."""

    step: int
    share: float
    score: float


@dataclass
class Fitted:
    """The network that scored best, which candidate it is, and all that were scored, step 0 first.

    Without a score, the network of the last step; the scores are 0.
    """

    model: nn.Module
    best: Candidate
    candidates: list[Candidate] = field(default_factory=list)
    interrupted: bool = False


def fit(
    model: nn.Module,
    rows: LabelledTensor,
    score: Callable[[nn.Module], float] | None = None,
    *,
    steps: int,
    seed: int,
    loss: str = "global_threshold",
    recipe: Recipe | None = None,
    device: str = "cpu",
    report: Callable[[int, float, Candidate], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fitted:
    """Train `model` and return the averaged weights of the best score, step 0 competing too, or of the last step.

    The members of an ensemble are trained side by side on batches of their own and scored together. A network that
    starts at the identity is returned unchanged when nothing beats it. When `should_stop` returns True, the training
    ends: the network of that moment competes, and the best is kept. On the CPU equal arguments give equal bits. It
    works on one thread whatever torch is set to, which is also fastest at batches of this size (docs/training.md).

    Args:
        model: the network, on the CPU; its weights are changed.
        rows: the training rows; subjects with one row are only negatives.
        score: lower is better; called with a model in eval mode, on the CPU. Without one the last step is returned.
        steps: how many.
        seed: of batches, noise and dropout.
        loss: a name of `models.losses`.
        recipe: the settings of a step.
        device: "cpu" or a CUDA device of torch; rows stay in main memory.
        report: called with (step, mean loss since the last report, best candidate of this step), every
            `report_every` steps and whenever candidates compete.
        should_stop: called before every step.
    """
    recipe = recipe or Recipe()
    torch.manual_seed(seed)
    average = copy.deepcopy(model)
    last_wins, score = score is None, score or (lambda _: 0.0)
    start = Candidate(0, 1.0, score(average.eval()))
    fitted = Fitted(copy.deepcopy(average), start, [start])
    whitening = whitening_of(average)
    if whitening is not None:
        with _threads(1):
            whitening.solve(rows.x, rows.subjects, rows.profile, recipe.shrinkage)
    learners = [
        _Learner(member, mean, rows, make_loss(loss), recipe, seed + number, torch.device(device))
        for number, (member, mean) in enumerate(zip(members_of(model), members_of(average), strict=True))
    ]
    losses: list[float] = []
    for step in range(1, steps + 1):
        if should_stop():
            fitted.interrupted = True
            if step - 1 > fitted.candidates[-1].step:
                _compete(fitted, _score(average, rows.x, step - 1, recipe, score), last_wins)
            break
        with _threads(1):
            losses += [learner.step(step) for learner in learners]
        competes = step == steps or (step % recipe.validate_every == 0 and not last_wins)
        if competes or (report and step % recipe.report_every == 0):
            here = _score(average, rows.x, step, recipe, score)
            if competes:
                _compete(fitted, here, last_wins)
            if report:
                report(step, sum(losses) / len(losses), _best(here)[0])
            losses.clear()
    _gather(fitted.model, rows.x)
    fitted.model.eval()
    return fitted


def draw_batches(rows: LabelledTensor, recipe: Recipe, draw: torch.Generator) -> Iterator[Tensor]:
    """Yield the row numbers of batches without end, as `Recipe` describes them.

    Subjects come in random order, each once before any is repeated. Where a subject has more rows than are wanted, a
    random sample is taken. No row is twice in a batch.
    """
    views = _Views.of(rows.subjects * 2 + rows.profile)
    other, profile = views.of_group[0::2], views.of_group[1::2]
    paired = torch.nonzero((other > 0) & (profile > 0)).flatten()
    others = torch.nonzero((other > 0) ^ (profile > 0)).flatten()
    both = recipe.paired_subjects + recipe.other_subjects
    paired_queue = _queue(paired, recipe.paired_subjects if len(others) else both, draw)
    other_queue = _queue(others, recipe.other_subjects if len(paired) else both, draw)
    per_other = recipe.rows_per_other if len(paired) else 2 * recipe.rows_per_view
    while True:
        parts = []
        for subject in next(paired_queue):
            parts += [views.some(2 * subject, recipe.rows_per_view, draw)]
            parts += [views.some(2 * subject + 1, recipe.rows_per_view, draw)]
        for subject in next(other_queue):
            parts.append(views.some(2 * subject + int(other[subject] == 0), per_other, draw))
        yield torch.cat(parts)


class _Learner:
    """One network with its average, batches and optimiser."""

    def __init__(
        self,
        model: nn.Module,
        average: nn.Module,
        rows: LabelledTensor,
        loss: nn.Module,
        recipe: Recipe,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.average = model.to(device), average
        self.rows, self.loss, self.recipe, self.device = rows, loss, recipe, device
        self.draw = torch.Generator().manual_seed(seed)
        self.batches = draw_batches(rows, recipe, self.draw)
        matrices = [weights for weights in model.parameters() if weights.dim() > 1]
        vectors = [weights for weights in model.parameters() if weights.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
        )

    def step(self, number: int) -> float:
        """Do step `number`, counted from 1, and return its loss."""
        at = next(self.batches)
        x = self.rows.x[at]
        noisy = x + self.recipe.noise * torch.randn(x.shape, generator=self.draw)
        self.model.train()
        loss: Tensor = self.loss(self.model(noisy.to(self.device)), self.rows.subjects[at].to(self.device))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self._move(min(self.recipe.average, (1 + number) / (10 + number)))
        return float(loss.detach())

    def _move(self, keep: float) -> None:
        """Move the average towards the weights and the running statistics; counters are copied."""
        new = self.model.state_dict()
        with torch.no_grad():
            for name, mine in self.average.state_dict().items():
                if mine.dtype.is_floating_point:
                    mine.lerp_(new[name].to(mine.device), 1 - keep)
                else:
                    mine.copy_(new[name])


Scored = list[tuple[Candidate, nn.Module]]


def _score(average: nn.Module, x: Tensor, step: int, recipe: Recipe, score: Callable[[nn.Module], float]) -> Scored:
    """Return the finished network of this step at every share, with its score."""
    _gather(average, x)
    longer = recipe.lengthening if whitening_of(average) is not None else 1.0
    here = []
    for share in recipe.shares:
        model = copy.deepcopy(average).eval()
        scale_change(model, share * longer)
        here.append((Candidate(step, share, score(model)), model))
    return here


def _compete(fitted: Fitted, here: Scored, last_wins: bool) -> None:
    fitted.candidates += [candidate for candidate, _ in here]
    best, model = _best(here)
    if last_wins or best.score < fitted.best.score:
        fitted.best, fitted.model = best, model


def _best(here: Scored) -> tuple[Candidate, nn.Module]:
    return min(here, key=lambda one: one[0].score)


def _gather(model: nn.Module, x: Tensor) -> None:
    with _threads(1):
        gather_statistics(model, torch.split(x, SCORED_BLOCK))


@dataclass(frozen=True)
class _Views:
    """Rows by group: the numbers of group g are `order[start[g] : start[g] + of_group[g]]`."""

    order: Tensor
    of_group: Tensor
    starts: Tensor

    @classmethod
    def of(cls, groups: Tensor) -> "_Views":
        sizes = torch.bincount(groups)
        sizes = torch.cat([sizes, sizes.new_zeros(len(sizes) % 2)])
        return cls(torch.argsort(groups, stable=True), sizes, torch.cumsum(sizes, 0) - sizes)

    def some(self, group: int, wanted: int, draw: torch.Generator) -> Tensor:
        size, start = int(self.of_group[group]), int(self.starts[group])
        if size > 100 * wanted:  # do not permute a million rows to take three
            drawn = torch.unique(torch.randint(size, (wanted,), generator=draw))
        else:
            drawn = torch.randperm(size, generator=draw)[:wanted]
        return self.order[start + drawn]


def _queue(subjects: Tensor, wanted: int, draw: torch.Generator) -> Iterator[list[int]]:
    """Yield lists of up to `wanted` subjects, never one twice in a list."""
    left: list[int] = []
    while True:
        if len(left) < wanted:
            fresh = subjects[torch.randperm(len(subjects), generator=draw)].tolist()
            waiting = set(left)
            left += [subject for subject in fresh if subject not in waiting] if len(subjects) else []
        chosen, left = left[:wanted], left[wanted:]
        yield chosen


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
