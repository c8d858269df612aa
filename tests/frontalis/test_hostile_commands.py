"""Seeded fuzzing of the command line: hostile options, settings files and small files.

Every command ends with a documented exit code, without a traceback, and soon. Commands run in this process with the
error handling of `frontalis.process`. Those that start a flow stop where Prefect would begin, after they have read and
checked all that they were given. `FRONTALIS_FUZZED` is the number of commands (100), `make torture` runs more.
"""

import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frontalis import cli, process
from frontalis.process import Command
from schemas.errors import ExitCode, SettingsError
from schemas.index import IndexSettings
from schemas.releases import Release
from schemas.reports import GateDecision
from schemas.settings import EvaluationSettings, PipelineSettings, TrainingSettings, checked
from storage.location import Location
from storage.releases import Releases
from storage.shards import refuse_nested
from tasks.evaluation.pairs import read_pairs
from tasks.index import index_mode
from tasks.plan import make_plan, prepare_models
from tasks.training.rows import read_training_rows

COMMANDS = int(os.environ.get("FRONTALIS_FUZZED", "100"))
SEED = int(os.environ.get("FRONTALIS_FUZZ_SEED", "0"))
SECONDS = 30.0  # for one command on a busy machine; most take milliseconds

TEMPLATES = [
    "reprocess --config pipeline.toml",
    "reprocess --config pipeline.toml --wait 1 --workers 2 --keep-columns note --column subject=subject",
    "reprocess --source source --store new --model per_sample=model.safetensors --pairs pairs.parquet",
    "query --store store --mode raw --vectors q.npy -k 3 --json",
    "query --store store --mode per_sample --vectors q.parquet -k 3",
    "query --store store --mode raw --id a-1 --id a-2 --include-self --json",
    "explain --model model.safetensors --source source --out out -k 4 --json",
    "train source --out new.safetensors --steps 2 --seed 1 --validation 0.2 --test 0.2 --column id=id",
    "evaluate --store store --pairs pairs.parquet --resamples 10",
    "synth made --subjects 2 --per-subject 2 --dim 8 --shards 1 --seed 1 --bad-rows 1",
    "forget --store store --from list.jsonl --wait 0",
    "forget --store store --id nobody",
    "vacuum --store store --keep 2 --grace-hours 1 --wait 0 --dry-run --json",
    "rollback --store store r1",
    "releases --store store --json",
    "verify --store store",
]
FILES = ["pipeline.toml", "q.npy", "q.parquet", "pairs.parquet", "model.safetensors", "list.jsonl", "source/a.parquet"]
VALUES = [
    "", " ", "-1", "0", "1", "-0.0", "nan", "-nan", "inf", "-inf", "1e400", "1e-400", "0x10", "1_0", str(10**30),
    str(-(10**30)), str(2**31), str(2**63), "9" * 5000, "1.5", "é", "\u202e", "٣", "a\nb", "\x1b[31m", "x" * 5000,
    "~", "~nobody/x", ".", "..", "/dev/null", "/dev/zero", "/dev/full", "pipe", "source", "missing", "a/b/c",
    "ftp://x", "file://", "://", "%s", "{}", "-", "--", "=", "a=b", "per_sample=", "=x", "per_sample=missing", "raw",
    "batch_stat", "id=", "True", "None", "--json", "--store", "--config", "-k", "--help", "--quiet", "\udcff",
]  # fmt: skip
SETTINGS = [
    "nan", "-inf", str(10**30), "-1", "0", "1.5", "''", "'x'", "true", "[]", "{}", "[1, 'a', []]", "1979-05-27",
    "'''", "[" * 500, "{a={a={a=1}}}", "9" * 5000, "'\\u0000'", "'" + "x" * 5000 + "'", "'/dev/zero'", "'pipe'",
    "'s3'", "\udcff",
]  # fmt: skip
KEYS = [
    "wait", "source", "store", "models", "models.raw", "models.per_sample", "columns.id", "columns.keep",
    "columns.embedding", "reweight.batch_size", "reweight.group_rows", "index.factory", "index.nprobe",
    "index.memory_budget_gb", "evaluation.fmrs", "evaluation.resamples", "evaluation.max_rows", "evaluation.pairs",
    "evaluation.frontal_yaw", "gate.guards", "gate.tolerance", "gate.metric", "gate.cell", "runner.workers",
    "runner.kind", "runner.address", "unknown",
]  # fmt: skip


def test_no_command_ends_with_a_traceback(workplace: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(cli, "run_flow", _until_prefect_begins)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    random_, codes, problems = random.Random(SEED), set(), []
    for number in range(COMMANDS):
        folder = tmp_path / f"w{number}"
        shutil.copytree(workplace, folder)
        os.mkfifo(folder / "pipe")
        monkeypatch.chdir(folder)
        words = hostile_words(random_)
        damaged = [_damage(folder / name, random_) for name in random_.sample(FILES, random_.choice([0, 1, 1, 2]))]
        shown = f"command {number} of seed {SEED}: frontalis {' '.join(words)!r}, damaged: {damaged}"
        monkeypatch.setattr(sys, "argv", ["frontalis", *words])
        started = time.monotonic()
        try:
            code = process._run(cli.app, Command())
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code = traceback.format_exc()
        seconds = time.monotonic() - started
        if code not in set(ExitCode) or seconds > SECONDS or "Traceback" in capfd.readouterr().err:
            problems.append(f"{shown}: {code}, {seconds:.1f} s")
        codes.add(code)
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    assert not problems, "\n".join(problems)
    assert {0, 2} <= codes


def hostile_words(random_: random.Random) -> list[str]:
    """Return a command line of which some words were replaced, dropped, repeated or added."""
    words = random_.choice(TEMPLATES).split()
    for _ in range(random_.choice([0, 1, 1, 1, 2, 3])):
        at = random_.randrange(1, len(words) + 1)
        change = random_.choice(["replace", "replace", "replace", "drop", "repeat", "add"])
        if change == "add" or at == len(words):
            words.insert(at, random_.choice(VALUES))
        elif change == "replace":
            words[at] = random_.choice(VALUES)
        elif change == "drop":
            del words[at]
        else:
            words.insert(at, words[at])
    return words


def _damage(file: Path, random_: random.Random) -> str:
    """Change bytes of a file, or put something else in its place."""
    if file.suffix == ".toml" and random_.random() < 0.7:
        section, _, key = random_.choice(KEYS).rpartition(".")
        line = f"{key} = {random_.choice(SETTINGS)}\n"
        text = file.read_text()
        text = line + text if not section else f"{text}\n[{section}]\n{line}"
        file.write_bytes(text.encode(errors="surrogateescape"))
        return f"{file.name} {section} {line[:80]}"
    content = bytearray(file.read_bytes())
    kind = random_.choice(["flip", "flip", "flip", "cut", "insert", "shorten", "empty", "pipe", "folder", "missing"])
    at = random_.randrange(len(content)) if random_.random() < 0.5 else random_.randrange(min(300, len(content)))
    if file.suffix == ".parquet" and random_.random() < 0.6:
        at = len(content) - 1 - random_.randrange(min(900, len(content)))  # the footer
    if kind == "flip":
        for _ in range(random_.randint(1, 4)):
            content[min(at + random_.randrange(8), len(content) - 1)] ^= 1 << random_.randrange(8)
    elif kind == "cut":
        del content[at : at + random_.randint(1, 64)]
    elif kind == "insert":
        content[at:at] = random_.randbytes(random_.randint(1, 64))
    elif kind in ("shorten", "empty"):
        del content[at if kind == "shorten" else 0 :]
    file.write_bytes(content)
    if kind in ("pipe", "folder", "missing"):
        file.unlink()
        _replacements[kind](file)
    return f"{file.name} {kind} {at}"


_replacements: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "missing": lambda path: None,
}


def _until_prefect_begins(flow: object, **given: object) -> None:
    """Do what a flow does before its first task that computes, and refuse to go further."""
    if isinstance(settings := given.get("settings"), PipelineSettings):
        refuse_nested(Location(settings.source), Location(settings.store))
        if settings.evaluation.pairs:
            read_pairs(settings.evaluation.pairs)
        make_plan(settings, prepare_models(settings))
    elif "sources" in given:
        given = {name: value for name, value in given.items() if value is not None}
        training = checked(TrainingSettings, {**given, "sources": tuple(given["sources"])})
        read_training_rows(training.sources, training.columns, skip_bad_rows=training.skip_bad_rows)
    else:
        history = Releases.of(Location(given["store"]))
        if given["release"]:
            history.servable(given["release"])
        chosen = {name: given[name] for name in ("pairs", "resamples") if given[name] is not None}
        evaluation = checked(EvaluationSettings, chosen)
        if evaluation.pairs:
            read_pairs(evaluation.pairs)
    raise SettingsError("Prefect would begin here.")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, run_stages, pipeline_of, tiny_models) -> Path:
    """A folder with one small file of each kind and a store that serves one release."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "source").mkdir()
    vectors = np.random.default_rng(0).standard_normal((12, 32)).astype(np.float32)
    columns = {
        "id": [f"a-{row}" for row in range(12)],
        "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), 32),
    }
    labels = {
        "subject": [f"s{row // 3}" for row in range(12)],
        "yaw": [float(row) for row in range(12)],
        "note": ["x"] * 12,
    }
    pq.write_table(pa.table(columns | labels), folder / "source" / "a.parquet")
    pq.write_table(pa.table(columns), folder / "q.parquet")
    np.save(folder / "q.npy", vectors)
    pairs = {"protocol": ["p"] * 4, "fold": [0, 0, 1, 1], "id_a": ["a-0"] * 4, "id_b": ["a-1"] * 4, "same": [True] * 4}
    pq.write_table(pa.table(pairs), folder / "pairs.parquet")
    shutil.copy(tiny_models.per_sample, folder / "model.safetensors")
    (folder / "list.jsonl").write_text('{"id": "nobody"}\n{"subject": "no one"}\n')
    (folder / "pipeline.toml").write_text(
        "source = 'source'\nstore = 'new'\nmodels = {per_sample = 'model.safetensors'}\n"
    )
    settings = pipeline_of(folder / "source", folder / "store", evaluation={"resamples": 0})
    plan, _, published = run_stages(settings)
    indexes = {
        mode: index_mode(Location(settings.store), "r1", mode, published.features, IndexSettings(), None)
        for mode in plan.modes
    }
    release = Release(
        release="r1",
        number=1,
        created=datetime.now(UTC),
        content="0" * 32,
        source=settings.source,
        settings=settings.model_dump(mode="json"),
        features_version=published.features.version,
        quarantine_version=None,
        models=dict(plan.models),
        indexes=indexes,
        data=published.data,
        gate=GateDecision(promoted=True, reason=""),
        gated={},
        gated_name="",
        report=None,
    )
    Releases(Location(settings.store)).record(release, [])
    return folder
