"""Status: what a store serves, how old that is, what it takes, and what an operator must do. Reads records only."""

from collections import Counter
from datetime import UTC, datetime

from pydantic import BaseModel, Field

from schemas.errors import StoreError
from storage.location import Location
from storage.releases import Releases
from storage.tombstones import Tombstones


class StoreStatus(BaseModel):
    """The state of a store. `to_do` is empty where an operator has nothing to do."""

    store: str
    served: str | None = Field(description="the release that answers queries; None where nothing was promoted yet")
    created: datetime | None = Field(description="of the served release")
    age_hours: float | None = None
    rows: int = Field(default=0, description="with features, in the served release")
    decision: str | None = Field(default=None, description="of the served release, with its reason")
    latest: str = Field(description="the newest release, whether it is served or not")
    latest_decision: str
    quarantined: dict[str, int] = Field(description="reason → rows, in the newest release")
    bad_shards: list[str] = Field(description="in the newest release")
    releases: int
    bytes: dict[str, int] = Field(description="by part of the store")
    to_do: list[str]


def status(store: str, *, max_age_hours: float | None = None, now: datetime | None = None) -> StoreStatus:
    """Return the state of a store.

    Args:
        store: local path or s3://…
        max_age_hours: an older served release is something to do. A run in which nothing changed makes no release.
        now: the time to measure ages at.

    Raises:
        SettingsError: there is no such store, or no run has made a release.
        StoreError: the release history cannot be read.
    """
    place = Location(store)
    releases = Releases.of(place).made()
    served = next((one for one in releases if one.serving), None)
    latest = releases[-1]
    age = None if served is None else ((now or datetime.now(UTC)) - served.created).total_seconds() / 3600
    to_do = []
    if served is None:
        to_do.append("nothing is served: fix what rejected the run, then `frontalis reprocess`")
    if not latest.gate.promoted and not latest.serving:
        to_do.append(f"{latest.release} was rejected: {latest.gate.reason}")
    if latest.data.bad_shards:
        names = ", ".join(fault.shard for fault in latest.data.bad_shards[:5])
        to_do.append(f"fix or remove {len(latest.data.bad_shards)} bad shard(s) ({names}), then `frontalis reprocess`")
    if age is not None and max_age_hours is not None and age > max_age_hours:
        to_do.append(f"the served release is {age:.1f} h old, more than {max_age_hours:g}: look at the last runs")
    if erased := [one.release for one in releases if one.erased and not one.vacuumed]:
        to_do.append(f"`frontalis vacuum`: {', '.join(erased)} still hold somebody who was forgotten")
    try:
        Tombstones.proven(place, releases)
    except StoreError as error:
        to_do.append(str(error))
    sizes: Counter[str] = Counter()
    for entry in place.walk(links=False):
        folder, slash, _ = entry.name.partition("/")
        sizes[folder if slash else "other"] += max(entry.size, 0)
    return StoreStatus(
        store=place.uri,
        served=served.release if served else None,
        created=served.created if served else None,
        age_hours=age,
        rows=served.data.rows_features if served else 0,
        decision=served.gate.sentence if served else None,
        latest=latest.release,
        latest_decision=latest.gate.sentence,
        quarantined=dict(latest.data.quarantined),
        bad_shards=[fault.shard for fault in latest.data.bad_shards],
        releases=len(releases),
        bytes=dict(sorted(sizes.items())),
        to_do=to_do,
    )
