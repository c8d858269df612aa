"""What a run may remove from what is served: most of it only with `--allow-removal`, a mode only by name.

The shards have no labels, so no metric protects what is served.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from frontalis.cli import app
from frontalis.process import Command
from storage.location import Location
from storage.releases import Releases
from tasks.outcome import CompletedWithBadShardsError
from tasks.query import answer
from tests.pipeline_fixtures import fixed

ROWS, SHARDS, D = 20, 6, 32
STRICT = {"gate": {"tolerance": 1.0}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six shards of 20 rows without labels."""
    return write(tmp_path / "source", "id")


def write(folder: Path, prefix: str) -> Path:
    folder.mkdir()
    for shard in range(SHARDS):
        matrix = np.random.default_rng(shard).standard_normal((ROWS, D)).astype(np.float32)
        ids = [f"{prefix}-{shard}-{row}" for row in range(ROWS)]
        pq.write_table(pa.table({"id": ids, "embedding": fixed(matrix)}), folder / f"part-{shard}.parquet")
    return folder


def spoil(source: Path) -> None:
    """Replace the embeddings of all shards but the first by NaN."""
    for file in sorted(source.glob("*.parquet"))[1:]:
        table = pq.read_table(file)
        pq.write_table(table.set_column(1, "embedding", fixed(np.full((ROWS, D), np.nan, np.float32))), file)


def releases(store: Path):
    return Releases(Location(str(store))).all()


def test_vanished_shards_at_the_command_line(tiny_models, source: Path, tmp_path: Path) -> None:
    store, config = tmp_path / "store", tmp_path / "pipeline.toml"

    config.write_text(f'source = "{source}"\nstore = "{store}"\n[models]\nper_sample = "{tiny_models.per_sample}"')

    def reprocess(*words: str, code: int):
        done = CliRunner().invoke(app, ["-q", "reprocess", "--config", str(config), "--json", *words], obj=Command())
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    first = reprocess(code=0)
    for file in sorted(source.glob("*.parquet"))[1:]:
        file.rename(tmp_path / file.name)

    rejected = reprocess(code=5)
    assert (
        f"100 of 120 rows (83.3%) and 5 of 6 shards (83.3%) of {first['release']} would be removed, more than "
        "[gate] max_removed_rows = 0.2, max_removed_shards = 0.2 allows; fix the source, pass --allow-removal once"
    ) in rejected["reason"]
    assert answer(str(store), "per_sample", ids=["id-5-19"], k=1).release == first["release"]
    again = reprocess(code=5)
    assert (again["release"], again["shards_computed"]) == (rejected["release"], 0)

    allowed = reprocess("--allow-removal", code=0)
    assert allowed["status"] == "promoted"
    assert "passed by --allow-removal" in allowed["reason"]
    assert [allowed["changes"][f"rows_{what}"] for what in ("added", "changed", "removed")] == [0, 0, 100]
    assert releases(store)[-1].content == releases(store)[-2].content
    for words in ((), ("--allow-removal",)):
        assert reprocess(*words, code=0)["status"] == "unchanged"

    listed = CliRunner().invoke(app, ["releases", "--store", str(store)], obj=Command()).stdout.splitlines()
    assert "added" in listed[1]
    assert ["100" in line.split() for line in listed if line.startswith("r0000")] == [False, True, True]
    assert "0 added, 0 changed, 100 removed since" in (store / releases(store)[2].report).read_text()


def test_a_served_mode_leaves_only_by_name(run_pipeline, source: Path, tiny_models, tmp_path: Path) -> None:
    store, one = tmp_path / "store", {"models": {"per_sample": str(tiny_models.per_sample)}}
    first = run_pipeline(source, store, **STRICT)
    rejected = run_pipeline(source, store, **one, **STRICT, allow_removal=True)
    assert rejected.status == "rejected"
    assert f"{first.release} serves batch_stat, which this run lacks; pass the model, or --drop-mode" in rejected.reason
    dropped = {"gate": {**STRICT["gate"], "drop_modes": ["batch_stat"]}}
    assert run_pipeline(source, store, **one, **dropped).status == "promoted"
    assert run_pipeline(source, store, **one, **STRICT).status == "unchanged"


def test_embeddings_that_turn_nan_keep_the_last_good_features(run_pipeline, source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert run_pipeline(source, store, **STRICT).status == "promoted"
    spoil(source)
    with pytest.raises(CompletedWithBadShardsError) as caught:
        run_pipeline(source, store, **STRICT)
    assert caught.value.exit_code == 4
    outcome = caught.value.outcome
    assert (outcome.status, outcome.data.rows_features) == ("promoted", 120)
    assert [fault.kept for fault in outcome.data.bad_shards] == [True] * 5


def test_first_run_of_mostly_bad_rows_serves_nothing(run_pipeline, source: Path, tmp_path: Path) -> None:
    spoil(source)
    store = tmp_path / "store"
    with pytest.raises(CompletedWithBadShardsError) as caught:
        run_pipeline(source, store, **STRICT)
    assert caught.value.outcome.status == "rejected"
    assert "100 of 120 rows of the source (83.3%) cannot be used, more than [gate] max_quarantined = 0.2 allows" in (
        caught.value.outcome.reason
    )
    assert [release.serving for release in releases(store)] == [False]


def test_another_source_without_labels_is_rejected(run_pipeline, source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_pipeline(source, store, **STRICT)
    outcome = run_pipeline(write(tmp_path / "other", "face"), store, **STRICT)  # same names, same numbers of rows
    assert outcome.status == "rejected"
    assert "120 of 120 rows (100.0%) and 6 of 6 shards (100.0%)" in outcome.reason
    shutil.copy(tmp_path / "other" / "part-0.parquet", source / "part-9.parquet")
    grown = run_pipeline(source, store, **STRICT)
    assert grown.status == "promoted"
    assert (grown.changes.rows_added, grown.changes.rows_removed) == (20, 0)
