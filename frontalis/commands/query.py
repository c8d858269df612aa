"""`frontalis query`: the nearest stored rows of stored ids or of new embeddings, and what their scores mean."""

from typing import TYPE_CHECKING, Annotated

import typer

from frontalis.app import AsJson, Store, a_number, command
from schemas.choices import By, SearchedMode
from schemas.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from tasks.query.answers import Neighbour, QueryAnswer, QueryResult

DEFAULT_MODE = "per_sample"


@command(kept="nothing was changed")
def query(
    store: Store,
    mode: Annotated[SearchedMode | None, typer.Option(help="By default per_sample.")] = None,
    id_: Annotated[list[str] | None, typer.Option("--id", help="A stored id; repeat for several.")] = None,
    vectors: Annotated[str | None, typer.Option(help="New embeddings: .npy, .parquet or .csv.")] = None,
    k: Annotated[int, typer.Option("-k", help="Neighbours a query.")] = 10,
    release: Annotated[str | None, typer.Option(help="A release by name; the one served by default.")] = None,
    include_self: Annotated[bool, typer.Option(help="With --id: include the row itself.")] = False,
    exclude_self: Annotated[
        bool, typer.Option("--exclude-self", help="With --vectors: leave out the stored row of the same id.")
    ] = False,
    unique_subject: Annotated[
        bool, typer.Option("--unique-subject", help="Keep the best row of each subject.")
    ] = False,
    by: Annotated[By, typer.Option(help="subject finds subjects by the mean of their rows.")] = "row",
    where: Annotated[
        str | None, typer.Option(help="SQL condition on stored columns: \"pose = 'profile' and yaw < -30\".")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Stored columns to show, such as pose,yaw.")] = None,
    fmr: Annotated[
        str | None, typer.Option(help="Mark matches at the threshold that the release measured for this FMR: 1e-3.")
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(min=-1, max=1, callback=a_number, help="Leave out rows with a smaller score.")
    ] = None,
    expand: Annotated[
        int | None,
        typer.Option(help="Query expansion with so many nearest rows, 0 for none; by default [query] expand."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show raw and all modes side by side.")] = False,
    out: Annotated[str | None, typer.Option(help="Write the answer to a .csv, .parquet or .json file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the nearest stored rows of an id or of new embeddings."""
    from frontalis.documents import write_json
    from tasks.query.answers import Question, all_modes, ask
    from tasks.query.files import check_suffix, document, write_answers
    from tasks.query.opened import open_release
    from tasks.query.search import SearchOptions

    if compare and mode is not None:
        raise SettingsError("pass either --mode or --compare, which shows every mode.")
    if out is not None:
        check_suffix(out)
    options = SearchOptions(
        expand=expand,
        where=where,
        unique_subject=unique_subject,
        min_score=min_score,
        columns=[name.strip() for name in columns.split(",")] if columns else [],
        by=by,
    )
    question = Question(id_ or [], vectors, k, include_self, exclude_self, fmr, options)
    opened = open_release(store, release)
    answers = ask(opened, all_modes(opened) if compare else [mode or DEFAULT_MODE], question)
    if out is not None:
        rows = write_answers(out, answers)
        if not as_json:
            print(f"{rows:,} neighbours of {len(answers[0].names):,} queries in {out}")  # noqa: T201
            return
    if as_json:
        write_json(document(answers))
    else:
        print_answers([one.record() for one in answers])


def print_answers(answers: "Sequence[QueryAnswer]") -> None:
    """Print the neighbours of every query, the modes side by side, then what the scores mean."""
    from frontalis.terminal import open_console, say

    on = open_console()
    for results in zip(*(one.results for one in answers), strict=True):
        if len(answers) == 1:
            _print_result(on, answers[0], results[0])
        else:
            _print_side_by_side(on, answers, results)
    for line in dict.fromkeys(line for one in answers for line in _explained(one, marked=len(answers) > 1)):
        say(on, line)


def _print_result(on: "Console", answer: "QueryAnswer", result: "QueryResult") -> None:
    from frontalis.terminal import new_table, plain, show_table

    known = result.subject is not None
    of = f" (subject {result.subject})" if known else ""
    title = f"{result.query}{of}: {answer.mode}, {answer.release}"
    rows = new_table()
    further = list(dict.fromkeys(name for found in result.neighbours for name in found.columns))
    shown = {
        "rank": True,
        "score": True,
        "expanded": answer.expand > 0,
        "FMR": answer.impostor_pairs is not None,
        "match": answer.threshold is not None,
        "id": answer.by == "row",
        "subject": True,
        "same": known,
        "rows": answer.by == "subject",
        "shard": answer.by == "row",
    }
    names = [name for name, is_shown in shown.items() if is_shown]
    for name in (*names, *further):
        right = name in ("rank", "score", "expanded", "FMR", "rows")
        rows.add_column(name, justify="right" if right else "left", no_wrap=True)
    for found in result.neighbours:
        cells = {
            "rank": found.rank,
            "score": f"{found.score:.4f}",
            "expanded": "" if found.expanded is None else f"{found.expanded:.4f}",
            "FMR": _fmr(found, answer),
            "match": "yes" if found.match else "no",
            "id": found.id,
            "subject": found.subject,
            "same": {"=": "yes", "≠": "no", " ": ""}[_same(found, result)],
            "rows": found.rows,
            "shard": found.shard,
        }
        rows.add_row(*(plain(cells[name]) for name in names), *(plain(_shown(found.columns[name])) for name in further))
    show_table(on, title, rows)
    if not result.neighbours:
        on.print("none")


def _print_side_by_side(on: "Console", answers: "Sequence[QueryAnswer]", results: "Sequence[QueryResult]") -> None:
    from frontalis.terminal import new_table, plain, show_table

    subject = results[0].subject
    of = f" (subject {subject})" if subject is not None else ""
    title = f"{results[0].query}{of}: {answers[0].release}; = same subject, ≠ another"
    rows = new_table()
    rows.add_column("rank", justify="right")
    for answer in answers:
        rows.add_column(answer.mode, justify="right")
        rows.add_column("FMR", justify="right")
        rows.add_column("subject" if answer.by == "subject" else "id")
    for rank in range(max(len(result.neighbours) for result in results)):
        cells: list[object] = [rank + 1]
        for answer, result in zip(answers, results, strict=True):
            found = result.neighbours[rank] if rank < len(result.neighbours) else None
            if found is None:
                cells += ["", "", ""]
            else:
                match = "*" if found.match else ""
                cells += [f"{found.score:.4f}{match}", _fmr(found, answer), f"{_same(found, result)} {found.id}"]
        rows.add_row(*map(plain, cells))
    show_table(on, title, rows)


def _explained(answer: "QueryAnswer", marked: bool) -> "Iterator[str]":
    """Yield what the scores of an answer mean."""
    from tasks.query.answers import FEW_FALSE_MATCHES

    pairs = answer.impostor_pairs
    if pairs is None:
        yield f"score: cosine; its FMR is unknown: {answer.fmr_unknown}"
    else:
        yield (
            f"score: cosine; FMR: at most this share of {pairs:,} impostor pairs of {answer.release} score as high "
            f"(unreliable below {FEW_FALSE_MATCHES / pairs:.1e}, which rests on fewer than {FEW_FALSE_MATCHES})"
        )
    if answer.threshold is not None:
        false = answer.compared * float(answer.fmr or 0)
        yield (
            f"match{f' (*) in {answer.mode}' if marked else ''}: score >= {answer.threshold!r}, FMR at most "
            f"{answer.fmr}: expect up to {false:.2g} false matches among {answer.compared:,} rows"
        )
    if answer.expand:
        yield f"ordered by the query expanded with {answer.expand} rows"


def _fmr(found: "Neighbour", answer: "QueryAnswer") -> str:
    if found.fmr is None or answer.impostor_pairs is None:
        return ""
    if not found.fmr:
        return f"<{1 / answer.impostor_pairs:.1e}"
    return f"{found.fmr:.1e}" if found.fmr < 0.1 else f"{found.fmr:.2f}"


def _same(found: "Neighbour", result: "QueryResult") -> str:
    """Return whether a neighbour is of the query's subject: = or ≠, blank where either is unknown."""
    if found.subject is None or result.subject is None:
        return " "
    return "=" if found.subject == result.subject else "≠"


def _shown(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
