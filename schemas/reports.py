"""Records of an evaluation, the contract between computing metrics and reading them.

`tasks.evaluate` fills these records, the gate and the trend read them, the report and the command line print them, and
`metrics.json` and the release row hold them as JSON. Values are plain numbers. A metric that cannot be estimated is
`None` with a reason.
"""

from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from schemas.metrics import ALL, MetricId


class Record(BaseModel):
    """Base of all records: unknown fields are refused, so that an old reader never misreads a newer file.

    So are NaN and infinities, which JSON does not have: they would come back as missing, without a reason.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def replaced(self, **changes: object) -> Self:
        """Return a copy with some fields changed. Unlike `model_copy(update=…)`, names and values are checked."""
        return self.model_validate({**dict(self), **changes})


class Estimate(Record):
    """The value of a metric with its 95% interval (percentile bootstrap over subjects), or why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = Field(default=None, description="why the value is None: 'not estimable: …'")


class Curve(Record):
    """A DET curve: false match rate against false non-match rate, thinned, ordered by rising FMR."""

    fmr: list[float]
    fnmr: list[float]


class Histogram(Record):
    """Genuine and impostor score densities over shared bin edges (`len(edges) == len(genuine) + 1`)."""

    edges: list[float]
    genuine: list[float]
    impostor: list[float]


class CellResult(Record):
    """Verification within one pose-pair cell (`all`, `frontal-frontal`, `frontal-profile`, …).

    `fnmr` is keyed by the FMR point as printed (`"1e-3"`) and uses the cell's own threshold at that FMR. `fnmr_global`
    and `fmr_global` use the one threshold found over all pairs of the population at that FMR.
    """

    n_genuine: int
    n_impostor: int
    eer: Estimate
    auc: Estimate
    d_prime: float | None
    fnmr: dict[str, Estimate]
    fnmr_global: dict[str, Estimate]
    fmr_global: dict[str, float | None]
    det: Curve | None = None
    histogram: Histogram | None = None

    def estimate(self, metric: MetricId) -> Estimate | None:
        """Return the estimate of a metric, None where it was not measured."""
        if metric.kind == "fmr_global":
            found = self.fmr_global.get(metric.fmr_text)
            return None if found is None else Estimate(value=found)
        if metric.fmr is None:
            return self.eer if metric.kind == "eer" else self.auc
        return (self.fnmr_global if metric.is_global else self.fnmr).get(metric.fmr_text)


class ScoreFmr(Record):
    """FMR by score over all impostor pairs of a population, at fixed FMRs: ten a decade, and `[evaluation] fmrs`.

    `scores[i]`, ascending, is the smallest observed score whose FMR is at most `targets[i]`; `fmr[i]` is its FMR. The
    last target is the smallest that `n_impostor` pairs can show.
    """

    n_impostor: int
    targets: list[float]
    scores: list[float]
    fmr: list[float]


class PairsResult(Record):
    """Accuracy over one protocol of a pairs file: the threshold of a fold is chosen on the other folds.

    `missing` counts pairs that name an id the store does not have: failures to acquire (ISO/IEC 19795-1), reported and
    not part of the accuracy. `left_out` counts pairs of rows that are stored but outside the population, `copies` pairs
    of a row with itself or with the same bytes, which are never compared. Of the `n_pairs` that are, `repeated` were
    there before, and `contradicting` are called genuine and impostor both, or otherwise than by the stored subjects:
    both count as the file says.
    """

    protocol: str
    n_pairs: int
    missing: int
    left_out: int = 0
    copies: int = 0
    repeated: int = 0
    contradicting: int = 0
    n_folds: int
    accuracy_mean: float | None
    accuracy_sd: float | None
    eer: float | None
    reason: str | None = None


class ExpandedRates(Record):
    """Rates of 1:N search with query expansion, and their paired differences to the search without it."""

    enrolled: str = Field(description="rows of the probe's subject in the gallery: 'any', '1', '2 to 4', '5 or more'")
    n_mated: int
    rank: dict[str, Estimate]
    fnir: dict[str, Estimate]
    rank_difference: dict[str, Estimate]
    fnir_difference: dict[str, Estimate]


class ExpansionResult(Record):
    """What α-query expansion with `rows` rows of the gallery does to 1:N search: for all probes, by rows enrolled."""

    rows: int
    groups: list[ExpandedRates]


class IdentificationResult(Record):
    """1:N search with a frontal gallery and profile probes (or all rows, where no pose is known)."""

    gallery: str
    probes: str
    n_gallery: int
    n_gallery_subjects: int
    n_mated: int
    n_non_mated: int
    rank: dict[str, Estimate] = Field(description='share of mated probes found within rank k, keyed by k ("1", "5" …)')
    fnir: dict[str, Estimate] = Field(description='FNIR keyed by the FPIR point as printed ("1e-2")')
    index_kind: str = Field(default="Flat", description="factory string of the index that was built over this gallery")
    index_rank: dict[str, float | None] = Field(
        default_factory=dict, description="the same rank-k rates through that index; empty where not measured"
    )
    index_recall: dict[str, float | None] = Field(
        default_factory=dict, description="recall@k of that index against exact search"
    )
    expansion: ExpansionResult | None = Field(default=None, description="None in older releases")


class IndexRecall(Record):
    """The index of a release and its recall against exact search, measured when it was written."""

    kind: str = Field(description="its `faiss.index_factory` string")
    rows: int
    recall_at_1: float
    recall_at_10: float
    queries: int = Field(description="none of them a row of the index; 0 where the index is exact")


Differences = dict[str, dict[MetricId, Estimate]]
"""Cell → metric → difference."""


class ModeResult(Record):
    """All metrics of one mode over one population. `difference` holds mode − raw, paired over the same subjects."""

    mode: str
    model_digest: str | None
    training_subjects_known: bool = Field(default=True, description="False: leakage cannot be excluded")
    thresholds: dict[str, float | None] = Field(description="global `score >= t` threshold at each FMR point")
    fmr_by_score: ScoreFmr | None = Field(default=None, description="FMR over all pairs; None in older releases")
    cells: dict[str, CellResult]
    difference: Differences = Field(
        default_factory=dict, description="cell → metric ('eer', 'fnmr@1e-3', …) → mode − raw with its paired interval"
    )
    versus_served: Differences = Field(
        default_factory=dict, description="the same, this mode − the same mode of the served release"
    )
    versus_anchor: Differences = Field(
        default_factory=dict, description="the same, this mode − what the model of the anchor makes of the same rows"
    )
    relative_to_anchor: Differences = Field(default_factory=dict, description="the same, as a share of the anchor's")
    versus_modes: dict[str, Differences] = Field(
        default_factory=dict, description="by other mode: the same, this mode − the other"
    )
    pairs: list[PairsResult] = Field(default_factory=list)
    identification: IdentificationResult | None = None

    def difference_to_raw(self, cell: str, metric: MetricId) -> Estimate | None:
        """Return mode − raw of a metric in a cell, None where it was not measured (as for raw itself)."""
        return self.difference.get(cell, {}).get(metric)

    def difference_to_served(self, cell: str, metric: MetricId) -> Estimate | None:
        """Return this mode − the same mode of the served release, None where they were not compared."""
        return self.versus_served.get(cell, {}).get(metric)

    def difference_to_anchor(self, cell: str, metric: MetricId) -> Estimate | None:
        """Return this mode − the model of the anchor on the same rows, None where they were not compared."""
        return self.versus_anchor.get(cell, {}).get(metric)

    def relative_difference_to_anchor(self, cell: str, metric: MetricId) -> Estimate | None:
        """Return the same as a share of the anchor's metric, None where that is not estimable."""
        found = self.relative_to_anchor.get(cell, {}).get(metric)
        return found if found is not None and found.value is not None else None

    def false_matches(self, cell: str, metric: MetricId) -> int | None:
        """Return on how many false matches a metric rests, about; None where it does not rest on any.

        FNMR at an FMR: as many as the FMR allows, of all impostor pairs where the threshold is global. EER: as many as
        there are at its threshold.
        """
        found = self.cells[cell]
        if metric.kind == "eer":
            return None if found.eer.value is None else round(found.eer.value * found.n_impostor)
        if metric.fmr is None:
            return None
        impostors = (self.cells.get(ALL, found) if metric.is_global else found).n_impostor
        return int(metric.fmr * impostors * (1 + 1e-9))


class Population(Record):
    """The subjects over which modes are compared.

    `all` holds every labelled row, where only raw is free of leaks; `held_out` leaves out each subject that any of the
    models has seen in training or validation.
    """

    name: str
    n_rows: int
    n_subjects: int
    left_out_subjects: int
    left_out_rows: int
    sampled_from_subjects: int | None = Field(
        default=None, description="number of subjects the sample was drawn from; None without a sample"
    )
    modes: dict[str, ModeResult]


class Evaluation(Record):
    """One evaluation of one release."""

    release: str
    resamples: int
    seed: int
    fmrs: list[str]
    unlabelled_rows: int
    notes: list[str] = Field(default_factory=list, description="what a reader should know of this evaluation")
    served_unread: str | None = Field(default=None, description="why the served release could not be compared with")
    anchor_unread: str | None = Field(default=None, description="why the anchor could not be compared with")
    duplicate_rows: int = Field(
        description="of the rows evaluated, those whose raw embedding is byte-identical to another's: never paired"
    )
    populations: dict[str, Population]
    indexes: dict[str, IndexRecall] = Field(default_factory=dict, description="by mode, the index of the release")


class ChannelWeights(Record):
    """Channel weights of one branch of one model over a sample of rows, of an ensemble the mean over its members."""

    mode: str
    branch: str
    mean: list[float]
    spread: list[float]
    top: list[tuple[int, float]] = Field(description="(channel, mean weight), the largest first")
    agreement: float | None = Field(
        default=None, description="of an ensemble: mean rank correlation between its members' weights; 0 is chance"
    )


class ShardFault(Record):
    """A shard that could not be used, and whether its last good features are kept."""

    shard: str
    reason: str
    kept: bool


class StageCost(Record):
    """What one stage of a run took, in the process of the run: workers in other processes are not counted."""

    stage: str
    seconds: float
    cpu_seconds: float = Field(description="of all threads of the process, other stages at the same time included")
    rows: int | None = Field(default=None, description="that it worked on; None for a stage that works on files")
    peak_megabytes: int | None = Field(
        default=None, description="largest resident memory seen, in 10⁶ bytes, sampled 20 times a second"
    )

    @property
    def rows_per_second(self) -> float | None:
        """Rows a second, None where there are no rows or no time passed."""
        return self.rows / self.seconds if self.rows and self.seconds else None


class DataQuality(Record):
    """Where the rows read have gone. `rows_read == rows_features + sum(quarantined.values()) + forgotten`.

    `rows_in_bad_shards` are further rows: of bad shards without features, as far as they could be counted.
    """

    shards: int
    rows_read: int
    rows_features: int
    quarantined: dict[str, int] = Field(description="reason → rows")
    forgotten: int = 0
    blank_subjects: int = Field(default=0, description="rows read whose subject is empty or white space: unknown")
    bad_shards: list[ShardFault] = Field(default_factory=list)
    rows_in_bad_shards: int = 0

    @property
    def rows_unusable(self) -> int:
        """Rows of the source that cannot be used: quarantined, or in a bad shard without features."""
        return sum(self.quarantined.values()) + self.rows_in_bad_shards

    @property
    def share_unusable(self) -> float:
        """The share of all rows of the source that cannot be used."""
        rows = self.rows_read + self.rows_in_bad_shards
        return self.rows_unusable / rows if rows else 0.0


class Changes(Record):
    """What a release adds, changes and removes, compared with the release that was served when it was made.

    Rows are compared by id. A changed row is in both releases, and its shard was written again, whether or not the row
    itself differs. Rows of somebody who was forgotten are not counted as removed.
    """

    since: str = Field(description="the release that was served")
    rows_before: int
    rows_added: int
    rows_changed: int
    rows_removed: int
    shards_before: int
    shards_removed: int = Field(description="none of their rows is left, in whichever shard")
    subjects_before: int | None = Field(
        default=None, description="labelled ones; None where they were not counted, since none was removed"
    )
    subjects_removed: int = Field(default=0, description="none of their rows is left")
    modes_removed: list[str] = Field(default_factory=list)


LimitName = Literal["max_removed_rows", "max_removed_shards", "max_removed_subjects", "max_quarantined"]


class LimitResult(Record):
    """A limit of `[gate]` on what a release may lack: `count` of `total` against a largest share."""

    setting: LimitName
    count: int
    total: int
    share_before: float = Field(default=0.0, description="what the served release had already: only a rise counts")
    limit: float

    @property
    def share(self) -> float:
        """The share that is missing."""
        return self.count / self.total if self.total else 0.0

    @property
    def exceeded(self) -> bool:
        """Whether more is missing than the limit allows."""
        return self.share - self.share_before > self.limit


Against = Literal["served", "anchor", "raw"]
GuardOutcome = Literal["not worse", "worse", "undecided", "same model", "not compared"]
FEWEST_FALSE_MATCHES = 30  # below, the error of a rate is of its own size (ISO/IEC 19795-1, "rule of 30")


class GuardedResult(Record):
    """A guarded metric of one mode at the gate: its value, and its difference to one reference."""

    mode: str
    cell: str
    metric: MetricId
    tolerance: float
    value: float | None = Field(description="None where it could not be measured; `difference` holds the reason")
    against: Against = Field(default="served", description="which of the gate's comparisons this is")
    reference: str | None = Field(description="a release or raw; None where there was nothing to compare with")
    difference: Estimate
    outcome: GuardOutcome = Field(
        default="not compared",
        description="worse: significantly above the tolerance (95%, Holm over modes and metrics) or, against the "
        "anchor, not shown to be within the margin. undecided: the same, with too few subjects to show it",
    )
    relative_bound: float | None = Field(
        default=None, description="one-sided 95% upper bound of the difference, as a share of the reference"
    )
    subjects_needed: int | None = Field(
        default=None, description="about how many held-out subjects it takes to show that an equal model is not worse"
    )


class GateDecision(Record):
    """Whether the release is promoted, and why in one sentence."""

    promoted: bool
    reason: str
    compared_with: str | None = Field(default=None, description="the served release or, without one, raw")
    anchor: str | None = Field(default=None, description="the release that no release may be inferior to")
    judged: list[GuardedResult] = Field(default_factory=list, description="every guarded metric of every mode")
    held_out_subjects: int | None = Field(default=None, description="on how many the metrics rest; None without any")
    changes: Changes | None = Field(default=None, description="since the served release; None for a first release")
    limits: list[LimitResult] = Field(default_factory=list, description="on what is removed and quarantined")
    missing_modes: list[str] = Field(default_factory=list, description="served, not in this run, not in `drop_modes`")
    removal_allowed: bool = Field(default=False, description="the run was started with --allow-removal")

    @property
    def sentence(self) -> str:
        """The decision with its reason."""
        return f"{'promoted' if self.promoted else 'rejected'}: {self.reason}"


class GatedMetric(Record):
    """The first guarded metric of the gate: a metric (`eer`, `fnmr@1e-3` …) of a cell over a population."""

    population: str
    cell: str
    metric: MetricId


class TrendPoint(Record):
    """The gated metric of one release, by mode."""

    release: str
    created: datetime
    promoted: bool
    values: dict[str, Estimate]


class ReportInput(Record):
    """All that the report of one release shows. `trend` is ordered by time, this release last."""

    release: str
    created: datetime
    evaluation: Evaluation
    gate: GateDecision
    gated: GatedMetric
    quality: DataQuality
    stages: list[StageCost] = Field(default_factory=list, description="of the run that made it, up to this report")
    weights: list[ChannelWeights] = Field(default_factory=list)
    trend: list[TrendPoint] = Field(default_factory=list)
    provenance: dict[str, JsonValue] = Field(
        default_factory=dict, description="digests, versions, settings, printed as they are: no secrets"
    )
