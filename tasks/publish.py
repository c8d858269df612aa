"""Publish: make what was computed visible, in one Delta commit a table.

The content of the tables follows from the plan; the difference to what is live is the commit. The gate comes later:
readers of the served release see nothing of this.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from schemas.errors import BadShardError, StoreError
from schemas.features import QUARANTINE_SCHEMA, FeatureKey
from schemas.metrics import RAW
from schemas.reports import DataQuality
from schemas.settings import PipelineSettings
from storage.features import complete_rows, features_table, quarantine_table, read_table
from storage.location import Location
from storage.tables import FileTable, LiveFile, Snapshot
from tasks.plan import Plan
from tasks.reweight import ShardResult


@dataclass(frozen=True)
class Published:
    """The two tables after the commit, and where all rows read have gone."""

    features: Snapshot
    quarantine: Snapshot
    data: DataQuality


def publish(settings: PipelineSettings, plan: Plan, results: Sequence[ShardResult]) -> Published:
    """Commit new feature files and remove those no longer wanted; the same for quarantine.

    Args:
        settings: of the run.
        plan: the newest one, which knows every bad shard.
        results: of all that was computed.

    Raises:
        StoreBusyError: another run committed since the plan was made.
        BadShardError: no row at all can be used; nothing was committed.
    """
    store = Location(settings.store)
    features = features_table(store)
    wanted = plan.wanted
    fresh = {file.path: file for result in results for file in result.files} | {file.path: file for file in plan.reused}
    add = [file for path, file in fresh.items() if path in wanted and path not in plan.base.files]
    remove = [file for path, file in plan.base.files.items() if path not in wanted]
    rows = {file.path: file.rows for file in [*plan.base.files.values(), *fresh.values()]}
    if not any(rows[path] for path in wanted):
        what = plan.faults[0].reason if plan.faults else "every row is bad or forgotten"
        raise BadShardError(f"source {settings.source}: no row can be used, so nothing was published: {what}")
    # Quarantine first: were the features live and their bad rows not, vacuum would remove those.
    quarantine = _publish_quarantine(store, wanted.values())
    snapshot = features.commit(plan.base, plan.schema, add, remove)
    return Published(snapshot, quarantine, data_quality(plan, snapshot, quarantine, quarantine_table(store)))


def _publish_quarantine(store: Location, features: Iterable[FeatureKey]) -> Snapshot:
    table = quarantine_table(store)
    base = table.snapshot()
    names = {key.quarantine_path: key.shard for key in features if key.mode == RAW}
    on_disk = {entry.name: entry.size for entry in table.place.files(".parquet")}
    wanted = {path: shard for path, shard in names.items() if path in on_disk}
    add = [
        LiveFile(path, on_disk[path], complete_rows(table.place / path) or 0, {"shard": shard})
        for path, shard in wanted.items()
        if path not in base.files
    ]
    remove = [file for path, file in base.files.items() if path not in wanted]
    if not add and not remove:
        return base
    return table.commit(base, QUARANTINE_SCHEMA, add, remove)


def data_quality(plan: Plan, features: Snapshot, quarantine: Snapshot, table: FileTable) -> DataQuality:
    """Count where all rows read have gone.

    Raises:
        StoreError: the sums do not agree: a mode lacks rows of a shard, or a shard has rows that went nowhere.
    """
    rows: dict[str, dict[str, int]] = {}
    for file in features.files.values():
        rows.setdefault(file.shard, {})[file.mode] = file.rows
    quarantined = Counter({file.shard: file.rows for file in quarantine.files.values()})
    faulty = {fault.shard for fault in plan.faults}
    records = {shard: record for shard, record in plan.records.items() if record.input_digest == plan.inputs.get(shard)}
    read = forgotten = blank = 0
    for shard, by_mode in rows.items():
        if set(by_mode) != set(plan.modes) or len(set(by_mode.values())) != 1:
            raise StoreError(f"shard {shard}: modes hold different rows ({by_mode}); run `frontalis verify --store …`.")
        read += by_mode[RAW] + quarantined[shard]
        if (record := records.get(shard)) is None:  # a bad shard of which only its last good features are known
            continue
        lost = record.unaccounted(by_mode[RAW], quarantined[shard])
        if shard not in faulty and lost:
            raise StoreError(f"shard {shard}: {lost}; run `frontalis verify --store …`.")
        read += record.forgotten_rows
        forgotten += record.forgotten_rows
        blank += record.blank_subjects or 0
    reasons = read_table(table, quarantine.files.values(), ["reason"])["reason"].to_pylist()
    return DataQuality(
        shards=len(rows),
        rows_read=read,
        rows_features=sum(by_mode[RAW] for by_mode in rows.values()),
        quarantined=dict(sorted(Counter(reasons).items())),
        forgotten=forgotten,
        blank_subjects=blank,
        bad_shards=list(plan.faults),
        rows_in_bad_shards=sum(plan.records[shard].rows for shard in faulty - rows.keys() if shard in plan.records),
    )
