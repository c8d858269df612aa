"""The look of the report's plots: one palette in two themes, and the way from a drawn plot to SVG and PNG.

Plots are drawn once, in the light colours. The SVG names its colours as CSS variables and carries both themes, so that
it follows the reader's choice wherever it is shown. A page embeds it with `<img>`: there a browser runs no script and
loads nothing. What is drawn is left to `reports.plots`.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from xml.sax.saxutils import escape

import matplotlib as mpl
from matplotlib.figure import Figure

from reports.text import visible

# role → (light, dark). The light colours double as the keys by which an SVG's colours are replaced: all are distinct.
# The colours of the modes are blue and orange because they stay apart for every common kind of colour blindness.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1b2026", "#e7eaef"),
    "muted": ("#59626e", "#a2acb9"),
    "grid": ("#e2e5ea", "#2c333d"),
    "rule": ("#aeb5bf", "#566070"),
    "paper": ("#ffffff", "#161a20"),
    "raw": ("#767e8a", "#a3abb7"),
    "per_sample": ("#0b67b2", "#5fb0f0"),
    "batch_stat": ("#c4500a", "#f29b52"),
    "other-1": ("#007d68", "#45c8aa"),
    "other-2": ("#97488f", "#dd92d6"),
    "better": ("#0a7248", "#55c795"),
    "worse": ("#b0241c", "#ff8f85"),
    "ramp-0": ("#f4f1fb", "#231e35"),
    "ramp-1": ("#e3dbf5", "#342c52"),
    "ramp-2": ("#cdbfea", "#473c70"),
    "ramp-3": ("#b5a1de", "#5c4f90"),
    "ramp-4": ("#8560c3", "#8a7ac6"),
    "ramp-5": ("#6f4cae", "#a092d8"),
    "ramp-6": ("#573793", "#b9adea"),
    "ramp-7": ("#3e2374", "#d7cff8"),
    "on-pale": ("#291f42", "#ece7fc"),  # text upon ramp-0 … ramp-3
    "on-deep": ("#fefeff", "#15112a"),  # text upon ramp-4 … ramp-7
}
RAMP_STEPS = 8
_MODES = ("raw", "per_sample", "batch_stat")

_ROLES = {light: role for role, (light, _) in PALETTE.items()}


# matplotlib's settings belong to the whole process; two reports drawn by two threads must not mix them.
_DRAWING = threading.RLock()


def light(role: str) -> str:
    """Return the colour to draw with for a role of the palette."""
    return PALETTE[role][0]


def mode_role(mode: str, modes: list[str]) -> str:
    """Return the palette role of a mode: its own, or one of two spare ones by its place among the unknown modes."""
    if mode in _MODES:
        return mode
    unknown = sorted(name for name in modes if name not in _MODES)
    return f"other-{unknown.index(mode) % 2 + 1}"


def variables() -> dict[str, str]:
    """Return CSS declarations of the palette (`--raw: #…;`), keyed `light` and `dark`."""
    return {
        theme: " ".join(f"--{role}: {colours[position]};" for role, colours in PALETTE.items())
        for position, theme in enumerate(("light", "dark"))
    }


def mode_rules() -> str:
    """Return the CSS rules that colour the text (`t-raw`) and the border (`b-raw`) of a mode."""
    roles = (*_MODES, "other-1", "other-2")
    return "\n".join(f".t-{one} {{ color: var(--{one}) }} .b-{one} {{ border-color: var(--{one}) }}" for one in roles)


@contextmanager
def drawing() -> Iterator[None]:
    """Hold matplotlib's settings for one figure: text stays text, `$` is not mathematics, the same bytes every time.

    Works as a decorator too. Letters that matplotlib's own font lacks are measured by a stand-in; the reader's browser
    has them.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "frontalis",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "axes.unicode_minus": True,
    }
    with _DRAWING, mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@dataclass(frozen=True)
class Plot:
    """One drawn plot: `name` (letters, digits, hyphens; unique in a report), the alternative text, the drawing."""

    name: str
    alt: str
    figure: Figure

    @cached_property
    def svg(self) -> bytes:
        """The plot as an SVG document in both themes.

        Raises:
            ValueError: it holds a colour outside the palette, which would have no counterpart in the dark theme.
        """
        target = io.BytesIO()
        with drawing():
            self.figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        # Within a tag only: matplotlib writes < and > of a text as entities, so no text can pass for a tag.
        themed = re.sub(r"(?<=: )#[0-9a-f]{6}(?=[^<>]*>)", _variable, target.getvalue().decode())
        # XML has no way to hold a control character, so they are written out.
        themed = re.sub(r"[^\n\x20-\x7e]", lambda found: visible(found[0]), themed)
        added = f"<title>{escape(visible(self.alt))}</title>\n <style>{_svg_style()}</style>\n <defs>"
        return themed.replace("<defs>", added, 1).encode()

    def png(self) -> bytes:
        """Return the plot as PNG in the light theme, twice the size of the SVG."""
        target = io.BytesIO()
        with drawing():
            self.figure.savefig(target, format="png", dpi=144, facecolor=light("paper"), metadata={"Software": None})
        return target.getvalue()


def plot_files(plots: Iterable[Plot]) -> dict[str, bytes]:
    """Return plots as files: name (`det-all.svg`, `det-all.png` …) → content."""
    return {
        name: data
        for plot in plots
        for name, data in ((f"{plot.name}.svg", plot.svg), (f"{plot.name}.png", plot.png()))
    }


def _variable(colour: re.Match[str]) -> str:
    if colour[0] not in _ROLES:
        raise ValueError(f"{colour[0]} is not a colour of the palette; add it to reports.theme.PALETTE")
    return f"var(--{_ROLES[colour[0]]})"


def _svg_style() -> str:
    colours = variables()
    return (
        f"svg {{ {colours['light']} background: var(--paper) }}\n"
        "text { font-family: system-ui, sans-serif !important }\n"
        f"@media (prefers-color-scheme: dark) {{ svg {{ {colours['dark']} }} }}"
    )
