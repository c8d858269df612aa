"""`frontalis import` and `frontalis export`: embeddings of other programs in, features of a release out."""

from typing import Annotated, Literal

import typer

from frontalis.app import AsJson, Store, command
from schemas.choices import SearchedMode
from schemas.errors import SettingsError


@command(kept="the folder is not complete; empty it, then run the same command again", name="import")
def import_(
    source: Annotated[str, typer.Argument(help=".npy, .parquet or .csv file, or a folder of clip-retrieval.")],
    out: Annotated[str, typer.Argument(help="Folder for the shards, empty or absent.")],
    names: Annotated[str | None, typer.Option(help="With .npy: a text file of one name a line.")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="ROLE=NAME of id, subject, embedding; repeat.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Of columns that hold one dimension each, such as emb_.")] = "",
    shard_rows: Annotated[int, typer.Option(min=1, max=10_000_000, help="Rows of a shard.")] = 100_000,
    as_json: AsJson = False,
) -> None:
    """Write embeddings of another program as shards."""
    from frontalis.documents import write_json
    from reports.text import counted
    from tasks.exchange.imported import import_embeddings

    roles = {}
    for pair in column or []:
        role, sign, name = pair.partition("=")
        if role not in ("id", "subject", "embedding") or not sign or not name:
            raise SettingsError(f"--column {pair}: write id=NAME, subject=NAME or embedding=NAME.")
        roles[role] = name
    done = import_embeddings(source, out, names=names, columns=roles, prefix=prefix, shard_rows=shard_rows)
    if as_json:
        write_json(done)
    else:
        files = counted(len(done.files), "shard")
        print(f"{counted(done.rows, 'row')} of {done.dim} numbers in {files} under {out}")  # noqa: T201


@command(kept="the folder is not complete; empty it, then run the same command again")
def export(
    store: Store,
    out: Annotated[str, typer.Option(help="Folder for the files, empty or absent.")],
    mode: Annotated[SearchedMode, typer.Option(help="Which features.")] = "per_sample",
    form: Annotated[
        Literal["npy", "lists", "faiss", "scores"], typer.Option("--format", help="See docs/store.md.")
    ] = "npy",
    release: Annotated[str | None, typer.Option(help="A release by name; the one served by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the features of a release, or scores of its pairs, in a form that other programs read."""
    from frontalis.documents import write_json
    from reports.text import counted
    from tasks.exchange.exported import export as write

    done = write(store, mode, form, out, release)
    if as_json:
        write_json(done)
    else:
        what = counted(done.rows, "pair" if form == "scores" else "row")
        print(f"{what} of {done.mode}, {done.release}: {', '.join(done.files)}")  # noqa: T201
