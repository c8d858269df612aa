"""The page at `/`, its files, what it shows of the release, and the stored reports."""

import json
import re
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from pydantic import ValidationError

from frontalis.service.limits import Limits
from frontalis.service.requests import ModeSummary, ReleaseSummary
from frontalis.service.served import Served
from reports.tables import pose_table, present
from reports.theme import mode_role, variables
from schemas.errors import FrontalisError, UnknownIdError
from schemas.metrics import ALL, EER, FRONTAL_FRONTAL, FRONTAL_PROFILE, HELD_OUT, MetricId
from schemas.releases import Release
from schemas.reports import Evaluation
from storage.layout import REPORT_METRICS, REPORT_PAGE, REPORT_PLOTS, report_folder
from storage.location import Location
from tasks.query.answers import all_modes
from tasks.query.opened import OpenRelease

FMRS = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5")
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".png": "image/png",
}
_REPORT_FILE = re.compile(rf"{re.escape(REPORT_PAGE)}|{re.escape(REPORT_METRICS)}|{REPORT_PLOTS}/[\w-]+\.(svg|png)")
_MARKS = {"raw": "●", "per_sample": "■", "batch_stat": "▲"}


def media_type(name: str) -> str:
    """Return the media type of a file of the page or a report."""
    return _TYPES[name[name.rindex(".") :]]


def static_files() -> dict[str, bytes]:
    """Return the files of the page by name; `theme.css` holds the colours of the reports."""
    found = {
        file.name: file.read_bytes()
        for file in (files("frontalis.service") / "static").iterdir()
        if file.name.endswith((".html", ".css", ".js", ".svg"))
    }
    colours = variables()
    theme = f":root {{ {colours['light']} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {colours['dark']} }} }}\n"
    return {**found, "theme.css": theme.encode()}


def summary(opened: OpenRelease, limits: Limits) -> ReleaseSummary:
    """Return what the page shows of a release."""
    record, modes = opened.record, all_modes(opened)
    return ReleaseSummary(
        release=record.release,
        created=record.created.isoformat(timespec="seconds"),
        promoted=record.gate.promoted,
        reason=record.gate.reason,
        compared_with=record.gate.compared_with,
        report=report_path(record),
        modes=[
            ModeSummary(
                mode=mode,
                role=mode_role(mode, modes),
                mark=_MARKS.get(mode, "◆"),
                rows=record.indexes[mode].rows,
                dim=record.indexes[mode].dim,
                index=record.indexes[mode].factory,
                recall_at_10=record.indexes[mode].recall_at_10,
                thresholds=_thresholds(opened, mode),
            )
            for mode in modes
        ],
        columns=opened.index(modes[0]).column_names,
        expand=opened.default_expand,
        limits={"k": limits.k, "queries": limits.queries, "body": limits.body},
        table=_table(opened),
    )


def report_path(record: Release) -> str | None:
    """Return the path of the report of a release, None where there is none."""
    if record.report is None or record.unusable:
        return None
    return f"/{report_folder(record.release)}/{REPORT_PAGE}"


def report_file(served: Served, store: Location, release: str, path: str) -> bytes:
    """Return a file of the report of a release.

    Raises:
        UnknownIdError: there is no such release, report or file, or somebody in the release was forgotten.
        StoreError: the history cannot be read.
    """
    known = next((one for one in served.history() if one.release == release), None)
    if known is None or report_path(known) is None or not _REPORT_FILE.fullmatch(path):
        raise UnknownIdError("there is no such report.")
    try:
        return (store / f"{report_folder(release)}/{path}").read_bytes()
    except OSError as error:
        raise UnknownIdError("there is no such file of the report.") from error


def _thresholds(opened: OpenRelease, mode: str) -> dict[str, float]:
    found = {}
    for fmr in FMRS:
        try:
            found[fmr] = opened.threshold(mode, fmr)
        except FrontalisError:
            break  # not measured, or too small to be
    return found


def _table(opened: OpenRelease) -> dict[str, Any] | None:
    """Return the error rates by pose pair as the report shows them, over held-out subjects where there are any."""
    place = opened.store / f"{report_folder(opened.record.release)}/{REPORT_METRICS}"
    try:
        evaluation = Evaluation.model_validate(json.loads(place.read_bytes())["evaluation"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None  # of an earlier build, or none was measured
    population = evaluation.populations.get(HELD_OUT) or evaluation.populations.get(ALL)
    if population is None:
        return None
    fmrs = [fmr for fmr in ("1e-3", "1e-2", *evaluation.fmrs) if fmr in evaluation.fmrs][:1]
    metrics = [EER, *(MetricId.at("fnmr_global", fmr) for fmr in fmrs)]
    cells = present(population, (FRONTAL_PROFILE, FRONTAL_FRONTAL, ALL))
    table = pose_table(population, cells, metrics)
    return {
        "population": population.name,
        "subjects": population.n_subjects,
        "rows": population.n_rows,
        "heads": table.heads,
        "groups": [
            {
                "title": title,
                "sizes": sizes,
                "modes": [
                    {"mode": name.name, "mark": name.mark, "role": name.role, "cells": [asdict(one) for one in cells]}
                    for name, cells in rows
                ],
            }
            for title, sizes, rows in table.groups
        ],
    }
