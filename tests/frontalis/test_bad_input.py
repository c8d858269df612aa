"""Bad input at the command line: what is said, the exit code, and what is served afterwards."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.location import Location
from storage.releases import Releases
from tests.commands import frontalis

Shell = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def reprocess(tiny_models) -> Shell:
    """Run `frontalis reprocess …` with the tiny models unless others are given; no traceback is ever shown."""

    def run(source: Path, store: Path, *more: object, models: list[str] | None = None, code: int):
        words = ["reprocess", "--source", source, "--store", store, *(models or tiny_models.arguments), *more]
        done = frontalis(*words)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


def test_bad_shards_end_with_4_and_the_others_are_served(reprocess, tiny_source: Path, tmp_path: Path) -> None:
    source, store = tmp_path / "source", tmp_path / "store"
    shutil.copytree(tiny_source, source)
    good = pq.read_table(source / "part-001.parquet")
    (source / "part-001.parquet").write_bytes((source / "part-001.parquet").read_bytes()[:-100])
    (source / "page.parquet").write_bytes(b"<html>" * 100)
    rows = pq.read_table(source / "part-002.parquet").to_pylist()
    rows[3]["embedding"] = [float("nan")] * 32
    pq.write_table(pa.Table.from_pylist(rows, schema=good.schema), source / "part-002.parquet")

    done = reprocess(source, store, "--json", code=4)

    outcome = json.loads(done.stdout)
    data = outcome["data"]
    assert {fault["shard"]: fault["kept"] for fault in data["bad_shards"]} == {"part-001": False, "page": False}
    assert data["quarantined"] == {"not_finite": 1}
    assert data["rows_read"] == data["rows_features"] + 1 == 280 - good.num_rows
    assert "completed with bad shards: page, part-001" in done.stderr
    assert "run again" in done.stderr
    [release] = Releases(Location(str(store))).all()
    assert release.serving
    assert pl.scan_delta(str(store / "features")).select("shard").unique().collect().height == 2


def test_the_name_of_a_bad_shard_cannot_forge_a_line(reprocess, tiny_source: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    (source / "a\x1b[31mPWN\nfrontalis: all is well.parquet").write_bytes(b"PAR1")
    beside_others = reprocess(source, tmp_path / "store", code=4)
    for file in source.glob("part-*"):
        file.unlink()
    alone = reprocess(source, tmp_path / "other", code=2)
    for said in (beside_others.stdout, alone.stderr):
        assert r"a\u001b[31mPWN\nfrontalis: all is well.parquet cannot be read as Parquet" in said
    for said in (beside_others.stderr, alone.stdout):
        assert "\x1b" not in said
        assert "frontalis: all" not in said


def test_bad_row_and_fail_publishes_nothing(reprocess, tiny_source: Path, tmp_path: Path, tiny_models) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    rows = pq.read_table(source / "part-002.parquet")
    zeroed = rows.to_pylist()
    zeroed[5]["embedding"] = [0.0] * 32
    pq.write_table(pa.Table.from_pylist(zeroed, schema=rows.schema), source / "part-002.parquet")
    config = tmp_path / "pipeline.toml"
    models = "".join(f"{mode} = '{path}'\n" for mode, path in tiny_models.by_mode.items())
    config.write_text(f"source = 'source'\nstore = 'store'\n[models]\n{models}[reweight]\non_bad_rows = 'fail'\n")

    done = reprocess(source, tmp_path / "store", "--config", config, code=2)

    assert done.stdout == ""
    assert "shard part-002, row 5" in done.stderr
    assert "zero_norm; fix it, or set on_bad_rows" in done.stderr
    assert not Releases(Location(str(tmp_path / "store"))).all()


@pytest.mark.parametrize(("source", "store"), [("faces", "faces/store"), ("store/shards", "store"), ("faces", "faces")])
def test_source_and_store_in_one_another_are_refused(
    reprocess, tiny_source: Path, tmp_path: Path, source: str, store: str
) -> None:
    shutil.copytree(tiny_source, tmp_path / source)
    before = sorted(tmp_path.rglob("*"))
    done = reprocess(tmp_path / source, tmp_path / store, code=2)
    assert "one is inside the other" in done.stderr
    assert "choose a store beside the source" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_hostile_model_is_refused_and_not_run(reprocess, tiny_source: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    pickle = tmp_path / "model.safetensors"
    pickle.write_bytes(f"cposix\nsystem\n(S'touch {touched}'\ntR.".encode() + b"\0" * 64)

    done = reprocess(tiny_source, tmp_path / "store", models=[f"--model=per_sample={pickle}"], code=2)

    assert str(pickle) in done.stderr
    assert "safetensors" in done.stderr
    assert not touched.exists()
    assert not (tmp_path / "store" / "features").exists()
