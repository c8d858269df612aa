import re
import struct
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from reports.theme import PALETTE, RAMP_STEPS, Plot, drawing, light, mode_role, mode_rules, plot_files, variables

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


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize(
    ("role", "least"),
    [("ink", 7), ("muted", 4.5), ("better", 4.5), ("worse", 4.5)]
    + [(mode, 4.0) for mode in ("raw", "per_sample", "batch_stat", "other-1", "other-2")],
)
def test_text_and_lines_stand_out_from_the_paper(theme: int, role: str, least: float) -> None:
    assert contrast(PALETTE[role][theme], PALETTE["paper"][theme]) >= least


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("step", range(RAMP_STEPS))
def test_numbers_can_be_read_on_every_step_of_the_heat_map(theme: int, step: int) -> None:
    ink = "on-pale" if step < RAMP_STEPS // 2 else "on-deep"
    assert contrast(PALETTE[ink][theme], PALETTE[f"ramp-{step}"][theme]) >= 4.5


@pytest.mark.parametrize("theme", [0, 1])
def test_the_ramp_moves_away_from_the_paper_step_by_step(theme: int) -> None:
    distances = [contrast(PALETTE[f"ramp-{step}"][theme], PALETTE["paper"][theme]) for step in range(RAMP_STEPS)]
    assert distances == sorted(distances)


def test_light_colours_name_their_role() -> None:
    assert len({colours[0] for colours in PALETTE.values()}) == len(PALETTE)


def test_modes_keep_their_colour_and_unknown_modes_share_the_spare_ones() -> None:
    modes = ["raw", "zeta", "per_sample", "alpha"]
    assert [mode_role(mode, modes) for mode in modes] == ["raw", "other-2", "per_sample", "other-1"]
    assert mode_role("ink", ["ink"]) == "other-1"


def test_every_rule_has_a_variable_in_both_themes() -> None:
    for theme in ("light", "dark"):
        assert all(f"{one}: #" in variables()[theme] for one in re.findall(r"var\((--[\w-]+)\)", mode_rules()))


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
