"""Query: many queries at once, as a Prefect flow; one from a shell needs no Prefect (`tasks.query`)."""

from prefect import flow
from pydantic import BaseModel

from flows.begin import begin_flow, named, store_of
from schemas.choices import By, SearchedMode
from tasks.query.answers import Question, all_modes, ask
from tasks.query.files import check_suffix, write_answers
from tasks.query.opened import open_release
from tasks.query.search import SearchOptions


class Written(BaseModel):
    """What a flow run has done: how many queries it answered, with how many neighbours, in which file."""

    out: str
    release: str
    queries: int
    neighbours: int


@flow(name="query", flow_run_name=named("query", "mode"))
def query(
    store: str,
    out: str,
    mode: SearchedMode = "per_sample",
    ids: list[str] | None = None,
    vectors: str | None = None,
    k: int = 10,
    release: str | None = None,
    exclude_self: bool = False,
    unique_subject: bool = False,
    by: By = "row",
    where: str | None = None,
    columns: list[str] | None = None,
    fmr: str | float | None = None,
    min_score: float | None = None,
    expand: int | None = None,
    compare: bool = False,
) -> Written:
    """Answer many queries at once and write the answer to `out`, a .parquet, .csv or .json file.

    The people that a query found are biometric data: they go to that file and not into Prefect's database.

    Args:
        store: local path, s3://…, or a pipeline.toml that names it.
        out: the file to write.
        mode: `per_sample`, `batch_stat` or `raw`; without effect with `compare`.
        ids: stored ids. Prefect's database keeps them; `vectors` are in a file.
        vectors: a .parquet, .npy or .csv file of new embeddings.
        k: neighbours a query.
        release: a release by name; None takes the one that is served.
        exclude_self: whether new embeddings may not find the stored row of their id.
        unique_subject: keep the best row of each subject.
        by: find rows, or subjects by the mean of their rows.
        where: an SQL condition on stored columns.
        columns: stored columns to add.
        fmr: mark matches at the threshold that the release measured for this FMR.
        min_score: leave out rows with a smaller score.
        expand: rows of query expansion; None takes `[query] expand` of the release.
        compare: answer in raw and in every mode.
    """
    begin_flow()
    check_suffix(out)
    options = SearchOptions(
        expand=expand,
        where=where,
        unique_subject=unique_subject,
        min_score=min_score,
        columns=columns or [],
        by=by,
    )
    question = Question(ids or [], vectors, k, exclude_self=exclude_self, fmr=fmr, options=options)
    opened = open_release(store_of(store), release)
    answers = ask(opened, all_modes(opened) if compare else [mode], question)
    rows = write_answers(out, answers)
    return Written(out=out, release=opened.record.release, queries=len(answers[0].names), neighbours=rows)
