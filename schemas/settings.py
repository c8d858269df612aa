"""Settings of every flow: pydantic models that load from `pipeline.toml` and serve as Prefect parameters.

Unknown keys are refused, so a misspelt option is an error and not a silent default. Defaults that were chosen by
measuring say where in `docs/decisions.md`.
"""

import os
import tomllib
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from schemas.choices import Architecture, Loss
from schemas.errors import MAX_WAIT_SECONDS, SettingsError, first_line
from schemas.files import read_regular
from schemas.index import IndexSettings
from schemas.metrics import ALL, EER, FRONTAL_FRONTAL, FRONTAL_PROFILE, POSE_CLASSES, MetricId, pose_cell, rate_text
from schemas.models import Mode, Precision

Device = Literal["auto", "cpu", "cuda"]
KEEP_RELEASES = 14
MAX_EXPAND = 100
HARMLESS = 0.0005  # a twentieth of a frontal FNMR of 1%: half of what the margin allows there

Checked = TypeVar("Checked", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


MAX_CONFIG_BYTES = 1 << 20
WRITTEN_BESIDE = ("front", "identity", "pose_branch", "mode", "shard")
COLUMN_ROLES = ("id", "embedding", "subject", "pose", "yaw", "pitch", "roll")


class ColumnNames(Settings):
    """How the columns of the source shards are called, and which others pass through."""

    id: str = "id"
    embedding: str = "embedding"
    subject: str = "subject"
    pose: str = "pose"
    yaw: str = "yaw"
    pitch: str = "pitch"
    roll: str = "roll"
    keep: tuple[str, ...] = Field(default=(), description="further columns that pass through to the features")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        written = {*COLUMN_ROLES, *WRITTEN_BESIDE} - {"embedding"}  # without regard to case, as Delta takes names
        for name in self.keep:
            if name.lower() in written:
                raise ValueError(f"columns.keep: {name!r} is written already; leave it out")
            written.add(name.lower())
        return self


class ReweightSettings(Settings):
    """How features are computed."""

    batch_size: int = Field(default=4096, ge=1, le=1_048_576, description="rows a block; also the batch of batch_stat")
    statistic: Literal["frozen", "batch"] = Field(default="frozen", description="squeeze statistic of batch_stat")
    branches: bool = Field(default=False, description="also write the identity and pose branches")
    on_bad_rows: Literal["quarantine", "fail"] = "quarantine"
    max_bad_rows_per_shard: float = Field(
        default=0.5, ge=0, le=1, description="a shard with a larger share of bad rows (10 or more) is a bad shard"
    )
    device: Device = "auto"
    precision: Precision = Field(default="float32", description="of products on a GPU: float32, tf32 or bf16")
    group_rows: int = Field(default=200_000, ge=1, lt=2**31, description="about how many rows one task works on")


class EvaluationSettings(Settings):
    """What is measured. `fmrs` are the operating points, as printed."""

    fmrs: tuple[str, ...] = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
    resamples: int = Field(default=1000, ge=0, le=100_000, description="bootstrap resamples; 0 gives no intervals")
    seed: int = Field(default=0, ge=0, lt=2**31)
    max_rows: int = Field(
        default=50_000, ge=10, lt=2**31, description="labelled rows beyond this are sampled by subject"
    )
    frontal_yaw: float = Field(default=15.0, gt=0, le=180, description="|yaw| up to here is frontal (no pose label)")
    profile_yaw: float = Field(default=35.0, gt=0, le=180, description="|yaw| from here is profile (no pose label)")
    pairs: str | None = Field(default=None, description="Parquet of pairs with folds: protocol, fold, id_a, id_b, same")
    device: Device = "auto"

    @field_validator("fmrs")
    @classmethod
    def _points(cls, fmrs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(rate_text, fmrs))

    @model_validator(mode="after")
    def _bins(self) -> Self:
        if self.frontal_yaw >= self.profile_yaw:
            raise ValueError(f"evaluation.frontal_yaw {self.frontal_yaw} must be below profile_yaw {self.profile_yaw}")
        return self


class Guard(Settings):
    """A guarded metric: in no mode may it be worse than the references of the gate, beyond `tolerance`."""

    cell: str = Field(description="'all' or a pair such as 'frontal-profile'; 'all' is used where it is empty")
    metric: MetricId = Field(
        default=EER, description="'eer', 'fnmr@1e-3', or 'fnmr_global@1e-3' at the threshold of all pairs"
    )
    tolerance: float = Field(default=HARMLESS, ge=0, le=1, description="absolute worsening that is tolerated")

    @field_validator("cell")
    @classmethod
    def _cell(cls, cell: str) -> str:
        classes = cell.split("-")
        if cell != ALL and (len(classes) != 2 or not set(classes) <= set(POSE_CLASSES)):
            raise ValueError(f"{cell!r} is no cell; use 'all' or two of {', '.join(POSE_CLASSES)} with a hyphen")
        return cell if cell == ALL else pose_cell(*classes)

    @field_validator("metric")
    @classmethod
    def _metric(cls, metric: MetricId) -> MetricId:
        if metric.kind not in ("eer", "fnmr", "fnmr_global"):
            raise ValueError(f"'{metric}' is unknown; use 'eer', 'fnmr@<fmr>' or 'fnmr_global@<fmr>'")
        return metric


class GateSettings(Guard):
    """When a release is promoted. The first guarded metric is named here; `guards` are further ones."""

    cell: str = FRONTAL_PROFILE
    tolerance: float = Field(default=0.0, ge=0, le=1, description="absolute worsening that is tolerated")
    guards: tuple[Guard, ...] | None = Field(
        default=None,
        description="None: FNMR of frontal-frontal at global FMR 1e-2, with a tolerance of 0.0005 or more",
    )
    margin: float = Field(
        default=0.1, gt=0, le=10, description="largest relative worsening against the anchor that must be excluded"
    )
    undecided: Literal["reject", "promote"] = Field(
        default="reject", description="where there are too few subjects to exclude a worsening by the margin"
    )
    unmeasured: Literal["keep", "promote"] = Field(
        default="keep", description="a release that cannot be compared with the served one: keep that one, or promote"
    )
    max_removed_rows: float = Field(default=0.2, ge=0, le=1, description="share of the served rows that may be missing")
    max_removed_shards: float = Field(default=0.2, ge=0, le=1, description="the same of shards")
    max_removed_subjects: float = Field(default=0.2, ge=0, le=1, description="the same of labelled subjects")
    max_quarantined: float = Field(
        default=0.2, ge=0, le=1, description="rise of the quarantined share of all rows, since the served release"
    )
    drop_modes: tuple[Mode, ...] = Field(default=(), description="served modes that a release may lack")

    @property
    def guarded(self) -> tuple[Guard, ...]:
        """All guarded metrics, that of the gate itself first. What it tolerates, the default guards tolerate too."""
        harmless = max(self.tolerance, HARMLESS)
        default = (Guard(cell=FRONTAL_FRONTAL, metric=MetricId("fnmr_global@1e-2"), tolerance=harmless),)
        first = Guard(cell=self.cell, metric=self.metric, tolerance=self.tolerance)
        return (first, *(default if self.guards is None else self.guards))


class RunnerSettings(Settings):
    """Where the shard groups are worked on: threads of this process, or a Dask cluster with one worker a GPU."""

    kind: Literal["threads", "dask"] = "threads"
    workers: int | None = Field(default=None, ge=1, le=1024, description="None: one a core")
    address: str | None = Field(default=None, description="address of a running Dask scheduler")


class RetentionSettings(Settings):
    """What a run that made a release leaves of older ones; see `tasks.maintenance.vacuum`."""

    keep: int = Field(default=KEEP_RELEASES, ge=0, description="promoted releases whose files stay; 0 keeps all")
    min_age_hours: float | None = Field(
        default=None, ge=0, le=1e6, description="younger files stay; None: 0 locally, 24 on object storage"
    )


class QuerySettings(Settings):
    """What queries do unless they say otherwise."""

    expand: int = Field(default=0, ge=0, le=MAX_EXPAND, description="rows of α-query expansion; 0 for none")


class ReportSettings(Settings):
    """Where people open reports."""

    base_url: str | None = Field(
        default=None,
        pattern="^https?://",
        description="of `frontalis serve`; runs in Prefect then link to base_url/reports/<release>/index.html",
    )


class PipelineSettings(Settings):
    """All that `reprocess` needs; the content of `pipeline.toml`."""

    source: str = Field(description="folder of Parquet shards or Delta table: a local path or s3://…")
    store: str = Field(description="the store: a local path or s3://…")
    models: dict[Mode, str] = Field(description="mode → checkpoint file")
    columns: ColumnNames = ColumnNames()
    reweight: ReweightSettings = ReweightSettings()
    index: IndexSettings = IndexSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    query: QuerySettings = QuerySettings()
    runner: RunnerSettings = RunnerSettings()
    retention: RetentionSettings = RetentionSettings()
    report: ReportSettings = ReportSettings()
    wait: float = Field(
        default=0.0, ge=0, le=MAX_WAIT_SECONDS, description="seconds to wait for another run that holds the store"
    )

    @field_validator("models")
    @classmethod
    def _some(cls, models: dict[Mode, str]) -> dict[Mode, str]:
        if not models:
            raise ValueError("models: name at least one, such as per_sample = 'per_sample.safetensors'")
        return models

    @model_validator(mode="after")
    def _gate_point_is_measured(self) -> Self:
        for guard in self.gate.guarded:
            metric = guard.metric
            if metric.fmr is not None and metric.fmr_text not in self.evaluation.fmrs:
                raise ValueError(
                    f"gate.metric '{metric}': '{metric.fmr_text}' is not among evaluation.fmrs; add it, or name other "
                    "metrics in gate.guards"
                )
        return self


class TrainingSettings(Settings):
    """All that `train` needs."""

    sources: tuple[str, ...] = Field(min_length=1, description="folders of labelled shards")
    out: str = Field(description="checkpoint file to write; its card goes beside it as .md")
    mode: Mode = "per_sample"
    augment: tuple[str, ...] = Field(default=(), description="further views of the same subjects, for training only")
    architecture: Architecture = "dual_branch_ensemble"
    loss: Loss = "global_threshold"
    columns: ColumnNames = ColumnNames()
    seed: int = Field(default=0, ge=0, lt=2**31)
    salt: str = Field(default="frontalis", min_length=1, max_length=64, description="of the subject split")
    validation: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="share of subjects that choose the length of the change, where they are enough",
    )
    test: float = Field(default=0.1, ge=0, lt=1, description="share of subjects that only measure it")
    steps: int = Field(
        default=360,
        ge=1,
        le=1_000_000,
        description="the network of the last step is kept",
    )
    device: Device = "auto"
    max_rows: int = Field(default=500_000, ge=100, lt=2**31, description="more labelled rows are sampled by subject")
    skip_bad_rows: bool = Field(default=False, description="leave out embeddings that are not finite or of odd length")
    resamples: int = Field(default=1000, ge=0, le=100_000)

    @model_validator(mode="after")
    def _someone_trains(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} + test {self.test} leave nobody to train on")
        return self


def load_pipeline(path: str, **overrides: object) -> PipelineSettings:
    """Load `pipeline.toml`: relative paths in it are relative to the file, `~` is the home; `overrides` (not None) win.

    Raises:
        SettingsError: the file is missing or no TOML, or a setting is unknown or out of range.
    """
    file = Path(path)
    try:
        content = tomllib.loads(read_regular(file, MAX_CONFIG_BYTES).decode())
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); pass --config FILE.") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, an endless number, too many brackets
        raise SettingsError(f"{path}: is no TOML ({first_line(error)}).") from error
    base = file.resolve().parent
    for key in ("source", "store"):
        if isinstance(content.get(key), str):
            content[key] = _beside(base, content[key])
    if isinstance(content.get("models"), dict):
        content["models"] = {mode: _beside(base, str(uri)) for mode, uri in content["models"].items()}
    evaluation = content.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("pairs"), str):
        evaluation["pairs"] = _beside(base, evaluation["pairs"])
    return pipeline(**{**content, **{key: value for key, value in overrides.items() if value is not None}})


def pipeline(**values: object) -> PipelineSettings:
    """Build settings from plain values.

    Raises:
        SettingsError: a setting is missing, unknown or out of range; the message names each.
    """
    return checked(PipelineSettings, values)


def training(**values: object) -> TrainingSettings:
    """Build settings of a training from plain values; None stands for the default.

    Raises:
        SettingsError: a setting is missing, unknown or out of range; the message names each.
    """
    return checked(TrainingSettings, {name: value for name, value in values.items() if value is not None})


def checked(kind: type[Checked], values: object) -> Checked:
    """Validate values as settings of a kind; a failure is a `SettingsError` that names each setting."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(explain(error)) from error


def explain(error: ValidationError) -> str:
    """Put a pydantic error into one line a person can act on: which setting, what was found, what is wanted."""
    parts = []
    for one in error.errors():
        where = ".".join(str(step) for step in one["loc"]) or "settings"
        found = "" if one["type"] == "missing" or isinstance(one["input"], dict) else f" (found {one['input']!r})"
        parts.append(f"{where}: {one['msg'].removeprefix('Value error, ')}{found}")
    return "; ".join(parts)


def _beside(base: Path, uri: str) -> str:
    return uri if "://" in uri else str(base / os.path.expanduser(uri))  # noqa: PTH111 - which leaves the home of nobody as it is
