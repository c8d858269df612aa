"""Parts of the report's plots: the canvas, the marks and lines of the modes, legends, intervals, names.

`reports.plots` composes figures from these; colours come from `reports.theme`. Call them within `drawing.drawing()`.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reports.text import visible
from reports.theme import light, mode_role
from schemas.reports import Estimate

_DASHES = {"raw": (0, (5, 2)), "per_sample": "-", "batch_stat": (0, (6, 1.5, 1.5, 1.5))}
_MARKERS = {"raw": "o", "per_sample": "s", "batch_stat": "^"}
SMALL = 9.5
LEGEND: dict[str, Any] = {
    "frameon": False, "fontsize": SMALL, "labelcolor": light("muted"), "handlelength": 1.8, "handletextpad": 0.5,
    "columnspacing": 1.2, "borderpad": 0.1, "labelspacing": 0.25,
}  # fmt: skip
LABEL: dict[str, Any] = {"fontsize": SMALL, "fontweight": "bold", "va": "top"}
NOTE: dict[str, Any] = {"fontsize": SMALL, "color": light("ink")}


def canvas(
    title: str, width: int, height: int, *, left: int, bottom: int, colour: str = light("ink")
) -> tuple[Figure, Axes]:
    """Return a figure, sized in CSS pixels, with one pair of axes at fixed margins, so that neighbours align."""
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    figure.text(2 / width, 1 - 13 / height, short(title, 40), fontsize=11, fontweight="bold", color=colour)
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + 10) / width, 1 - (bottom + 28) / height))
    style_axes(axes)
    axes.grid(color=light("grid"), lw=0.8)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Give axes the quiet look of all plots: two thin spines, small muted labels, nothing behind."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=light("rule"), lw=0.8)
    axes.tick_params(color=light("rule"), labelcolor=light("muted"), labelsize=SMALL, length=3, width=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=light("muted"), fontsize=SMALL)


def mode_colour(mode: str, modes: Iterable[str]) -> str:
    """Return the colour of a mode among `modes`."""
    return light(mode_role(mode, list(modes)))


def line_style(mode: str, modes: Iterable[str]) -> dict[str, Any]:
    """Return how a mode's line is drawn: its colour and its dashes, either of which identifies it."""
    return {"color": mode_colour(mode, modes), "lw": 1.7, "ls": _DASHES.get(mode, (0, (2, 1.5)))}


def mark_style(mode: str, modes: Iterable[str], *, solid: bool = True) -> dict[str, Any]:
    """Return how a mode's mark is drawn: its colour and its shape; hollow where not `solid`."""
    colour = mode_colour(mode, modes)
    return {
        "ls": "none", "marker": _MARKERS.get(mode, "D"), "ms": 5.5, "mec": colour, "mew": 1.3,
        "mfc": colour if solid else light("paper"),
    }  # fmt: skip


def mode_legend(figure: Figure, shown: Iterable[str], modes: Iterable[str]) -> None:
    """Name the marks of modes along the foot of a figure."""
    handles = [Line2D([], [], label=short(mode), **mark_style(mode, modes)) for mode in shown]
    figure.legend(handles=handles, **LEGEND, loc="lower left", ncol=3, bbox_to_anchor=(0, 0))


def inner_legend(
    axes: Axes, modes: Iterable[str], place: Literal["upper right", "lower right", "best"] = "upper right"
) -> None:
    """Name the lines of modes in a corner of the axes."""
    handles = [Line2D([], [], label=short(mode), **line_style(mode, modes)) for mode in modes]
    axes.legend(handles=handles, loc=place, **LEGEND)


def name_ends(axes: Axes, left: str, right: str) -> None:
    """Name the two ends of the horizontal axis, on the line of its label."""
    for text, place, side in ((left, 0, "left"), (right, 1, "right")):
        axes.annotate(
            text, (place, 0), (0, -20), xycoords="axes fraction", textcoords="offset points", ha=side, va="top", **NOTE
        )


def bounds(estimate: Estimate) -> tuple[float, float]:
    """Return the interval, or the value twice where there is none."""
    value = estimate.value or 0.0
    low, high = estimate.low, estimate.high
    return (value if low is None else low), (value if high is None else high)


def in_percent(estimate: Estimate) -> float:
    """Return the value of an estimate in percent."""
    return 100 * (estimate.value or 0.0)


def error_curve(
    axes: Axes, known: Sequence[tuple[float, Estimate]], mode: str, modes: Iterable[str], *, marks: bool = True
) -> None:
    """Draw estimates, in percent, at their places: a line, the intervals, and the marks on top."""
    places = [place for place, _ in known]
    for place, one in known:
        axes.plot(
            [place, place], [100 * bound for bound in bounds(one)], color=mode_colour(mode, modes), lw=1, alpha=0.55
        )
    axes.plot(places, [in_percent(one) for _, one in known], **line_style(mode, modes))
    if marks:
        axes.plot(places, [in_percent(one) for _, one in known], **mark_style(mode, modes))


def short(text: str, length: int = 18) -> str:
    """Return `text` on one line, with nothing unprintable, cut to `length`."""
    text = " ".join(visible(text).split())
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def slug(text: str) -> str:
    """Return a name for files and ids: `text` itself where it is plain, else what is plain of it and a checksum."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", text):
        return text
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", text)[:40].strip("-")
    return f"{plain}-{zlib.crc32(text.encode(errors='backslashreplace')):08x}".lstrip("-")
