"""Embeddings of other programs become shards, and features of a release become files that others read."""

import re
from importlib.util import find_spec
from pathlib import Path

import faiss
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import frontalis
from frontalis.cli import app
from frontalis.process import Command
from schemas.errors import SettingsError
from schemas.features import QUARANTINE_SCHEMA, feature_schema
from schemas.releases import RELEASES_SCHEMA
from tasks.exchange.exported import export
from tasks.exchange.imported import import_embeddings

X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
NAMES = ["ann/1.jpg", "ann/2.jpg", "bob/1.jpg", "c.jpg", "d.jpg"]


def read(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "*.parquet")


def test_an_array_with_names(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    words = ["import", f"{tmp_path}/x.npy", f"{tmp_path}/out", "--names", f"{tmp_path}/names.txt", "--shard-rows", "2"]
    done = CliRunner().invoke(app, words, obj=Command())
    assert done.stdout == f"5 rows of 4 numbers in 3 shards under {tmp_path}/out\n"
    found = read(tmp_path / "out")
    assert found["id"].to_list() == NAMES
    assert found["subject"].to_list() == ["ann", "ann", "bob", None, None]
    np.testing.assert_array_equal(found["embedding"].to_numpy(), X)


def test_a_folder_of_clip_retrieval(tmp_path: Path) -> None:
    for number, rows in ((2, slice(0, 3)), (10, slice(3, 5))):  # by number, not by name
        np.save(tmp_path / f"img_emb_{number}.npy", X[rows].astype(np.float16))
        pl.DataFrame({"image_path": NAMES[rows], "who": ["a"] * len(NAMES[rows])}).write_parquet(
            tmp_path / f"metadata_{number}.parquet"
        )
    done = import_embeddings(str(tmp_path), str(tmp_path / "out"), columns={"subject": "who"})
    assert (done.rows, done.dim, done.form) == (5, 4, "clip-retrieval")
    found = read(tmp_path / "out")
    assert found["id"].to_list() == NAMES
    assert found["subject"].unique().to_list() == ["a"]
    np.testing.assert_array_equal(found["embedding"].to_numpy(), X.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "lists"])
def test_tables(suffix: str, tmp_path: Path) -> None:
    ids = pl.DataFrame({"face": [7, 8, 9, 10, 11]})
    wide = ids.with_columns(pl.Series(f"emb_{at}", X[:, at]) for at in (3, 1, 0, 2))
    file = tmp_path / f"x.{suffix.replace('lists', 'parquet')}"
    if suffix == "csv":
        wide.write_csv(file)
    elif suffix == "parquet":
        wide.write_parquet(file)
    else:
        lists = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)
        pq.write_table(pa.table({"face": [7, 8, 9, 10, 11], "embedding": lists}), file)
    import_embeddings(str(file), str(tmp_path / "out"), columns={"id": "face"}, prefix="emb_")
    found = read(tmp_path / "out")
    assert found["id"].to_list() == ["7", "8", "9", "10", "11"]
    np.testing.assert_allclose(found["embedding"].to_numpy(), X, rtol=1e-6)


def test_what_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "flat.npy", X[0])
    (tmp_path / "names.txt").write_text("one\ntwo")
    pl.DataFrame({"id": ["a"], "x": [1.0]}).write_parquet(tmp_path / "x.parquet")
    pl.DataFrame({"id": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}).write_parquet(tmp_path / "ragged.parquet")
    names = str(tmp_path / "names.txt")
    for source, options, says in (
        ("x.npy", {}, "pass --names FILE"),
        ("x.npy", {"names": names}, "has 2 names, .* 5 rows"),
        ("flat.npy", {"names": names}, r"is float32 \[4\]; floats \[N, D\] are needed"),
        ("x.parquet", {}, "has no column 'embedding', nor columns 0, 1"),
        ("x.parquet", {"columns": {"id": "key"}}, r"has no column 'key' \(it has id, x\)"),
        ("ragged.parquet", {}, "is no list of one length"),
        ("none.npy", {"names": names}, "there is no such file"),
        ("x.pt", {}, "must be .npy, .parquet, .csv or a folder"),
        (".", {}, "holds no img_emb"),
    ):
        with pytest.raises(SettingsError, match=says):
            import_embeddings(str(tmp_path / source), str(tmp_path / "out"), **options)
    assert not list(tmp_path.glob("out/*"))
    with pytest.raises(SettingsError, match="is not empty"):
        import_embeddings(str(tmp_path / "x.npy"), str(tmp_path), names=names)


def test_features_of_a_release_in_every_form(measured_store: str, tmp_path: Path) -> None:
    words = ["export", "--store", measured_store, "--mode", "per_sample", "--out", f"{tmp_path}/npy"]
    assert CliRunner().invoke(app, words, obj=Command()).stdout.startswith("280 rows of per_sample, r1: ")
    rows, vectors = pl.read_parquet(tmp_path / "npy/rows.parquet"), np.load(tmp_path / "npy/vectors.npy")
    assert rows.columns[:2] == ["id", "subject"]
    export(measured_store, "per_sample", "lists", str(tmp_path / "lists"))
    lists = pq.read_table(tmp_path / "lists/vectors.parquet")
    assert pa.types.is_fixed_size_list(lists.schema.field("embedding").type)
    assert lists["id"].to_pylist() == rows["id"].to_list()
    np.testing.assert_array_equal(np.array(lists["embedding"].to_pylist(), np.float32), vectors)

    export(measured_store, "per_sample", "faiss", str(tmp_path / "faiss"))
    index = faiss.read_index(str(tmp_path / "faiss/index.faiss"))
    query = vectors[:3] / np.linalg.norm(vectors[:3], axis=1, keepdims=True)
    scores, at = index.search(query, 5)
    with frontalis.open_store(measured_store) as store:
        found = store.index("per_sample").search(vectors[:3], k=5)
    np.testing.assert_allclose(scores, found.scores, atol=1e-5)
    assert rows["id"].to_numpy()[at[:, 0]].tolist() == rows["id"][:3].to_list()


def test_the_snippets_of_the_page_run(measured_store: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "store.md").read_text("utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ran = []
    for snippet in snippets:
        package = re.search(r"^import (\w+)", snippet, re.MULTILINE).group(1)
        if find_spec(package) is not None:
            text = snippet.replace("STORE", measured_store).replace("OUT", str(tmp_path / "out"))
            exec(compile(text, "docs/store.md", "exec"), {})
            ran.append(package)
    assert {"polars", "faiss"} <= set(ran), "pandas and DuckDB are not in the lock"
    assert len(snippets) == 4


def test_the_page_names_every_column() -> None:
    page = (Path(__file__).parents[3] / "docs" / "store.md").read_text("utf-8")
    tables = {"features": feature_schema(pa.string()), "quarantine": QUARANTINE_SCHEMA, "releases": RELEASES_SCHEMA}
    for title, schema in tables.items():
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == schema.names


def test_scores_for_other_programs(measured_store: str, tmp_path: Path) -> None:
    done = export(measured_store, "raw", "scores", str(tmp_path / "scores"))
    lines = [line.split() for line in (tmp_path / "scores/scores-4col.txt").read_text().splitlines()]
    genuine = np.loadtxt(tmp_path / "scores/genuine.txt")
    impostor = np.loadtxt(tmp_path / "scores/impostor.txt")
    assert len(lines) == len(genuine) + len(impostor) == done.rows == 280 * 279 // 2
    assert sum(claimed == real for claimed, real, _, _ in lines) == len(genuine) == 20 * 14 * 13 // 2
    assert genuine.mean() > impostor.mean()
    with pytest.raises(SettingsError, match="mode pose: release r1 has raw"):
        export(measured_store, "pose", "npy", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="is not empty"):
        export(measured_store, "raw", "npy", str(tmp_path / "scores"))
