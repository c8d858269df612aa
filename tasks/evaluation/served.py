"""Read the served release's features of the rows that are evaluated, so that both can be compared row by row.

A feature file's name is its key: where both releases name the same file, the features are the same and nothing is read.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.metrics import RAW
from storage.features import features_table, matrix_of, read_rows
from storage.location import Location
from storage.tables import Snapshot
from tasks.evaluation.rows import LabelledRows, SubjectIndex, files_of, rows_at


def served_features(
    store: Location,
    features: Snapshot,
    served: Snapshot,
    labelled: SubjectIndex,
    rows: np.ndarray,
    read: LabelledRows,
    modes: Sequence[str],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return which of the rows the served release has too, and by mode its features of those.

    Args:
        store: the store.
        features: the snapshot that is evaluated.
        served: that of the served release.
        labelled: of `features`.
        rows: places in the index.
        read: the same rows with their features.
        modes: those that both snapshots have.

    Returns:
        Places in `read`, ascending, and for each mode float32 `[n, D]` in their order.

    Raises:
        StoreError: a file is damaged.
    """
    table = features_table(store)
    old, new = files_of(served, RAW), files_of(features, RAW)
    names = np.array(labelled.shards, dtype=object)[labelled.shard[rows]]
    kept = [shard for shard, file in old.items() if shard in new and new[shard].path == file.path]
    unmoved = np.isin(names, np.array(kept, dtype=object))
    shards, at = names.copy(), np.where(unmoved, labelled.row[rows], -1)
    sought = {read.ids[row]: row for row in np.flatnonzero(~unmoved)}
    wanted = pa.array(list(sought), pa.string())
    for shard in (old.keys() - set(kept)) if sought else ():
        start = 0
        for batch in read_rows(table, old[shard], ["id", "subject"]):
            ids = batch.column("id").cast(pa.string())
            here = pc.and_(pc.is_in(ids, wanted), batch.column("subject").is_valid())
            for row in np.flatnonzero(here.to_numpy(zero_copy_only=False)):
                place = sought[ids[row].as_py()]
                shards[place], at[place] = shard, start + row
            start += batch.num_rows
    common = np.flatnonzero(at >= 0)
    if not len(common):
        return common, {}
    shards, at = shards[common], at[common]
    order = np.lexsort((at, shards.astype(str)))
    found = {}
    for mode in modes:
        before, now = files_of(served, mode), files_of(features, mode)
        same = np.isin(shards, [shard for shard in kept if before[shard].path == now[shard].path])
        other = order[~same[order]]
        parts = [read.features[mode][common[same]]] if same.any() else []
        if len(other):
            column = rows_at(table, before, shards[other], at[other], ["front"])["front"]
            parts.append(matrix_of(column, f"mode {mode}"))
        found[mode] = np.empty((len(common), parts[0].shape[1]), np.float32)
        found[mode][np.concatenate([np.flatnonzero(same), other])] = np.concatenate(parts)
    return common, found
