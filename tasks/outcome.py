"""The outcome of a run of `reprocess`, for the person or program that started it."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from schemas.errors import ExitCode, FrontalisError
from schemas.releases import Release
from schemas.reports import Changes, DataQuality, Estimate, Evaluation, ShardFault, StageCost
from storage.location import Location
from tasks.plan import Plan
from tasks.reweight import ShardResult


class Outcome(BaseModel):
    """What a run did. `release` is the one it made or, where nothing changed, the latest one."""

    status: Literal["promoted", "rejected", "unchanged"]
    release: str
    store: str
    reason: str
    shards_computed: int = 0
    shards_reused: int = 0
    rows_computed: int = 0
    seconds: float
    data: DataQuality
    changes: Changes | None = None
    gated_name: str
    gated: dict[str, Estimate]
    evaluation: Evaluation | None = None
    report: str | None
    warnings: list[str] = Field(default_factory=list)
    stages: list[StageCost] = Field(default_factory=list)

    @classmethod
    def measured(
        cls,
        store: str,
        release: Release,
        evaluation: Evaluation,
        plan: Plan,
        results: Sequence[ShardResult],
        seconds: float,
    ) -> "Outcome":
        """Return the outcome of a run that made a release."""
        return cls(
            status="promoted" if release.gate.promoted else "rejected",
            release=release.release,
            store=store,
            reason=release.gate.reason,
            shards_computed=len(plan.work),
            shards_reused=len({file.shard for file in plan.reused}),
            rows_computed=sum(work.rows for work in plan.work),
            seconds=seconds,
            data=release.data,
            changes=release.gate.changes,
            gated_name=release.gated_name,
            gated=release.gated,
            evaluation=evaluation,
            report=_page(store, release),
            warnings=[warning for result in results for warning in result.warnings],
            stages=release.stages,
        )

    @classmethod
    def unchanged(cls, store: str, latest: Release, faults: Sequence[ShardFault], seconds: float) -> "Outcome":
        """Return the outcome of a run without work: what was rejected by an earlier run still is."""
        rejected = not latest.gate.promoted and not latest.serving
        since = f"nothing changed since {latest.release} of {latest.created:%Y-%m-%d %H:%M} UTC"
        return cls(
            status="rejected" if rejected else "unchanged",
            release=latest.release,
            store=store,
            reason=f"{latest.gate.reason} ({since})" if rejected else since,
            seconds=seconds,
            data=latest.data.replaced(bad_shards=list(faults)),
            gated_name=latest.gated_name,
            gated=latest.gated,
            report=_page(store, latest),
        )


class CompletedWithBadShardsError(FrontalisError):
    """All work is done except for shards that cannot be used; `outcome` describes the rest."""

    exit_code = ExitCode.BAD_SHARDS

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        faults = outcome.data.bad_shards
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        super().__init__(
            f"completed with bad shards: {', '.join(fault.shard for fault in faults[:5])}{more}; {outcome.release} "
            f"({outcome.status}) holds the others. Fix them and run again."
        )


def _page(store: str, release: Release) -> str | None:
    return f"{Location(store).uri}/{release.report}" if release.report else None
