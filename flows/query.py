"""Query: many queries at once, as a Prefect flow; one from a shell needs no Prefect (`tasks.query`)."""

from prefect import flow

from flows.begin import begin_flow
from storage.location import Location
from tasks.query import QueryAnswer, answer


@flow(name="query")
def query(
    store: str,
    out: str,
    mode: str = "per_sample",
    ids: list[str] | None = None,
    vectors: str | None = None,
    k: int = 10,
    release: str | None = None,
) -> QueryAnswer:
    """Answer many queries at once as a Prefect flow and write the answer to `out`, a JSON file; see `answer`.

    The people that a query found are biometric data: they go to that file and not into Prefect's database.
    """
    begin_flow()
    found = answer(store, mode, ids=ids or [], vectors=vectors, k=k, release=release)
    Location(out).write_bytes(found.model_dump_json(indent=1).encode())
    return found
