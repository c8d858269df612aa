"""The release record: one published result, complete enough to be served, compared, rolled back to and verified."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Self

import pyarrow as pa
from pydantic import Field

from schemas.models import Statistic
from schemas.reports import DataQuality, Estimate, GateDecision, IndexRecall, Record, StageCost


class ModelRef(Record):
    """A model of a release, kept in the store so that queries go through the same network as the index."""

    path: str = Field(description="relative to the store")
    file_digest: str
    digest: str = Field(description="of the file and the inference options")
    statistic: Statistic
    dim: int = Field(description="numbers in an embedding, in and out")


class IndexRef(Record):
    """A FAISS index of a release and its `ids.parquet`, relative to the store, with the digests of their bytes."""

    path: str
    digest: str
    size: int = Field(description="bytes of the index; no more is ever read")
    ids_path: str
    ids_digest: str
    rows: int
    dim: int
    factory: str
    changed: int = Field(default=0, description="rows removed or added since the index was trained")
    recall_at_1: float = Field(default=1.0, description="against exact search, on queries that are no rows of it")
    recall_at_10: float = 1.0
    recall_queries: int = Field(default=0, description="on how many; 0 where the index is exact")

    @property
    def audit(self) -> IndexRecall:
        """What a report shows of the index."""
        return IndexRecall(
            kind=self.factory,
            rows=self.rows,
            recall_at_1=self.recall_at_1,
            recall_at_10=self.recall_at_10,
            queries=self.recall_queries,
        )


class Release(Record):
    """One row of the releases table. `serving` is True for exactly one row once anything was promoted."""

    release: str
    number: int
    created: datetime
    content: str = Field(description="digest of all that went in; equal content needs no new release")
    source: str
    source_version: int | None = Field(default=None, description="of the Delta table, where the source is one")
    features_version: int
    quarantine_version: int | None
    models: dict[str, ModelRef]
    indexes: dict[str, IndexRef]
    data: DataQuality
    gate: GateDecision
    gated: dict[str, Estimate] = Field(description="the gated metric per mode, raw included")
    gated_name: str = Field(description="what `gated` holds, such as 'frontal-profile eer'")
    report: str | None = Field(description="relative to the store")
    serving: bool = False
    anchor: bool = Field(default=False, description="no release may be inferior to it; one at most")
    erased: bool = Field(default=False, description="a person was forgotten since: it can no longer be served")
    vacuumed: bool = Field(default=False, description="its files were removed: it can no longer be served")
    tombstones: str = Field(default="none", description="digest of the list that its rows were matched with")
    tombstone_count: int | None = Field(default=None, description="entries in that list; None in older releases")
    settings: dict[str, Any] = Field(default_factory=dict)
    stages: list[StageCost] = Field(default_factory=list, description="what the run that made it took")

    @property
    def unusable(self) -> bool:
        """Whether it can no longer be served: a person in it was forgotten, or its files were removed."""
        return self.erased or self.vacuumed

    def as_anchor(self, anchor: bool) -> Self:
        """Return the release as the anchor, or as one that is not."""
        return self.replaced(anchor=anchor)

    def as_served(self) -> Self:
        """Return the release as the one that is served."""
        return self.replaced(serving=True)

    def as_retired(self) -> Self:
        """Return the release as one that is not served."""
        return self.replaced(serving=False)

    def as_erased(self) -> Self:
        """Return the release as one that holds somebody who was forgotten since."""
        return self.replaced(erased=True, serving=False)

    def as_vacuumed(self) -> Self:
        """Return the release as one whose files were removed."""
        return self.replaced(vacuumed=True)

    def as_matched_with(self, tombstones: str, count: int) -> Self:
        """Return the release as one that holds nobody of a list of tombstones, given by its digest and length."""
        return self.replaced(tombstones=tombstones, tombstone_count=count)


def anchor_of(releases: Iterable[Release]) -> Release | None:
    """Return the anchor of a history: the release marked as such, else the one that is served."""
    known = list(releases)
    return next((one for one in known if one.anchor), next((one for one in known if one.serving), None))


RELEASES_SCHEMA = pa.schema(
    [
        pa.field("release", pa.string()),
        pa.field("number", pa.int64()),
        pa.field("created", pa.timestamp("us", tz="UTC")),
        pa.field("serving", pa.bool_()),
        pa.field("promoted", pa.bool_()),
        pa.field("reason", pa.string()),
        pa.field("features_version", pa.int64()),
        pa.field("record", pa.string()),
    ]
)


def release_name(number: int, content: str) -> str:
    """Return the name of release `number`: the same for the same content, so that a rerun finishes what it began."""
    return f"r{number:05d}-{content[:8]}"
