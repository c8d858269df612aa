"""The look of the report's figures: one palette in two themes, and matplotlib's SVG made fit for it.

Figures are drawn once, in the light colours. `inline_svg` replaces each colour by a class whose colour the style sheet
chooses (light, dark, print), and keeps nothing of matplotlib's file but shapes and text from a fixed list, so no
inline style, script, link or foreign element can reach the page. What is drawn is left to `reports.plots`.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.text import Text

from reports.text import visible

# role → (light, dark). The light colours double as the keys by which `inline_svg` finds the role: all are distinct.
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

SVG = "http://www.w3.org/2000/svg"
_XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
_SHAPES = {"svg", "g", "path", "text", "tspan", "defs", "clipPath", "rect", "use"}
_ATTRIBUTES = {"d", "x", "y", "width", "height", "transform", "clip-path", "viewBox"}
_PRESENTATION = {
    "fill-opacity", "font-size", "font-weight", "opacity", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap",
    "stroke-linejoin", "stroke-opacity", "stroke-width", "text-anchor",
}  # fmt: skip
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


def plot_rules() -> str:
    """Return the CSS rules that give the classes of `inline_svg` their colours (`f-raw` fills, `s-raw` strokes)."""
    return "\n".join(f".f-{role} {{ fill: var(--{role}) }} .s-{role} {{ stroke: var(--{role}) }}" for role in PALETTE)


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


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an `<svg role="img">` element for an HTML page.

    `name` (letters, digits, hyphens) keeps the ids of several figures of one page apart; `label` is the alternative
    text. Raises `ValueError` where the figure holds a colour outside the palette or an element outside the list.
    """
    return ElementTree.tostring(_themed(figure, name, label), encoding="unicode")


def svg_file(figure: Figure, name: str, label: str) -> bytes:
    """Return a figure as an SVG file of its own, which follows the light or dark theme of its viewer."""
    root = _themed(figure, name, label)
    root.set("xmlns", SVG)
    _, _, width, height = root.get("viewBox", "").split()
    root.set("width", width)
    root.set("height", height)
    colours = variables()
    style = ElementTree.Element("style")
    style.text = (
        f"svg {{ {colours['light']} background: var(--paper); font-family: system-ui, sans-serif; "
        "stroke-linejoin: round }\n"
        f"@media (prefers-color-scheme: dark) {{ svg {{ {colours['dark']} }} }}\n{plot_rules()}"
    )
    root.insert(0, style)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode").encode()


def png_file(figure: Figure) -> bytes:
    """Return a figure as PNG in the light theme, twice the size of the SVG."""
    target = io.BytesIO()
    with drawing():
        figure.savefig(target, format="png", dpi=144, facecolor=light("paper"), metadata={"Software": None})
    return target.getvalue()


def _themed(figure: Figure, name: str, label: str) -> ElementTree.Element:
    for text in figure.findobj(Text):  # XML has no way to hold a control character, so they are written out
        text.set_text(visible(text.get_text()))
    target = io.BytesIO()
    with drawing():
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # matplotlib wrote this document a moment ago and escapes text: it is no foreign XML.
    root = ElementTree.fromstring(target.getvalue())  # noqa: S314
    _prune(root)
    referenced = {use.get("href", "") for use in root.iter("use")} | {
        part.get("clip-path", "")[4:-1] for part in root.iter() if part.get("clip-path")
    }
    for part in root.iter():
        if f"#{part.get('id')}" in referenced:
            part.set("id", f"{name}-{part.get('id')}")
        else:
            part.attrib.pop("id", None)
        if "href" in part.attrib:
            part.set("href", f"#{name}-{part.attrib['href'][1:]}")
        if "clip-path" in part.attrib:
            part.set("clip-path", f"url(#{name}-{part.attrib['clip-path'][5:-1]})")
    for attribute in ("width", "height"):
        root.attrib.pop(attribute)
    root.set("class", "plot")
    root.set("role", "img")
    root.set("aria-label", visible(label))
    return root


def _prune(element: ElementTree.Element) -> None:
    """Strip namespaces, unknown attributes and metadata from a tree, and turn inline style into classes, in place."""
    element.tag = element.tag.removeprefix(f"{{{SVG}}}")
    if element.tag not in _SHAPES:
        raise ValueError(f"SVG element {element.tag!r} is not among those allowed in a report: {sorted(_SHAPES)}")
    attributes = {key: value for key, value in element.attrib.items() if key in _ATTRIBUTES or key == "id"}
    if _XLINK_HREF in element.attrib:
        attributes["href"] = element.attrib[_XLINK_HREF]
    if "d" in attributes:
        attributes["d"] = " ".join(attributes["d"].split())
    attributes |= _presentation(element.get("style", ""))
    element.attrib.clear()
    element.attrib.update(attributes)
    if element.tag != "text" and element.tag != "tspan":
        element.text = None
    element.tail = None
    for child in list(element):
        if child.tag == f"{{{SVG}}}metadata" or child.find(f"{{{SVG}}}style") is not None:
            element.remove(child)
        else:
            _prune(child)


def _presentation(style: str) -> dict[str, str]:
    """Return the attributes and colour classes that say what an inline style says."""
    attributes: dict[str, str] = {}
    classes: list[str] = []
    for declaration in filter(None, (part.strip() for part in style.split(";"))):
        key, value = (part.strip() for part in declaration.split(":", 1))
        if key in ("fill", "stroke"):
            if value == "none":
                attributes[key] = value
            elif value in _ROLES:
                classes.append(f"{key[0]}-{_ROLES[value]}")
            else:
                raise ValueError(f"{key} {value} is not a colour of the palette")
        elif key in _PRESENTATION:
            attributes[key] = re.sub(r"px$", "", value)
    if classes:
        attributes["class"] = " ".join(classes)
    return attributes
