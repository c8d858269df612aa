"""What a request may say, and what is answered: the contract that `/openapi.json` publishes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.query.answers import ModeAnswer
from tasks.query.search import SearchOptions

DEFAULT_MODE = "per_sample"
ALL_MODES = "all"


class Options(BaseModel):
    """The options of a search, the same for all of its queries."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    k: int = Field(10, description="neighbours a query")
    mode: str = Field(DEFAULT_MODE, description="per_sample, batch_stat, raw, or all: each mode, side by side")
    fmr: str | float | None = Field(
        None, description="mark matches at the threshold that the release measured for this FMR, such as 1e-3"
    )
    where: str | None = Field(
        None, description="SQL condition on stored columns", examples=["pose = 'profile' and yaw < -30"]
    )
    expand: int | None = Field(
        None, description="α-query expansion with so many nearest rows, 0 for none; by default [query] expand"
    )
    unique_subject: bool = Field(False, description="keep the best row of each subject")
    min_score: float | None = Field(None, ge=-1, le=1, description="leave out rows with a smaller score")
    columns: list[str] = Field([], max_length=64, description="stored columns to return, such as pose and yaw")
    by: Literal["row", "subject"] = Field("row", description="subject: find subjects by the mean of their rows")
    include_self: bool = Field(False, description="whether a stored id may find its own row")

    def search_options(self) -> SearchOptions:
        """Return them as the search takes them."""
        return SearchOptions(
            expand=self.expand,
            where=self.where,
            unique_subject=self.unique_subject,
            min_score=self.min_score,
            columns=self.columns,
            by=self.by,
        )


class SearchRequest(Options):
    """Stored ids, or new embeddings as the recogniser gives them (before re-weighting), and the options."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {"ids": ["000000-010"], "k": 5, "mode": "all", "fmr": "1e-3", "columns": ["pose", "yaw"]},
                {"vectors": [[0.12, -0.07, 0.31]], "k": 10, "where": "pose = 'profile'", "expand": 5},
            ]
        },
    )

    ids: list[str | int] = Field([], description="stored ids")
    vectors: list[list[float]] = Field([], description="embeddings of D numbers")


class SearchAnswer(BaseModel):
    """The neighbours in each mode that was asked for, all of one release."""

    release: str
    answers: dict[str, ModeAnswer] = Field(description="by mode")


class Problem(BaseModel):
    """Why there is no answer, in one line."""

    error: str


class ReleaseLine(BaseModel):
    """One release of the history."""

    release: str
    created: str
    promoted: bool
    reason: str
    serving: bool = Field(description="what the store says")
    answering: bool = Field(description="whether this service answers from it")
    anchor: bool
    usable: bool = Field(description="false: a person in it was forgotten, or its files were removed")
    report: str | None = Field(description="path of its report")


class ReleaseList(BaseModel):
    """All releases, newest first."""

    releases: list[ReleaseLine]


class ModeSummary(BaseModel):
    """One mode of the release that answers."""

    mode: str
    role: str = Field(description="of its colour")
    mark: str
    rows: int
    dim: int
    index: str
    recall_at_10: float
    thresholds: dict[str, float] = Field(description="by FMR")


class ReleaseSummary(BaseModel):
    """The release that answers: verdict, table, and what can be asked of it."""

    release: str
    created: str
    promoted: bool
    reason: str
    compared_with: str | None
    report: str | None
    modes: list[ModeSummary]
    columns: list[str]
    expand: int = Field(description="[query] expand")
    limits: dict[str, float]
    table: dict[str, Any] | None = Field(description="error rates by pose pair, as text; null where none was measured")
