import re
import struct
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from reports.drawing import Plot, drawing, plot_files
from reports.theme import light, variables

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '</text></svg><script>alert(1)</script><img src=x onerror="alert(2)">$\\frac{$ \u202e\x00 --> ]]>'


@drawing()
def drawn(text: str = "score", colour: str | None = None, alt: str = "a plot") -> Plot:
    figure = Figure(figsize=(2, 1), facecolor="none")
    axes = figure.add_axes((0.2, 0.2, 0.7, 0.7))
    axes.set_facecolor("none")
    axes.tick_params(color=light("rule"), labelcolor=light("muted"))
    for spine in axes.spines.values():
        spine.set_color(light("rule"))
    axes.plot([0, 1], [0, 1], "o--", color=colour or light("raw"), clip_on=True)
    axes.text(0.1, 0.5, text, color=light("ink"))
    return Plot("plot", alt, figure)


def test_svg_names_its_colours_and_carries_both_themes() -> None:
    root = ElementTree.fromstring(drawn().svg)
    assert root.tag == f"{SVG}svg"
    style = root.findtext(f"{SVG}style", "")
    assert "prefers-color-scheme: dark" in style
    used = {colour for part in root.iter() for colour in re.findall(r"(?:fill|stroke): ([^;]+)", part.get("style", ""))}
    assert used == {"none", "var(--ink)", "var(--muted)", "var(--rule)", "var(--raw)"}
    for theme in variables().values():
        assert theme in style
    assert root.findtext(f"{SVG}title") == "a plot"


def test_svg_holds_hostile_texts_as_texts() -> None:
    root = ElementTree.fromstring(drawn(HOSTILE, alt=HOSTILE).svg)
    tags = {part.tag.removeprefix(SVG) for part in root.iter()}
    assert tags == {"svg", "title", "style", "g", "path", "text", "defs", "clipPath", "rect", "use"}
    assert not [name for part in root.iter() for name in part.attrib if name.startswith("on") or name == "src"]
    assert all(value.startswith("#") for part in root.iter() for name, value in part.attrib.items() if "href" in name)
    printed = HOSTILE.replace("\u202e\x00", "\\u202e\\u0000")
    assert printed in [part.text for part in root.iter(f"{SVG}text")]
    assert root.findtext(f"{SVG}title") == printed


def test_a_text_that_looks_like_a_colour_stays_as_it_is() -> None:
    text = 'style="fill: #123456" stroke: #767e8a'
    root = ElementTree.fromstring(drawn(text).svg)
    assert text in [part.text for part in root.iter(f"{SVG}text")]


def test_a_colour_outside_the_palette_is_refused() -> None:
    with pytest.raises(ValueError, match="#123456 is not a colour of the palette"):
        _ = drawn(colour="#123456").svg


def test_files_are_the_same_every_time() -> None:
    first, second = (plot_files([drawn()]) for _ in range(2))
    assert list(first) == ["plot.svg", "plot.png"]
    assert first == second


def test_png_is_twice_the_size_of_the_drawing() -> None:
    content = drawn().png()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (288, 144)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    _ = drawn().svg
    assert dict(mpl.rcParams) == before
