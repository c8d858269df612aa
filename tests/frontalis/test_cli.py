"""The command line, typed as a person types it: the whole job on small shards, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

import frontalis as package
from frontalis.cli import app
from frontalis.process import Command
from schemas.errors import FrontalisError
from schemas.settings import load_pipeline
from storage.location import Location
from storage.releases import Releases
from tests.commands import frontalis

NAMED_PIPE = "is a named pipe, not a regular file"
pytestmark = pytest.mark.timeout(600)  # the whole job takes minutes on a busy machine


@dataclass(frozen=True)
class Done:
    """A finished command: what it printed, or its refusal."""

    stdout: str
    stderr: str


Shell = Callable[..., Done]


@pytest.fixture(scope="module")
def shell() -> Shell:
    """`shell(*words, code=0)` types `frontalis …` in this process. How a process ends is shown in `test_process.py`."""

    def run(*words: object, code: int = 0) -> Done:
        done = CliRunner().invoke(app, [str(word) for word in words], obj=Command())
        refusal = done.exception if isinstance(done.exception, FrontalisError) else None
        if refusal is None and done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert (refusal.exit_code if refusal else done.exit_code) == code, f"{words}: {done.output}{refusal}"
        return Done(done.stdout, f"{done.stderr}{refusal or ''}")

    return run


def in_a_process(*words: object) -> Done:
    """Run `frontalis …` as a process of its own that finds no Prefect server."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = frontalis(*words, env=env)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return Done(done.stdout, done.stderr)


@pytest.fixture(scope="module")
def job(shell, tmp_path_factory) -> Path:
    """The whole job, once: shards, two trained models, one release. Returns the folder that holds them."""
    folder = tmp_path_factory.mktemp("job")
    shell(
        "synth", folder / "shards", "--subjects", 60, "--per-subject", 14, "--dim", 32, "--shards", 3, "--bad-rows", 6
    )
    for mode in ("per_sample", "batch_stat"):
        trained = shell(
            "train",
            folder / "shards",
            "--mode",
            mode,
            "--out",
            folder / f"{mode}.safetensors",
            "--steps",
            20,
            "--skip-bad-rows",
            "--json",
        )
        (folder / "trained.json").write_text(trained.stdout)
        card = json.loads(trained.stdout)["card"]
        assert card["mode"] == mode
        assert card["embedding_dim"] == 32
        assert (folder / f"{mode}.safetensors.md").read_text().startswith("# ")
    done = reprocess(in_a_process, folder, "--json")
    (folder / "outcome.json").write_text(done.stdout)
    outcome = json.loads(done.stdout)
    assert outcome["status"] == "promoted"
    assert outcome["shards_computed"] == 3
    data = outcome["data"]
    assert data["rows_read"] == data["rows_features"] + sum(data["quarantined"].values())
    assert sum(data["quarantined"].values()) > 0
    return folder


def reprocess(shell: Shell, folder: Path, *more: object) -> Done:
    models = [f"--model={mode}={folder}/{mode}.safetensors" for mode in ("per_sample", "batch_stat")]
    return shell("reprocess", "--source", folder / "shards", "--store", folder / "store", *models, *more)


def test_second_run_does_no_work_and_says_so(shell, job) -> None:
    done = reprocess(shell, job)
    assert "nothing changed since r00001" in done.stdout
    assert "0 computed" in done.stdout


def test_features_are_readable_by_polars_and_complete(job) -> None:
    counts = pl.scan_delta(str(job / "store" / "features")).group_by("mode").len().collect()
    assert set(counts["mode"]) == {"raw", "per_sample", "batch_stat"}
    assert counts["len"].n_unique() == 1


def test_evaluate_prints_one_document(shell, job) -> None:
    result = json.loads(shell("evaluate", "--store", job / "store", "--resamples", 50, "--json").stdout)
    held_out = result["populations"]["held_out"]
    assert set(held_out["modes"]) == {"raw", "per_sample", "batch_stat"}
    assert held_out["left_out_subjects"] > 0
    table = shell("evaluate", "--store", job / "store", "--resamples", 50).stdout
    for words in ("frontal–profile", "per_sample", "batch_stat", "held-out subjects"):
        assert words in table


def test_query_by_id_and_by_vectors_agree(shell, job) -> None:
    rows = pl.read_parquet(job / "shards" / "*.parquet").filter(pl.col("subject").is_not_null())
    row = rows.filter(pl.col("id") == "000003-002")
    by_id = query(shell, job, "--id", "000003-002", "--include-self")
    np.save(job / "query.npy", row["embedding"].to_numpy())
    by_vector = query(shell, job, "--vectors", job / "query.npy")
    assert [one["id"] for one in by_id] == [one["id"] for one in by_vector]
    assert by_id[0]["id"] == "000003-002"
    np.testing.assert_allclose([one["score"] for one in by_id], [one["score"] for one in by_vector], atol=1e-5)
    without_self = query(shell, job, "--id", "000003-002")
    assert [one["id"] for one in without_self[:4]] == [one["id"] for one in by_id[1:]]


def query(shell, job: Path, *words: object) -> list[dict[str, object]]:
    done = shell("query", "--store", job / "store", "--mode", "per_sample", *words, "-k", 5, "--json")
    return json.loads(done.stdout)["results"][0]["neighbours"]


def test_releases_and_rollback(shell, job) -> None:
    (release,) = json.loads(shell("releases", "--store", job / "store", "--json").stdout)["releases"]
    assert release["serving"]
    assert "served" in shell("releases", "--store", job / "store").stdout
    done = shell("rollback", "--store", job / "store", release["release"])
    assert "is served now" in done.stdout
    served = json.loads(shell("rollback", "--store", job / "store", release["release"], "--json").stdout)
    assert served == {"schema_version": 1, **release}
    assert "is not in" in shell("rollback", "--store", job / "store", "r00099-nothing", code=2).stderr


def test_explain_writes_plots_and_tables(shell, job, tmp_path) -> None:
    done = shell(
        "explain", "--model", job / "per_sample.safetensors", "--source", job / "shards", "--out", tmp_path, "-k", 10
    )
    assert "identity branch" in done.stdout
    names = {file.name for file in tmp_path.iterdir()}
    assert {"channels.csv", "explanation.json", "weights-per_sample-identity.png"} <= names
    table = pl.read_csv(tmp_path / "channels.csv")
    assert table.height == 32


def test_columns_of_other_names_are_named_to_every_command_that_reads_shards(shell, job, tmp_path) -> None:
    (tmp_path / "shards").mkdir()
    for file in (job / "shards").glob("*.parquet"):
        renamed = pl.read_parquet(file).rename({"subject": "person", "embedding": "vector"})
        renamed.write_parquet(tmp_path / "shards" / file.name)
    named = ["--column", "subject=person", "--column", "embedding=vector"]
    model = tmp_path / "model.safetensors"
    source = tmp_path / "shards"
    refusal = shell("train", source, "--out", model, "--steps", 2, *named[2:], code=2).stderr
    assert "has no column 'subject', so there are no genuine pairs; name it with --column subject=NAME" in refusal
    shell("train", source, "--out", model, "--steps", 2, "--skip-bad-rows", *named)
    shell("explain", "--model", model, "--source", source, "--out", tmp_path / "out", *named)
    assert pl.read_csv(tmp_path / "out/channels.csv")["identity relatedness"].null_count() == 0
    shell("reprocess", "--source", source, "--store", tmp_path / "store", "--model", f"per_sample={model}", *named)
    features = pl.scan_delta(str(tmp_path / "store/features")).select("subject").collect()
    assert features["subject"].n_unique() > 1


def test_report_is_written(job) -> None:
    (page,) = (job / "store" / "reports").glob("*/index.html")
    assert "frontal–profile" in page.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["query", "--store", "{store}", "--id", "nobody"], "--id 'nobody': is not in release"),
        (["query", "--store", "{store}"], "pass either --id or --vectors"),
        (["query", "--store", "{store}", "--id", "x", "-k", "0"], "-k 0: must be 1 to"),
        (["query", "--store", "{tmp}/none", "--id", "x"], "/none: does not exist; check the path"),
        (["query", "--store", "{tmp}", "--id", "x"], "holds no releases, so it is no store; check the path"),
        (["evaluate", "--store", "{tmp}"], "holds no releases, so it is no store; check the path"),
        (["releases", "--store", "{tmp}"], "holds no releases, so it is no store; check the path"),
        (["rollback", "--store", "{tmp}", "r1"], "holds no releases, so it is no store; check the path"),
        (["forget", "--store", "{tmp}", "--id", "x"], "holds no releases, so it is no store; check the path"),
        (["vacuum", "--store", "{tmp}"], "holds no releases, so it is no store; check the path"),
        (["verify", "--store", "{tmp}"], "holds no releases, so it is no store; check the path"),
        (["train", "{tmp}/none", "--out", "{tmp}/x.safetensors"], "does not exist"),
        (["reprocess", "--store", "{store}"], "--source is missing"),
        (["reprocess", "--config", "{tmp}/none.toml"], "cannot be read"),
        (["reprocess", "--source", "{tmp}", "--store", "{store}", "--model", "per_sample"], "write mode=FILE"),
        (["explain", "--model", "m", "--out", "{tmp}", "--column", "person=subject"], "person is no role; use id, emb"),
        (["train", "{store}", "--out", "{tmp}/x.pt"], "x.pt: must end in .safetensors"),
        (["train", "{tmp}", "--out", "{tmp}/x", "--column", "subject"], "--column subject: write ROLE=NAME"),
        (["train", "{tmp}", "--out", "{tmp}/x", "--column", "id=a", "--column", "id=b"], "id is given twice"),
        (["evaluate", "--store", "{store}", "--pairs", "{tmp}/none.parquet"], "there is no such file"),
        (["rollback", "--store", "ftp://x/y", "r1"], "scheme 'ftp' is not supported"),
        (["query", "--store", "{store}", "--vectors", "{tmp}/pipe.npy"], NAMED_PIPE),
        (["evaluate", "--store", "{store}", "--pairs", "{tmp}/pipe.npy"], NAMED_PIPE),
        (["reprocess", "--config", "{tmp}/pipe.npy"], NAMED_PIPE),
        (["explain", "--model", "{tmp}/pipe.npy", "--out", "{tmp}"], NAMED_PIPE),
        (["forget", "--store", "{store}", "--from", "{tmp}/pipe.npy"], NAMED_PIPE),
        (["reprocess", "--config", "/dev/zero"], "is a device, not a regular file"),
    ],
)
def test_refusals_name_the_thing_and_the_way_out(job, tmp_path, capsys, words, message) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    filled = [word.format(store=job / "store", tmp=tmp_path) for word in words]
    with pytest.raises(FrontalisError) as refused:
        app(filled, standalone_mode=False, obj=Command())
    assert refused.value.exit_code == 2
    assert message in str(refused.value)
    assert capsys.readouterr().out == ""


def test_unknown_options_and_choices_are_refused(shell) -> None:
    assert "No such option" in shell("releases", "--stor", "x", code=2).stderr
    assert (
        "is not one of 'per_sample', 'batch_stat'" in shell("train", "x", "--mode", "best", "--out", "y", code=2).stderr
    )
    assert "is not one of 'row', 'subject'" in shell("query", "--store", "x", "--by", "pose", code=2).stderr


def test_version_help_and_completion(shell) -> None:
    assert shell("--version").stdout == f"frontalis {package.__version__}\n"
    assert shell("query", "-h").stdout == shell("query", "--help").stdout
    assert "--install-completion" in shell("-h").stdout


def test_documents_are_as_their_schemas_say(shell, job) -> None:
    store = ("--store", job / "store")
    schemas = json.loads(shell("schema").stdout)
    release = json.loads((job / "outcome.json").read_text())["release"]
    typed = {
        "releases": ["releases", *store],
        "evaluate": ["evaluate", *store, "--resamples", 5],
        "query": ["query", *store, "--id", "000003-002"],
        "query --compare": ["query", *store, "--id", "000003-002", "--compare"],
        "forget": ["forget", *store, "--id", "000003-002", "--dry-run"],
        "forget --list": ["forget", *store, "--list"],
        "vacuum": ["vacuum", *store, "--dry-run"],
        "verify": ["verify", *store],
        "status": ["status", *store],
        "compare": ["compare", *store, release, release],
        "explain": ["explain", "--model", job / "batch_stat.safetensors", "--out", job / "explained"],
    }
    for name, words in typed.items():
        document = json.loads(shell(*words, "--json").stdout)
        Draft202012Validator.check_schema(schemas[name])
        Draft202012Validator(schemas[name]).validate(document)
        assert document["schema_version"] == schemas[name]["properties"]["schema_version"]["const"] == 1
    Draft202012Validator(schemas["train"]).validate(json.loads((job / "trained.json").read_text()))
    Draft202012Validator(schemas["reprocess"]).validate(json.loads((job / "outcome.json").read_text()))
    assert json.loads(shell("schema", "train").stdout) == schemas["train"]
    assert "prints no JSON; use one of train, reprocess" in shell("schema", "synth", code=2).stderr


def test_status_says_what_to_do(shell, job, tmp_path) -> None:
    done = shell("status", "--store", job / "store")
    assert "to do      nothing" in done.stdout
    late = json.loads(shell("status", "--store", job / "store", "--max-age", 0, "--json", code=1).stdout)
    assert "h old, more than 0: look at the last runs" in late["to_do"][0]
    assert late["rows"] == json.loads((job / "outcome.json").read_text())["data"]["rows_features"]
    files = sum(file.stat().st_size for file in (job / "store").rglob("*") if file.is_file())
    assert sum(late["bytes"].values()) == files
    copy = tmp_path / "store"
    shutil.copytree(job / "store", copy)
    history = Releases(Location(str(copy)))
    (release,) = history.all()
    history.rewrite([release.as_erased()], [release])
    to_do = json.loads(shell("status", "--store", copy, "--json", code=1).stdout)["to_do"]
    assert any(line.startswith("nothing is served") for line in to_do)
    assert any("still hold somebody who was forgotten" in line for line in to_do)


def test_releases_are_compared(shell, job) -> None:
    outcome = json.loads((job / "outcome.json").read_text())
    words = ("compare", "--store", job / "store", outcome["release"], outcome["release"])
    found = json.loads(shell(*words, "--json").stdout)
    (eer,) = (
        one
        for one in found["rates"]
        if (one["cell"], one["mode"], one["metric"]) == ("frontal-profile", "per_sample", "eer")
    )
    assert eer["first"] == eer["second"] == outcome["gated"]["per_sample"]["value"]
    assert eer["difference"]["value"] == 0
    assert (found["models_changed"], found["paired"]) == ([], False)
    assert "differences have no interval" in shell(*words).stdout
    assert "is not in" in shell(*words[:-1], "r00009-none", code=2).stderr


def test_init_writes_what_a_schedule_needs(shell, tmp_path) -> None:
    printed = shell("init", tmp_path / "new", "--source", tmp_path / "shards", "--store", "s3://bucket/store").stdout
    assert f"wrote      {tmp_path}/new/prefect.yaml" in printed
    settings = load_pipeline(str(tmp_path / "new" / "pipeline.toml"))
    assert (settings.source, settings.store) == (str(tmp_path / "shards"), "s3://bucket/store")
    (nightly,) = (
        one
        for one in yaml.safe_load((tmp_path / "new" / "prefect.yaml").read_text())["deployments"]
        if one["name"] == "nightly"
    )
    assert nightly["parameters"]["config"] == str(tmp_path / "new" / "pipeline.toml")
    assert "exists already" in shell("init", tmp_path / "new", code=2).stderr


def test_a_refused_first_run_leaves_no_store(shell, tmp_path) -> None:
    source, store = tmp_path / "shards", tmp_path / "new" / "store"
    source.mkdir()
    shell("reprocess", "--source", source, "--store", store, "--model", f"per_sample={tmp_path}/none", code=2)
    assert not store.exists()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".lock").touch()
    assert "no run has made a release yet" in shell("releases", "--store", tmp_path / "killed", code=2).stderr


def test_public_names() -> None:
    assert sorted(package.__all__) == ["DualBranchSENet", "SEBlock", "Store", "open_store"]
    assert all(hasattr(package, name) for name in package.__all__)
