"""Stores to do things to, made in this process against the session's Prefect server."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from flows.reprocess import reprocess
from schemas.settings import PipelineSettings, pipeline
from tasks.outcome import Outcome

SECRET = "born 1970-01-01 in Gotham"


@dataclass(frozen=True)
class Person:
    """Somebody in a source: 14 good rows in one shard; in `part-900` 1 good and 3 bad ones."""

    subject: str
    photograph: str
    source: Path
    secrets: tuple[str, ...]
    rows: int = 15
    quarantined: int = 3


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quick_settings(tiny_models) -> Callable[..., PipelineSettings]:
    """`quick_settings(source, store, **settings)`: both tiny models, and no bootstrap."""

    def make(source: str | Path, store: str | Path, **settings: object) -> PipelineSettings:
        values = {"source": str(source), "store": str(store), "models": tiny_models.by_mode}
        return pipeline(**{**values, "evaluation": {"resamples": 0}, "gate": {"tolerance": 1.0}, **settings})

    return make


@pytest.fixture(scope="session")
def run_pipeline(prefect_server, quick_settings) -> Iterator[Callable[..., Outcome]]:
    """`run_pipeline(source, store, **settings)` runs the whole flow in this process."""

    def run(source: str | Path, store: str | Path, **settings: object) -> Outcome:
        state = reprocess(settings=quick_settings(source, store, **settings), return_state=True)
        outcome = state.result(raise_on_failure=not isinstance(state.data, Outcome))
        assert isinstance(outcome, Outcome)
        return outcome

    with temporary_settings({PREFECT_API_URL: prefect_server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield run


@pytest.fixture(scope="session")
def plain_source(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny source with ids and embeddings only: a release of it has nothing to measure and is made quickly."""
    folder = tmp_path_factory.mktemp("plain") / "shards"
    folder.mkdir()
    for file in tiny_source.glob("*.parquet"):
        pq.write_table(pq.ParquetFile(file).read(["id", "embedding"]), folder / file.name)
    return folder


@pytest.fixture(scope="session")
def person(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Person:
    """The tiny source with a column `note` and a fourth shard, and somebody in it whom no model has seen.

    The fourth shard holds, of that person, a good row, one with the same id, one not finite and one without id; and of
    others two good rows, one that is zero, and one whose id another shard owns.
    """
    folder = tmp_path_factory.mktemp("person") / "shards"
    shutil.copytree(tiny_source, folder)
    files = sorted(folder.glob("*.parquet"))
    subject = sorted(set(pq.read_table(files[1])["subject"].to_pylist()))[2]
    for file in files:
        table = pq.read_table(file)
        notes = [SECRET if name == subject else "nothing" for name in table["subject"].to_pylist()]
        pq.write_table(table.append_column("note", pa.array(notes)), file)
    first = pq.read_table(files[0])
    rows = first.slice(0, 8).to_pylist()
    owned = rows[7]["id"]
    for number, row in enumerate(rows):
        row["id"], row["subject"] = f"extra-{number}", "subject-extra"
        row["embedding"] = [value + number + 1 for value in row["embedding"]]
    mine = "photograph-of-the-person"
    for at, name in ((0, mine), (3, mine), (4, f"{mine}-broken"), (5, None)):
        rows[at] |= {"id": name, "subject": subject, "note": SECRET}
    rows[4]["embedding"] = [float("nan"), *rows[4]["embedding"][1:]]
    rows[6]["embedding"] = [0.0] * len(rows[6]["embedding"])
    rows[7]["id"] = owned
    pq.write_table(pa.Table.from_pylist(rows, schema=first.schema), folder / "part-900.parquet")
    return Person(subject, mine, folder, (subject, mine, SECRET))


@pytest.fixture(scope="session")
def published(run_pipeline, person: Person, tmp_path_factory) -> Callable[..., Path]:
    """`published(**settings)` gives a fresh copy of a store with one release of the person's source."""
    originals: dict[str, Path] = {}

    def copy(**settings: object) -> Path:
        name = repr(sorted(settings.items()))
        if name not in originals:
            store = tmp_path_factory.mktemp("published") / "store"
            assert run_pipeline(person.source, store, columns={"keep": ["note"]}, **settings).status == "promoted"
            originals[name] = store
        target = tmp_path_factory.mktemp("store") / "store"
        shutil.copytree(originals[name], target)
        return target

    return copy
