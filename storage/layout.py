"""The layout of a store: every path in it, and the patterns of the names that Frontalis gives.

Paths are relative to the store. The name of a feature file is its key, `schemas.features.FeatureKey`; what a file holds
is left to the module that writes it.
"""

import re
import secrets

from schemas.features import DIGESTS

FEATURES = "features"
QUARANTINE = "quarantine"
RELEASES = "releases"

INDEXES = "indexes"
INDEX_FILE = "index.faiss"
IDS_FILE = "ids.parquet"
MODELS = "models"
REPORTS = "reports"
REPORT_PAGE = "index.html"
REPORT_METRICS = "metrics.json"
REPORT_PLOTS = "plots"

MANIFEST = "manifest"
SHARD_RECORDS = f"{MANIFEST}/shards.parquet"
ROW_KEYS = f"{MANIFEST}/keys"

TOMBSTONES = "tombstones.json"
FORGET_LOG = "forgotten.jsonl"
LOCK = ".lock"
TEMPORARY = ".tmp-"


def index_folder(release: str, mode: str) -> str:
    """Return the folder of `INDEX_FILE` and `IDS_FILE`."""
    return f"{INDEXES}/{release}/{mode}"


def model_path(file_digest: str) -> str:
    """Return the path of the copy of a checkpoint."""
    return f"{MODELS}/{file_digest}.safetensors"


def report_folder(release: str) -> str:
    """Return the folder of `REPORT_PAGE`, `REPORT_METRICS` and `REPORT_PLOTS`."""
    return f"{REPORTS}/{release}"


def row_keys_path(content: str, basis: str) -> str:
    """Return the path of the row keys of a shard, by the digests of its bytes and of what else decides them."""
    return f"{ROW_KEYS}/{content}-{basis}.parquet"


def history_name(version: int, digest: str) -> str:
    """Return the name, in the releases table, of a file that version `version` is the first to list."""
    return f"{version:08d}-{digest}.parquet"


def temporary_name() -> str:
    """Return a new name for a file that is being written."""
    return f"{TEMPORARY}{secrets.token_hex(8)}"


def is_own(name: str) -> bool:
    """Return whether Frontalis gives this name, temporary ones aside; a file of any other name is not ours."""
    return bool(_OWN.fullmatch(name))


def is_temporary(name: str) -> bool:
    """Return whether it is a name that a killed writer leaves: a temporary one of ours, or of Delta's log."""
    return bool(_TEMPORARY.fullmatch(name))


def history_version(name: str) -> int | None:
    """Return the version in the name of a file of the releases table; None for all others."""
    found = _HISTORY.fullmatch(name)
    return int(found["version"]) if found and found["version"] else None


_HEX, _RELEASE = "[0-9a-f]+", "r[0-9]{5,}-[0-9a-f]+"
_CENSUS = "census"  # the manifest of stores of earlier builds; nothing reads it, so vacuum deletes it
_HISTORY = re.compile(rf"{RELEASES}/((?P<version>[0-9]{{8}})-)?{_HEX}\.parquet")
_OWN = re.compile(
    rf"({FEATURES}/mode=[^/]+|{QUARANTINE})/shard=[^/]+/{DIGESTS}\.parquet"
    rf"|{_HISTORY.pattern}"
    rf"|{INDEXES}/{_RELEASE}/[^/]+/({re.escape(INDEX_FILE)}|{re.escape(IDS_FILE)})"
    rf"|{REPORTS}/{_RELEASE}/({re.escape(REPORT_PAGE)}|{re.escape(REPORT_METRICS)}|{REPORT_PLOTS}/[^/]+\.(svg|png))"
    rf"|{MODELS}/{_HEX}\.safetensors"
    rf"|({MANIFEST}|{_CENSUS})/(shards\.parquet|keys/{_HEX}-{_HEX}\.parquet)"
)
_TABLES = f"{FEATURES}|{QUARANTINE}|{RELEASES}"
_TEMPORARY = re.compile(
    rf"(({_TABLES}|{INDEXES}|{REPORTS}|{MODELS}|{MANIFEST}|{_CENSUS})/(.*/)?)?{re.escape(TEMPORARY)}[0-9a-f]{{16}}"
    rf"|({_TABLES})/_delta_log/(_commit_[^/]*\.tmp|[^/]*\.(json|parquet)#\d+)"
)
