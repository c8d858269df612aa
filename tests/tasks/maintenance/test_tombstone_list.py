"""The list of tombstones: what it is matched with, what proves it, and that no command goes on without it."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frontalis.cli import app
from frontalis.process import Command
from frontalis.store import open_store
from models.checkpoint import load
from schemas.errors import SettingsError, StoreBusyError
from storage.location import Location
from storage.releases import Releases
from storage.tombstones import Tombstones, TombstonesLostError
from tasks.evaluation.released import evaluate_release
from tasks.maintenance.anchor import move_anchor
from tasks.maintenance.erase import erase
from tasks.maintenance.forget import forget_all, list_tombstones, undo
from tasks.maintenance.forgotten_rows import find_matches
from tasks.maintenance.rollback import roll_back
from tasks.maintenance.targets import Target, read_targets
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check
from tasks.query import answer
from tasks.reprocess import reprocess
from tests.commands import frontalis

ZOE = "Zo\u00eb Quist"
ROWS, DIM = 8, 32


@pytest.fixture(scope="module")
def original(serve_stages, pipeline_of, tmp_path_factory) -> Path:
    """A store with integer ids 0 to 7 and three subjects, served; its source is beside it."""
    folder = tmp_path_factory.mktemp("list")
    (folder / "source").mkdir()
    rows = {
        "id": list(range(ROWS)),
        "embedding": [[float((row * 7 + at * 3) % 11 - 5.5) for at in range(DIM)] for row in range(ROWS)],
        "subject": [ZOE, f" {ZOE} ", "Zoe\u0308 Quist", "ada", "ADA", "eve", "eve", None],
    }
    pq.write_table(pa.table(rows), folder / "source" / "part.parquet")
    serve_stages(pipeline_of(folder / "source", folder / "store"))
    return folder


@pytest.fixture
def store(original: Path, tmp_path: Path) -> str:
    shutil.copytree(original / "store", tmp_path / "store")
    return str(tmp_path / "store")


def in_advance(store: str, *names: str) -> None:
    for name in names:
        forget_all(store, [Target("subject", name)], in_advance=True)


def found(store: str, *targets: Target) -> tuple[int, list[str]]:
    looked = forget_all(store, list(targets), dry_run=True)
    return looked.rows, looked.erased_releases


def test_every_spelling_of_a_name_finds_all_of_its_rows(store: str) -> None:
    for name in (ZOE, "Zoe\u0308 Quist", f"\t{ZOE}"):
        assert found(store, Target("subject", name)) == (3, ["r1"])
    assert found(store, Target("subject", "ada")) == (1, ["r1"])
    assert found(store, Target("subject", "Ada", ignore_case=True)) == (2, ["r1"])
    assert found(store, Target("subject", "eve"), Target("id", "5"), Target("id", "7")) == (3, ["r1"])
    assert not (Path(store) / "tombstones.json").exists()


@pytest.mark.parametrize("typed", ["007", "+5", " 6", "6.0", "six"])
def test_an_id_that_is_no_integer_is_refused_and_leaves_nothing(store: str, typed: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="forget --id: the ids of this store are integers of 64 bits"):
        forget_all(store, [Target("id", typed)], in_advance=True)
    (tmp_path / "list").write_text('{"id": 6}\n' + json.dumps({"id": typed}))
    with pytest.raises(SettingsError, match="list, line 2: the ids of this store are integers"):
        forget_all(store, read_targets(str(tmp_path / "list")), in_advance=True)
    assert not (Path(store) / "tombstones.json").exists()


def test_a_target_without_a_row_is_refused_and_leaves_nothing(store: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--subject: no row matches, so NOBODY.*--ignore-case.* 2 rows"):
        forget_all(store, [Target("subject", "EVE")])
    with pytest.raises(SettingsError, match=r"--id: no row matches, so NOBODY .*--in-advance"):
        forget_all(store, [Target("id", "8")])
    (tmp_path / "list").write_text('{"subject": "eve"}\n{"id": 99}\n\n{"subject": "nobody"}')
    with pytest.raises(SettingsError, match=r"list: 2 of 3 match no row \(lines 2, 4\), so NOBODY"):
        forget_all(store, read_targets(str(tmp_path / "list")))
    assert not (Path(store) / "tombstones.json").exists()
    done = forget_all(store, [Target("id", "8")], in_advance=True)
    assert (done.rows, done.unmatched) == (0, 1)
    assert forget_all(store, [Target("id", "8")]).unmatched == 0, "already forgotten: applied again"


def test_marks_of_earlier_builds_match_names_as_they_were_typed(store: str) -> None:
    tombstones = Tombstones(Location(store))
    marks = sorted([tombstones.mark("subject", f" {ZOE} "), tombstones.mark("id", "5")])
    (Path(store) / "tombstones.json").write_text(json.dumps({"salt": tombstones.salt, "marks": marks}))
    old = Tombstones(Location(store))
    rows, hits = old.match(pa.array([1, 5, 6]), pa.array([f" {ZOE} ", "x", ZOE]))
    assert (rows.tolist(), hits) == ([True, True, False], marks)
    assert [one.kind for one in list_tombstones(store)] == [None, None]
    in_advance(store, "nobody")
    assert [one.mark for one in list_tombstones(store)][:2] == marks


COMMANDS: dict[str, Callable[[str], object]] = {
    "query": lambda store: answer(store, "raw", ids=["3"]),
    "open_store": open_store,
    "evaluate": evaluate_release,
    "forget": lambda store: forget_all(store, [Target("id", "3")]),
    "list": list_tombstones,
    "undo": lambda store: undo(store, "0" * 32),
    "rollback": lambda store: roll_back(store, "r1"),
    "vacuum": clean,
}
LOSSES: dict[str, tuple[Callable[[Path, list[str]], object], str]] = {
    "missing": (lambda file, _: file.unlink(), "is missing or empty, but"),
    "older": (lambda file, old: file.write_text(old[0]), "has 1 entries, but .* proves 2"),
    "shorter": (lambda file, old: file.write_text(shortened(old[1])), "has 1 entries, but .* proves 2"),
    "of another": (lambda file, old: file.write_text(altered(old[1])), "does not begin with the 2 entries that"),
    "damaged": (lambda file, _: file.write_text("{"), "is damaged"),
}


def shortened(content: str) -> str:
    found = json.loads(content)
    return json.dumps({**found, "entries": found["entries"][1:]})


def altered(content: str) -> str:
    return content.replace(json.loads(content)["entries"][0]["mark"], "f" * 32)


@pytest.mark.parametrize("proof", ["releases", "log", "both"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_list_that_has_lost_entries_is_refused_by_every_command(
    store: str, original: Path, pipeline_of, loss: str, proof: str
) -> None:
    file, log = Path(store) / "tombstones.json", Path(store) / "forgotten.jsonl"
    history = Releases(Location(store))
    before, contents = history.all(), []
    for name in ("first", "second"):
        in_advance(store, name)
        contents.append(file.read_text())
    if proof == "releases":
        log.unlink()
    elif proof == "log":
        history.rewrite(before, history.all())
    commands = {**COMMANDS, "reprocess": lambda store: reprocess(pipeline_of(original / "source", store))}
    lose, says = LOSSES[loss]
    lose(file, contents)
    state = file.read_bytes() if file.exists() else None
    for command in commands.values():
        with pytest.raises(TombstonesLostError, match=f"{says}.*restore the newest copy of this file from a backup"):
            command(store)
    [problem] = [one for one in check(store).problems if one.thing == "tombstones.json"]
    assert "restore the newest copy of it from a backup" in problem.remedy
    assert "frontalis forget --new-list --from FILE" in problem.remedy
    assert (file.read_bytes() if file.exists() else None) == state
    file.write_text(contents[1])
    assert answer(store, "raw", ids=["3"]).release == "r1"
    assert [one.thing for one in check(store).problems if one.thing == "tombstones.json"] == []


def test_a_damaged_log_is_refused(store: str) -> None:
    in_advance(store, "first")
    (Path(store) / "forgotten.jsonl").write_text('{"time": ')
    with pytest.raises(Exception, match=r"forgotten\.jsonl: is damaged"):
        answer(store, "raw", ids=["3"])
    assert "forgotten.jsonl" in [one.thing for one in check(store).problems]


def test_stores_of_earlier_builds_prove_that_there_was_a_list(store: str) -> None:
    history = Releases(Location(store))
    before = history.all()
    history.rewrite([old.replaced(tombstones="abcdef012345") for old in before], before)
    with pytest.raises(TombstonesLostError, match="is missing or empty, but release r1 proves"):
        answer(store, "raw", ids=["3"])
    history.rewrite(before, history.all())
    (Path(store) / "forgotten.jsonl").write_text('{"time": "2026-01-01T00:00:00+00:00", "kind": "id", "rows": 1}\n')
    with pytest.raises(TombstonesLostError, match=r"forgotten\.jsonl, line 1, proves"):
        answer(store, "raw", ids=["3"])


def test_a_lost_list_without_a_backup_is_started_again(store: str, tmp_path: Path) -> None:
    in_advance(store, "first", "second")
    (Path(store) / "tombstones.json").unlink()
    (tmp_path / "list").write_text('{"subject": "first"}')
    forget_all(store, read_targets(str(tmp_path / "list")), new_list=True)
    assert answer(store, "raw", ids=["3"]).release == "r1"
    assert len(list_tombstones(store)) == 1
    assert [one.thing for one in check(store).problems if one.thing == "tombstones.json"] == []
    lines = [json.loads(line) for line in (Path(store) / "forgotten.jsonl").read_text().splitlines()]
    assert [(line["action"], line["tombstones"]) for line in lines] == [("forget", 1), ("forget", 2), ("new_list", 1)]


def test_a_tombstone_is_lifted_from_the_next_run_on(store: str, original: Path, run_stages, pipeline_of) -> None:
    """And what was lifted stays provable: the list without that entry is refused, too."""
    settings = pipeline_of(original / "source", store)
    tombstones = Tombstones(Location(store))
    tombstones.add([tombstones.tombstone("subject", "eve", 2), tombstones.tombstone("id", "0", 1)])
    assert run_stages(settings).published.data.forgotten == 3
    before = (Path(store) / "tombstones.json").read_text()
    eve = list_tombstones(store)[0]
    for wrong in ("f" * 32, eve.mark[:7], ""):
        with pytest.raises(SettingsError, match="0 tombstones have this hash"):
            undo(store, wrong)
    assert undo(store, eve.mark[:8]) == eve
    assert [one.kind for one in list_tombstones(store)] == ["id"]
    assert run_stages(settings).published.data.forgotten == 1
    [line] = [json.loads(line) for line in (Path(store) / "forgotten.jsonl").read_text().splitlines()]
    assert (line["action"], line["tombstones"]) == ("undo", 3)
    (Path(store) / "tombstones.json").write_text(before)
    with pytest.raises(TombstonesLostError, match="has 2 entries, but"):
        list_tombstones(store)


def test_of_two_erasures_at_once_the_one_that_was_overwritten_is_repeated(store: str, monkeypatch) -> None:
    """Object storage has no lock: the list of the other one took the place of ours."""
    other = Tombstones(Location(store))
    in_advance(store, "first")

    def slow(*words: object) -> object:
        other.add([other.tombstone("subject", "other")])
        return erase(*words)

    def late(*words: object) -> object:
        other.add([other.tombstone("subject", "other")])
        return find_matches(*words)

    before = (Path(store) / "tombstones.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("tasks.maintenance.forget.find_matches", late)
        with pytest.raises(StoreBusyError, match="at the same time; run this again"):
            in_advance(store, "second")
    (Path(store) / "tombstones.json").write_bytes(before)
    monkeypatch.setattr("tasks.maintenance.forget.erase", slow)
    with pytest.raises(StoreBusyError, match="another run forgot somebody at the same time; run this again"):
        in_advance(store, "second")
    assert len((Path(store) / "forgotten.jsonl").read_text().splitlines()) == 1


def test_hashes_of_a_training_subject_go_with_the_last_release_that_needs_the_model(
    original: Path, tmp_path: Path, serve_stages, pipeline_of, tiny_models, make_checkpoint
) -> None:
    seen = next(
        name for name in (f"subject-{n:06d}" for n in range(9)) if load(tiny_models.per_sample).has_seen([name])
    )
    rows = pq.read_table(original / "source" / "part.parquet").to_pydict()
    rows["subject"][0] = seen
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "source" / "part.parquet")
    store = str(tmp_path / "store")
    first = serve_stages(pipeline_of(tmp_path / "source", store))
    looked = forget_all(store, [Target("subject", seen.upper(), ignore_case=True)], dry_run=True)
    assert looked.checkpoints == sorted(model.path for model in first.models.values())
    assert forget_all(store, [Target("subject", "eve")], dry_run=True).checkpoints == []

    other = make_checkpoint(tmp_path / "other.safetensors", seed=1)
    second = serve_stages(pipeline_of(tmp_path / "source", store, models={"per_sample": str(other)}))
    assert clean(store, keep=1, dry_run=True).removed_releases == [first.release]
    move_anchor(store, second.release)
    clean(store, keep=1)
    left = [f"models/{file.name}" for file in (Path(store) / "models").iterdir()]
    assert left == [second.models["per_sample"].path]
    assert forget_all(store, [Target("subject", seen)], dry_run=True).checkpoints == left


@pytest.mark.e2e
def test_refusals_on_the_command_line(store: str) -> None:
    def refused(*words: str) -> str:
        done = frontalis(*words, "--store", store)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
        return done.stderr

    assert "write the decimal digits" in refused("forget", "--id", "007")
    assert "NOBODY was forgotten" in refused("forget", "--subject", "nobody")
    in_advance(store, "nobody")
    (Path(store) / "tombstones.json").unlink()
    assert "restore the newest copy" in refused("query", "--id", "3", "--mode", "raw")


def test_what_the_command_prints(store: str, monkeypatch, capsys) -> None:
    def shell(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["frontalis", "forget", *words, "--store", store])
        assert not app(standalone_mode=False, obj=Command())
        return capsys.readouterr().out

    assert "nobody is forgotten" in shell("--list")
    said = shell("--subject", "ada", "--ignore-case", "--dry-run")
    assert "2 rows with features, in 1 shard" in said
    assert "shards     part" in said
    assert "erased     r1: could no longer be served" in said
    assert "nothing was changed" in said
    assert "1 target: later rows are kept out" in shell("--subject", "nobody", "--in-advance")
    [listed] = json.loads(shell("--list", "--json"))["tombstones"]
    assert (listed["kind"], listed["rows"]) == ("subject", 0)
    assert listed["mark"] in shell("--list")
    assert "lifted" in shell("--undo", listed["mark"])
    assert json.loads(shell("--list", "--json"))["tombstones"] == []
