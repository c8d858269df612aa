"""`frontalis query` as it is typed: what it prints, writes and refuses. `test_store.py` tests the search itself."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import frontalis
from flows.query import query as flow
from frontalis.cli import app
from frontalis.process import Command
from schemas.errors import SettingsError

ID = "000003-002"


@pytest.fixture
def ask(measured_store: str) -> Callable[..., str]:
    """`ask(*words)` gives what `frontalis query` prints; a refusal is raised."""

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, ["query", "--store", measured_store, *map(str, words)], obj=Command())
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


@pytest.fixture(scope="module")
def rows(tiny_source: Path) -> pl.DataFrame:
    return pl.read_parquet(tiny_source / "*.parquet").with_row_index()


def test_every_score_comes_with_its_fmr_and_matches_are_marked(ask, measured_store) -> None:
    answer = json.loads(ask("--id", ID, "-k", 200, "--fmr", "0.01", "--columns", "yaw, pose", "--json"))
    with frontalis.open_store(measured_store) as store:
        threshold = store.threshold("per_sample", 1e-2)
        (neighbours,) = (one["neighbours"] for one in answer["results"])
        scores = np.array([one["score"] for one in neighbours])
        assert [one["fmr"] for one in neighbours] == store.fmr("per_sample", scores).tolist()
        pairs = store.opened.rates("per_sample").n_impostor
    assert (answer["fmr"], answer["threshold"], answer["impostor_pairs"]) == ("1e-2", threshold, pairs)
    assert [one["match"] for one in neighbours] == (scores >= threshold).tolist()
    assert 0 < (scores >= threshold).sum() < 200
    assert set(neighbours[0]["columns"]) == {"yaw", "pose"}
    printed = ask("--id", ID, "-k", 3, "--fmr", "1e-2", "--columns", "yaw").splitlines()
    assert printed[0] == f"{ID} (subject subject-000003): per_sample, r1"
    assert printed[1].split() == ["rank", "score", "FMR", "match", "id", "subject", "same", "shard", "yaw"]
    assert printed[2].split()[:2] == ["1", f"{scores[0]:.4f}"]
    assert f"at most this share of {pairs:,} impostor pairs of r1 score as high" in printed[-2]
    assert printed[-1] == (
        f"match: score >= {threshold!r}, FMR at most 1e-2: expect up to 2.8 false matches among 280 rows"
    )


def test_modes_are_compared_side_by_side(ask) -> None:
    answers = json.loads(ask("--id", ID, "-k", 4, "--compare", "--json"))["answers"]
    alone = {mode: json.loads(ask("--id", ID, "-k", 4, "--mode", mode, "--json")) for mode in answers}
    assert list(answers) == ["raw", "per_sample", "batch_stat"]
    assert answers == alone
    printed = ask("--id", ID, "-k", 4, "--compare", "--fmr", "1e-1").splitlines()
    assert printed[1].split() == ["rank", "raw", "FMR", "id", "per_sample", "FMR", "id", "batch_stat", "FMR", "id"]
    first = [answers[mode]["results"][0]["neighbours"][0] for mode in answers]
    cells = [word for one in first for word in (f"{one['score']:.4f}*", "=", one["id"])]
    assert [word for word in printed[2].split()[1:] if "e-" not in word and "<" not in word] == cells
    assert [line.split(":")[0] for line in printed if "(*)" in line] == [f"match (*) in {mode}" for mode in answers]


@pytest.mark.parametrize("suffix", ["npy", "parquet", "csv"])
def test_new_vectors_with_and_without_the_row_of_their_own_id(suffix, ask, rows, tmp_path) -> None:
    some = rows.head(4)
    file = tmp_path / f"new.{suffix}"
    if suffix == "npy":
        np.save(file, some["embedding"].to_numpy())
    elif suffix == "parquet":
        some.select("id", "embedding").write_parquet(file)
    else:
        numbers = some["embedding"].to_numpy().tolist()
        lines = [",".join([name, *map(repr, row)]) for name, row in zip(some["id"], numbers, strict=True)]
        file.write_text("\n".join(["id," + ",".join(f"e{n}" for n in range(32)), *lines]))
    found = json.loads(ask("--vectors", file, "-k", 2, "--json"))["results"]
    names = list(range(4)) if suffix == "npy" else some["id"].to_list()
    assert [one["query"] for one in found] == names
    assert [one["neighbours"][0]["id"] for one in found] == some["id"].to_list()
    if suffix != "npy":
        without = json.loads(ask("--vectors", file, "-k", 1, "--exclude-self", "--json"))["results"]
        assert [one["neighbours"][0]["id"] for one in without] == [one["neighbours"][1]["id"] for one in found]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_answers_go_to_a_file(suffix, ask, tmp_path) -> None:
    file = tmp_path / f"found.{suffix}"
    words = ("--id", ID, "--id", "000004-001", "-k", 3, "--fmr", "1e-2", "--expand", 2, "--columns", "yaw")
    assert ask(*words, "--out", file) == f"6 neighbours of 2 queries in {file}\n"
    answer = json.loads(ask(*words, "--json"))
    if suffix == "json":
        assert json.loads(file.read_text()) == answer
        return
    table = pl.read_csv(file) if suffix == "csv" else pl.read_parquet(file)
    assert table.columns == [
        "query", "mode", "rank", "id", "score", "expanded", "fmr", "match", "subject", "shard", "yaw"
    ]  # fmt: skip
    for query, result in zip(table.partition_by("query", maintain_order=True), answer["results"], strict=True):
        for row, one in zip(query.to_dicts(), result["neighbours"], strict=True):
            assert (row["rank"], row["id"], row["match"]) == (one["rank"], one["id"], one["match"])
            np.testing.assert_allclose([row["score"], row["expanded"]], [one["score"], one["expanded"]], rtol=1e-6)
    ask(*words, "--compare", "--out", file)
    again = pl.read_csv(file) if suffix == "csv" else pl.read_parquet(file)
    assert again.filter(mode="per_sample").drop("mode").equals(table.drop("mode"))
    assert again["mode"].unique(maintain_order=True).to_list() == ["raw", "per_sample", "batch_stat"]


def test_subjects_are_found_by_their_templates(ask) -> None:
    answer = json.loads(ask("--id", ID, "-k", 20, "--by", "subject", "--json"))
    (own,) = (one for one in answer["results"][0]["neighbours"] if one["id"] == "subject-000003")
    assert (own["subject"], own["rows"], own["fmr"], own["shard"]) == ("subject-000003", 14, None, None)
    printed = ask("--id", ID, "-k", 20, "--by", "subject").splitlines()
    assert printed[1].split() == ["rank", "score", "subject", "same", "rows"]
    assert printed[-1].endswith("its FMR is unknown: FMR is measured on pairs of rows, not on templates")
    side_by_side = ask("--id", ID, "-k", 20, "--by", "subject", "--compare")
    assert "= subject-000003" in side_by_side


def test_the_flow_writes_what_the_command_writes(ask, measured_store, rows, tmp_path) -> None:
    rows.head(5).select("id", "embedding").write_parquet(tmp_path / "new.parquet")
    files = tmp_path / "flow.parquet", tmp_path / "command.parquet"
    vectors = str(tmp_path / "new.parquet")
    done = flow.fn(measured_store, str(files[0]), vectors=vectors, k=3, fmr=0.01, where="yaw > 0", columns=["pose"])
    ask("--vectors", vectors, "-k", 3, "--fmr", "0.01", "--where", "yaw > 0", "--columns", "pose", "--out", files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (done.release, done.queries, done.neighbours) == ("r1", 5, 15)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--id", ID, "--compare", "--mode", "raw"), "either --mode or --compare"),
        (("--id", ID, "--include-self", "--exclude-self"), "either --include-self or --exclude-self"),
        (("--id", ID, "--by", "subject", "--fmr", "1e-2"), "--fmr: FMR is measured on pairs of rows"),
        (("--id", ID, "--out", "x.pdf"), "--out x.pdf: must end in .csv, .parquet, .json"),
        (("--id", ID, "--fmr", "0"), "fmr: '0' is no rate"),
        (("--id", ID, "--fmr", "1e-8"), "fmr 1e-8: not estimable from"),
        (("--id", ID, "--columns", "front"), "column 'front': is not stored"),
        (("--id", ID, "--where", "yaw"), "where 'yaw': gives Float32"),
        (("--id", ID, "--expand", "-1"), "expand -1: must be 0 (none) to 100"),
    ],
)
def test_refused_options(words, says, ask) -> None:
    with pytest.raises(SettingsError) as refused:
        ask(*words)
    assert says in str(refused.value)
