"""The command line: results on stdout, progress on stderr.

Options are read here and passed to `flows` or, where a command needs no Prefect, to `tasks`. `frontalis.printing`
prints the results. Commands with a module of their own are in `frontalis.commands`. Heavy libraries are imported by the
command that needs them, so that `--help` and a mistyped option answer at once.
"""

import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frontalis.app import WAIT, AsJson, Details, Store, Wide, a_number, app, command
from frontalis.commands import compare, exchange, init, query, schema, serve, status  # noqa: F401 - register themselves
from frontalis.process import run
from frontalis.server import run_flow, uses_prefect
from schemas.choices import Architecture, Loss, Mode
from schemas.errors import ExitCode, SettingsError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from schemas.settings import PipelineSettings
    from tasks.outcome import Outcome

log = logging.getLogger("frontalis.cli")

ROWS = 1_000_000_000  # of synthetic shards; beyond it a number is a mistake
Wait = Annotated[float, WAIT]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="ROLE=NAME, such as subject=person; repeat for each column.")
]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(run(app))


@command(kept="the shards are not complete; empty the folder, then run the same command again")
def synth(
    out: Annotated[str, typer.Argument(help="Folder for the shards, empty or absent.")],
    subjects: Annotated[int, typer.Option(min=1, max=ROWS)] = 500,
    per_subject: Annotated[int, typer.Option(min=1, max=ROWS)] = 14,
    dim: Annotated[int, typer.Option(min=2, max=65_536)] = 512,
    shards: Annotated[int, typer.Option(min=1, max=100_000)] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    bad_rows: Annotated[int, typer.Option(min=0, max=ROWS, help="Add about this many bad rows of several kinds.")] = 0,
) -> None:
    """Make synthetic shards that behave like measured embeddings."""
    # Blocks are computed side by side; threads of OpenBLAS inside each would wait for one another.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from reports.text import counted
    from tasks.synthetic.shards import synthesize

    made = synthesize(
        out, subjects=subjects, per_subject=per_subject, dim=dim, shards=shards, seed=seed, bad_rows=bad_rows
    )
    people, files = counted(subjects, "subject"), counted(len(made.files), "shard")
    print(f"{counted(made.rows, 'row')} of {people} in {files} under {out}")  # noqa: T201


@command(kept="no checkpoint was written")
def train(
    context: typer.Context,
    sources: Annotated[list[str], typer.Argument(help="Folders of labelled shards.")],
    out: Annotated[str, typer.Option(help="Checkpoint to write (.safetensors); its card goes beside it.")],
    mode: Annotated[Mode, typer.Option(help="How the squeeze statistic is formed.")] = "per_sample",
    augment: Annotated[list[str] | None, typer.Option(help="More views of the same subjects; repeat.")] = None,
    architecture: Annotated[Architecture | None, typer.Option(help="By default dual_branch_ensemble.")] = None,
    loss: Annotated[Loss | None, typer.Option(help="By default global_threshold.")] = None,
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; 360 by default.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of subjects for model selection (0.1).")] = None,
    test: Annotated[float | None, typer.Option(help="Share of subjects for the measurement (0.1).")] = None,
    column: Columns = None,
    skip_bad_rows: Annotated[
        bool,
        typer.Option(
            "--skip-bad-rows", help="Skip rows with non-finite or wrong-length embeddings instead of failing."
        ),
    ] = False,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """Train one checkpoint and measure it on held-out subjects."""
    from schemas.settings import training
    from storage.location import Location

    values: dict[str, Any] = {
        "sources": sources,
        "out": out,
        "mode": mode,
        "augment": augment,
        "architecture": architecture,
        "loss": loss,
        "seed": seed,
        "steps": steps,
        "validation": validation,
        "test": test,
        "columns": _columns(column),
        "skip_bad_rows": skip_bad_rows,
    }
    settings = training(**values)
    if not out.lower().endswith(".safetensors"):
        raise SettingsError(f"--out {out}: must end in .safetensors.")
    log.info("train: %s of %s into %s", mode, ", ".join(sources), out, extra={"stage": "train"})
    from frontalis.printing import print_trained
    from tasks.training.stop import train_until_stopped

    before = Location(out).entry()
    try:
        if uses_prefect():
            from flows.train import train as flow

            trained = run_flow(flow, **values)
        else:
            trained = train_until_stopped(settings)
    finally:
        if Location(out).entry() != before:
            context.obj.kept = f"{out} is the best model so far"
    print_trained(trained, as_json, wide=wide)


@command(kept="complete files are kept; run the same command again to continue")
def reprocess(
    source: Annotated[str | None, typer.Option(help="Folder of shards, or s3://…")] = None,
    store: Annotated[str | None, typer.Option(help="The store: a folder or s3://bucket/prefix.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="MODE=FILE; repeat for each mode.")] = None,
    config: Annotated[str | None, typer.Option(help="pipeline.toml; other options override it.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Parquet of pairs with folds, to measure accuracy on.")] = None,
    keep_columns: Annotated[list[str] | None, typer.Option(help="Further column to pass through; repeat.")] = None,
    column: Columns = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker threads; one a core by default.")] = None,
    wait: Annotated[float | None, WAIT] = None,
    allow_removal: Annotated[
        bool, typer.Option("--allow-removal", help="Let this run remove or quarantine more than [gate] allows.")
    ] = False,
    drop_mode: Annotated[
        list[str] | None, typer.Option("--drop-mode", help="A served mode that the release may lack; repeat.")
    ] = None,
    wide: Wide = False,
    details: Details = False,
    as_json: AsJson = False,
) -> None:
    """Bring the store up to date, measure, and serve the result if the gate promotes it."""
    from schemas.settings import load_pipeline, pipeline

    given: dict[str, Any] = {"source": source, "store": store, "wait": wait, "models": _models(model) or None}
    if config is not None:
        settings = load_pipeline(config, **given)
    else:
        missing = [name for name in ("source", "store", "models") if not given[name]]
        if missing:
            option = "--model mode=FILE" if missing[0] == "models" else f"--{missing[0]}"
            raise SettingsError(f"reprocess: {option} is missing; or pass --config pipeline.toml.")
        settings = pipeline(**{name: value for name, value in given.items() if value is not None})
    changes: dict[str, Any] = settings.model_dump()
    if pairs is not None:
        changes["evaluation"]["pairs"] = pairs
    changes["columns"] |= _columns(column)
    if keep_columns:
        changes["columns"]["keep"] = tuple(keep_columns)
    if workers is not None:
        changes["runner"]["workers"] = workers
    if drop_mode:
        changes["gate"]["drop_modes"] = tuple(drop_mode)
    settings = pipeline(**changes)
    log.info("reprocess: %s into %s", settings.source, settings.store, extra={"stage": "reprocess"})

    from frontalis.printing import print_outcome
    from tasks.outcome import CompletedWithBadShardsError

    outcome = _reprocess(settings, allow_removal)
    print_outcome(outcome, as_json, wide=wide, details=details)
    if outcome.data.bad_shards:
        raise CompletedWithBadShardsError(outcome)
    if outcome.status == "rejected":
        raise typer.Exit(ExitCode.REJECTED)


def _reprocess(settings: "PipelineSettings", allow_removal: bool) -> "Outcome":
    from tasks.outcome import CompletedWithBadShardsError
    from tasks.reprocess import reprocess

    if not uses_prefect():
        return reprocess(settings, allow_removal=allow_removal)
    from flows.reprocess import reprocess as flow

    try:
        outcome: Outcome = run_flow(flow, settings=settings, allow_removal=allow_removal)
    except CompletedWithBadShardsError as error:
        return error.outcome
    return outcome


@command(kept="nothing was changed")
def evaluate(
    store: Store,
    release: Annotated[str | None, typer.Option(help="A release by name; the one served by default.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Parquet of pairs: protocol, fold, id_a, id_b, same.")] = None,
    resamples: Annotated[
        int | None, typer.Option(min=0, help="Bootstrap resamples; 0 gives no intervals. By default as in the release.")
    ] = None,
    wide: Wide = False,
    details: Details = False,
    as_json: AsJson = False,
) -> None:
    """Measure a release again, on its own features."""
    log.info("evaluate: %s of %s", release or "the served release", store, extra={"stage": "evaluate"})
    from frontalis.printing import print_evaluation
    from tasks.evaluation.released import evaluate_release

    if uses_prefect():
        from flows.evaluate import evaluate as flow

        result = run_flow(flow, store=store, release=release, pairs=pairs, resamples=resamples)
    else:
        result = evaluate_release(store, release, pairs=pairs, resamples=resamples)
    print_evaluation(result, as_json, wide=wide, details=details)


@command(kept="not all files are written; run the same command again")
def explain(
    model: Annotated[str, typer.Option(help="Checkpoint file.")],
    out: Annotated[str, typer.Option(help="Folder for plots and tables.")],
    source: Annotated[str | None, typer.Option(help="Folder of shards; needed for per_sample models.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=65_536, help="Top channels to list.")] = 10,
    column: Columns = None,
    as_json: AsJson = False,
) -> None:
    """Plot and list the channels to which a model gives the largest weights."""
    from frontalis.printing import print_explanation
    from schemas.settings import ColumnNames, checked
    from tasks.explain import explain_model

    columns = checked(ColumnNames, _columns(column))
    print_explanation(explain_model(model, source, out, k, columns), as_json)


@command(kept="nothing was changed")
def releases(store: Store, wide: Wide = False, details: Details = False, as_json: AsJson = False) -> None:
    """List the releases of a store, with the gated metric per mode."""
    from frontalis.documents import write_json
    from frontalis.history import print_releases
    from storage.location import Location
    from storage.releases import Releases

    found = Releases.of(Location(store)).made()
    if as_json:
        write_json({"releases": [release.model_dump(mode="json") for release in found]})
    else:
        print_releases(found, wide=wide, details=details)


@command(kept="`frontalis releases` shows which release is served")
def rollback(
    store: Store, release: Annotated[str, typer.Argument(help="The release to serve.")], as_json: AsJson = False
) -> None:
    """Serve an older release: its features, indexes and models together."""
    from tasks.maintenance.rollback import roll_back

    served = roll_back(store, release)
    _say(served, f"{served.release} is served now", as_json)


@command(kept="`frontalis releases` shows which release is the anchor")
def anchor(
    store: Store,
    release: Annotated[str, typer.Argument(help="The release that no later one may be inferior to.")],
    as_json: AsJson = False,
) -> None:
    """Make a release the anchor of the gate. The first release that was served is, until this moves it."""
    from tasks.maintenance.anchor import move_anchor

    moved = move_anchor(store, release)
    _say(moved, f"{moved.release} is the anchor now", as_json)


@command(kept="not everything is deleted yet; run the same command again")
def forget(
    store: Store,
    subject: Annotated[str | None, typer.Option(help="Forget all rows of this subject.")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Forget the row of this id.")] = None,
    file: Annotated[
        str | None, typer.Option("--from", help='JSON lines such as {"subject": "NAME"} or {"id": "ID"}.')
    ] = None,
    ignore_case: Annotated[
        bool, typer.Option("--ignore-case", help="Compare subjects without upper and lower case.")
    ] = False,
    in_advance: Annotated[
        bool, typer.Option("--in-advance", help="Accept who has no row yet, to keep future rows out.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go, and change nothing.")] = False,
    new_list: Annotated[
        bool,
        typer.Option("--new-list", help="With --from: start a new list of tombstones where the old one is lost."),
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the tombstones in force.")] = False,
    undo: Annotated[
        str | None, typer.Option(metavar="HASH", help="Lift a tombstone of --list, from the next run on.")
    ] = None,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Delete a person or a row everywhere, and keep them out while the source still has them."""
    from frontalis.printing import print_forgotten, print_tombstones
    from tasks.maintenance import forget as erasure
    from tasks.maintenance.targets import Target, read_targets

    if [subject, id_, file, undo, list_ or None].count(None) != 4:
        raise SettingsError("forget: pass one of --subject, --id, --from, --list and --undo.")
    if new_list and file is None:
        raise SettingsError("forget --new-list: pass --from FILE with everybody who was ever forgotten.")
    if list_:
        print_tombstones(erasure.list_tombstones(store), as_json)
    elif undo is not None:
        lifted = erasure.undo(store, undo, wait=wait)
        _say(lifted, f"lifted {lifted.mark}, from the next run on", as_json)
    else:
        if file is not None:
            targets = read_targets(file, ignore_case=ignore_case)
        elif subject is not None:
            targets = [Target("subject", subject, ignore_case)]
        else:
            targets = [Target("id", str(id_))]
        done = erasure.forget_all(store, targets, in_advance=in_advance, dry_run=dry_run, new_list=new_list, wait=wait)
        print_forgotten(done, store, as_json)


@command(kept="run the same command again to remove the rest")
def vacuum(
    store: Store,
    keep: Annotated[int, typer.Option(help="How many promoted releases to keep.")] = 14,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be removed, and remove nothing.")] = False,
    grace_hours: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1_000_000,
            callback=a_number,
            help="Keep files younger than this; 0 locally, 24 on object storage, which has no lock.",
        ),
    ] = None,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Remove the files that no kept release needs."""
    from frontalis.printing import print_vacuumed
    from tasks.maintenance.vacuum import clean

    print_vacuumed(clean(store, keep=keep, dry_run=dry_run, grace_hours=grace_hours, wait=wait), as_json)


@command(kept="nothing was changed")
def verify(store: Store, as_json: AsJson = False) -> None:
    """Check every file of the store against its releases."""
    from frontalis.printing import print_checked
    from tasks.maintenance.verify import check

    checked = check(store)
    print_checked(checked, as_json)
    if checked.problems:
        raise typer.Exit(ExitCode.FAILED)


def _say(record: "BaseModel", line: str, as_json: bool) -> None:
    """Print a record as a document, or one line about it."""
    if as_json:
        from frontalis.documents import write_json

        write_json(record)
    else:
        print(line)  # noqa: T201


def _models(pairs: list[str] | None) -> dict[str, str]:
    return _named("--model", pairs, "mode=FILE, such as per_sample=per_sample.safetensors")


def _columns(pairs: list[str] | None) -> dict[str, str]:
    from schemas.settings import COLUMN_ROLES

    columns = _named("--column", pairs, "ROLE=NAME, such as subject=person")
    for role in columns:
        if role not in COLUMN_ROLES:
            raise SettingsError(f"--column {role}={columns[role]}: {role} is no role; use {', '.join(COLUMN_ROLES)}.")
    return columns


def _named(option: str, pairs: list[str] | None, form: str) -> dict[str, str]:
    """Read a repeatable option of the form name=value."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise SettingsError(f"{option} {pair}: write {form}.")
        if name in found:
            raise SettingsError(f"{option} {pair}: {name} is given twice.")
        found[name] = value
    return found
