"""Settings of the vector index. What "auto" means is decided in `storage.vectors.index`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class IndexSettings(BaseModel):
    """How features become a FAISS index.

    Attributes:
        factory: "auto" (by row count and memory budget) or a `faiss.index_factory` string, taken as it is.
        memory_budget_gb: what the finished index may occupy, in 10⁹ bytes; "auto" compresses vectors to stay below it.
            Building needs one batch and the training sample besides.
        training_rows: at most so many rows, drawn at random from all shards, train kinds that need training: 40 a list,
            16,384 at least. It also bounds the number of lists.
        recall: share of the true ten nearest rows that a search should find. After each build or update, held-out
            queries choose the lists that a search visits for it.
        nprobe: lists that a search visits, of kinds that have lists; None lets `recall` decide.
        ef_search: candidates that a search follows in a graph (HNSW); None keeps FAISS's own.
        rebuild_share: once more than this share of the rows has changed since training, the index is rebuilt.
        gpu: "auto" trains on a GPU when there is one and FAISS can use it.
        seed: of the training sample and the clustering.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    factory: Annotated[str, Field(min_length=1)] = "auto"
    memory_budget_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    training_rows: Annotated[int, Field(ge=1_000, lt=2**31)] = 262_144
    recall: Annotated[float, Field(gt=0, le=1)] = 0.98
    nprobe: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    ef_search: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    rebuild_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    gpu: Literal["auto", "never"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
