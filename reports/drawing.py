"""From a drawn plot to SVG and PNG: matplotlib's settings, and the colours of an SVG as variables of both themes.

Plots are drawn once, in the light colours. The SVG names its colours as CSS variables and carries both themes, so that
it follows the reader's choice wherever it is shown. A page embeds it with `<img>`: there a browser runs no script and
loads nothing. What is drawn is left to `reports.plots`, colours to `reports.theme`.
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
from reports.theme import PALETTE, light, variables

_ROLES = {colours[0]: role for role, colours in PALETTE.items()}


# matplotlib's settings belong to the whole process; two reports drawn by two threads must not mix them.
_DRAWING = threading.RLock()


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
