"""A source and two models small enough for seconds, and stores made of them in this process.

`run_stages` does the work up to the commit, without index and evaluation; `run_pipeline` runs the whole job.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.architectures import build
from models.checkpoint import library_versions, save
from models.se import gather_statistics
from models.seen import Seen
from models.split import split_of
from schemas.index import IndexSettings
from schemas.models import Mode, ModelCard
from schemas.releases import Release
from schemas.reports import GateDecision
from schemas.settings import PipelineSettings, pipeline
from schemas.split import SplitRule
from storage.features import features_table
from storage.layout import REPORT_METRICS, report_folder
from storage.location import Location
from storage.releases import Releases
from tasks.evaluate import evaluate
from tasks.index import index_mode
from tasks.outcome import CompletedWithBadShardsError, Outcome
from tasks.plan import Plan, make_plan, prepare_models
from tasks.publish import Published, publish
from tasks.reprocess import reprocess
from tasks.reweight import ReweightSpec, ShardResult, reweight_group
from tasks.synthetic.shards import synthesize

TINY_DIM = 32
TINY_SUBJECTS = 20
TINY_SPLIT = SplitRule(salt="tiny", train=0.4, validation=0.1, test=0.5)
TINY_KEY = 32 * "0"
# Tolerates any metric on however few subjects, any number of removed and quarantined rows, and modes that leave.
MILD_GATE = {
    "tolerance": 1.0,
    "undecided": "promote",
    "drop_modes": ["per_sample", "batch_stat"],
    **dict.fromkeys(("max_removed_rows", "max_removed_shards", "max_removed_subjects", "max_quarantined"), 1.0),
}
SECRET = "born 1970-01-01 in Gotham"


@dataclass(frozen=True)
class TinyModels:
    """Checkpoints of both modes for `tiny_source`; `arguments` are the `--model` options of `frontalis reprocess`."""

    per_sample: Path
    batch_stat: Path

    @property
    def by_mode(self) -> dict[Mode, str]:
        return {"per_sample": str(self.per_sample), "batch_stat": str(self.batch_stat)}

    @property
    def arguments(self) -> list[str]:
        return [part for mode, path in self.by_mode.items() for part in ("--model", f"{mode}={path}")]


MakeCheckpoint = Callable[..., Path]


def fixed(matrix: np.ndarray) -> pa.Array:
    """Return `[n, D]` as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled shards of 20 subjects × 14 rows of 32 numbers. Shared: copy it before you change it."""
    folder = tmp_path_factory.mktemp("tiny-source") / "shards"
    synthesize(folder, subjects=TINY_SUBJECTS, per_subject=14, dim=TINY_DIM, shards=3, seed=11)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> TinyModels:
    """Checkpoints of both modes that move features a little, and have seen half of the subjects of `tiny_source`."""
    folder = tmp_path_factory.mktemp("tiny-models")
    return TinyModels(
        make_checkpoint(folder / "per_sample.safetensors", "per_sample"),
        make_checkpoint(folder / "batch_stat.safetensors", "batch_stat"),
    )


@pytest.fixture(scope="session")
def make_checkpoint() -> MakeCheckpoint:
    """`make_checkpoint(path, mode, *, dim=32, seed=0, strength=0.02)`: an untrained network, its weights perturbed.

    A small `strength` moves features a little (the gate lets it pass); a large one (1.0) ruins them (rejected).
    """
    return _make_checkpoint


def _make_checkpoint(
    path: Path, mode: Mode = "per_sample", *, dim: int = TINY_DIM, seed: int = 0, strength: float = 0.02
) -> Path:
    arguments = {"feature_dim": dim, "reduction": 4, "use_batch_stat": mode == "batch_stat"}
    random = torch.Generator().manual_seed(seed)
    model = build("dual_branch", arguments).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights += strength * torch.randn(weights.shape, generator=random)
    gather_statistics(model, [torch.nn.functional.normalize(torch.randn(256, dim, generator=random))])
    card = ModelCard(
        architecture="dual_branch",
        arguments=arguments,
        mode=mode,
        embedding_dim=dim,
        normalisation="l2",
        split=TINY_SPLIT,
        seen_key=TINY_KEY,
        versions=library_versions(),
    )
    names = [f"subject-{number:06d}" for number in range(TINY_SUBJECTS)]
    seen = [name for name in names if split_of(name, TINY_SPLIT) != "test"]
    save(card, model, path, Seen.of(seen, [np.empty((0, dim))], TINY_KEY))
    return path


@dataclass(frozen=True)
class StagesResult:
    """What the stages up to the commit gave: a run without Prefect, index and evaluation. Unpacks in this order."""

    plan: Plan
    results: list[ShardResult]
    published: Published

    def __iter__(self) -> Iterator[object]:
        return iter((self.plan, self.results, self.published))


@pytest.fixture(scope="session")
def run_stages() -> Callable[[PipelineSettings], StagesResult]:
    """`run_stages(settings)`: plan, reweight and publish in this process."""

    def run(settings: PipelineSettings) -> StagesResult:
        models = prepare_models(settings)
        plan = make_plan(settings, models)
        spec = ReweightSpec.of(settings, models, plan.schema)
        results = [result for group in plan.groups for result in reweight_group(group, spec)]
        if faults := [result.fault for result in results if result.fault]:
            plan = make_plan(settings, models, faults)
            results += [result for group in plan.groups for result in reweight_group(group, spec)]
        return StagesResult(plan, results, publish(settings, plan, results))

    return run


@pytest.fixture(scope="session")
def serve_stages(run_stages) -> Callable[[PipelineSettings], Release]:
    """`serve_stages(settings)`: the same and the indexes, served as release `r1`, `r2` …: no evaluation, no report."""

    def run(settings: PipelineSettings) -> Release:
        plan, _, published = run_stages(settings)
        history = Releases(Location(settings.store))
        earlier = history.all()
        name = f"r{len(earlier) + 1}"
        indexes = {
            mode: index_mode(Location(settings.store), name, mode, published.features, IndexSettings(), None)
            for mode in plan.modes
        }
        release = Release(
            release=name,
            number=len(earlier) + 1,
            created=datetime.now(UTC),
            content="0" * 32,
            source=settings.source,
            features_version=published.features.version,
            quarantine_version=published.quarantine.version if published.quarantine.exists else None,
            models=dict(plan.models),
            indexes=indexes,
            data=published.data,
            gate=GateDecision(promoted=True, reason=""),
            gated={},
            gated_name="",
            report=None,
            settings=settings.model_dump(mode="json"),
        )
        history.record(release, earlier)
        return release

    return run


@pytest.fixture(scope="session")
def measured_store(tmp_path_factory, tiny_source, serve_stages, pipeline_of) -> str:
    """A store of the tiny source with one release, `r1`, and its evaluation. Shared: copy it before you change it."""
    settings = pipeline_of(tiny_source, tmp_path_factory.mktemp("measured") / "store")
    release, store = serve_stages(settings), Location(settings.store)
    features = features_table(store).snapshot(release.features_version)
    measured = evaluate(store, "r1", features, release.models, settings.evaluation, settings.index)
    document = {"evaluation": json.loads(measured.model_dump_json())}
    (store / f"{report_folder('r1')}/{REPORT_METRICS}").write_bytes(json.dumps(document).encode())
    return settings.store


@pytest.fixture(scope="session")
def pipeline_of(tiny_models: TinyModels) -> Callable[..., PipelineSettings]:
    """`pipeline_of(source, store, **settings)`: both tiny models unless others are given, no bootstrap, mild gate."""

    def make(source: str | Path, store: str | Path, **settings: object) -> PipelineSettings:
        values = {"source": str(source), "store": str(store), "models": tiny_models.by_mode}
        return pipeline(**{**values, "evaluation": {"resamples": 0}, "gate": MILD_GATE, **settings})

    return make


@dataclass(frozen=True)
class Person:
    """Somebody in a source: 14 good rows in one shard; in `part-900` 1 good and 3 bad ones."""

    subject: str
    photograph: str
    source: Path
    secrets: tuple[str, ...]
    rows: int = 15
    quarantined: int = 3


@pytest.fixture(autouse=True)
def _without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports that tests of `tasks` and `flows` make in this process have no plots: half of the time of a small job.

    `tests/reports` checks the plots, and the command line's tests make them.
    """
    here = Path(__file__).parent
    if {here / "tasks", here / "flows"} & set(request.path.parents) and "with_plots" not in request.fixturenames:
        monkeypatch.setattr("reports.html.draw", lambda *_: [])


@pytest.fixture
def with_plots() -> None:
    """A test that names this has its plots drawn."""


@pytest.fixture(scope="session")
def run_pipeline(pipeline_of) -> Callable[..., Outcome]:
    """`run_pipeline(source, store, **settings)` runs the whole job in this process; its reports have no plots."""

    def run(source: str | Path, store: str | Path, *, allow_removal: bool = False, **settings: object) -> Outcome:
        with mock.patch("reports.html.draw", return_value=[]):
            outcome = reprocess(pipeline_of(source, store, **settings), allow_removal=allow_removal)
        if outcome.data.bad_shards:  # as the flow and the command do
            raise CompletedWithBadShardsError(outcome)
        return outcome

    return run


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
