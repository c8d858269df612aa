"""The JSON documents of `--json`: each carries `schema_version`; `frontalis schema` prints their JSON Schemas.

A field that is added leaves the version as it is. A field that is removed, renamed or read otherwise raises it.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from frontalis.progress import stop_progress
from schemas.models import ModelCard
from schemas.releases import Release
from schemas.reports import ChannelWeights, Evaluation
from schemas.tombstones import Tombstone

SCHEMA_VERSION = 1


class TrainedDocument(TypedDict):
    """`train`: the checkpoint, whether it is shown to be better than raw, and its card without the key."""

    out: str
    improved: bool
    card: ModelCard


class ExplainedDocument(TypedDict):
    """`explain`: channel weights by branch, and channels as (channel, variance between / within subjects)."""

    weights: list[ChannelWeights]
    identity_related: list[tuple[int, float]]
    view_related: list[tuple[int, float]]
    rank_correlation: dict[str, float | None]
    ablation: dict[str, Any] | None
    files: list[str]


class ReleasesDocument(TypedDict):
    """`releases`: the history, oldest first."""

    releases: list[Release]


class TombstonesDocument(TypedDict):
    """`forget --list`: the tombstones in force."""

    tombstones: list[Tombstone]


def write_json(content: BaseModel | Mapping[str, Any]) -> None:
    """Print a record as one JSON document."""
    stop_progress()
    found = content.model_dump(mode="json") if isinstance(content, BaseModel) else content
    sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **found}, indent=1, ensure_ascii=False) + "\n")


def documents() -> dict[str, Any]:
    """Return the type of the document of each command."""
    from tasks.evaluation.compared import Comparison
    from tasks.exchange.exported import Exported
    from tasks.exchange.imported import Imported
    from tasks.maintenance.forget import Forgotten
    from tasks.maintenance.status import StoreStatus
    from tasks.maintenance.vacuum import Vacuumed
    from tasks.maintenance.verify import Checked
    from tasks.outcome import Outcome
    from tasks.query.answers import QueryAnswer, QueryComparison

    return {
        "train": TrainedDocument,
        "reprocess": Outcome,
        "evaluate": Evaluation,
        "query": QueryAnswer,
        "query --compare": QueryComparison,
        "explain": ExplainedDocument,
        "releases": ReleasesDocument,
        "rollback": Release,
        "anchor": Release,
        "forget": Forgotten,
        "forget --list": TombstonesDocument,
        "forget --undo": Tombstone,
        "vacuum": Vacuumed,
        "verify": Checked,
        "status": StoreStatus,
        "export": Exported,
        "import": Imported,
        "compare": Comparison,
    }


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the document that a command prints."""
    found = TypeAdapter(documents()[name]).json_schema()
    version = {
        "const": SCHEMA_VERSION,
        "description": "raised by a change that breaks a reader",
    }
    found["properties"] = {"schema_version": version, **found["properties"]}
    found["required"] = ["schema_version", *found.get("required", [])]
    if name == "train":  # the key of the hashes of training subjects stays in the file
        card = found["$defs"]["ModelCard"]
        card["properties"].pop("seen_key")
        card["required"] = [one for one in card.get("required", []) if one != "seen_key"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
