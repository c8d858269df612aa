import re
import struct
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from reports.theme import (
    PALETTE,
    RAMP_STEPS,
    drawing,
    inline_svg,
    light,
    mode_role,
    mode_rules,
    plot_rules,
    png_file,
    svg_file,
    variables,
)

HOSTILE = '</text></svg><script>alert(1)</script><img src=x onerror="alert(2)">$\\frac{$ \u202e\x00 --> ]]>'


@drawing()
def drawn(text: str = "score", colour: str | None = None) -> Figure:
    figure = Figure(figsize=(2, 1), facecolor="none")
    axes = figure.add_axes((0.2, 0.2, 0.7, 0.7))
    axes.set_facecolor("none")
    axes.tick_params(color=light("rule"), labelcolor=light("muted"))
    for spine in axes.spines.values():
        spine.set_color(light("rule"))
    axes.plot([0, 1], [0, 1], "o--", color=colour or light("raw"), clip_on=True)
    axes.text(0.1, 0.5, text, color=light("ink"))
    return figure


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


def test_modes_keep_their_colour_and_strangers_share_the_spare_ones() -> None:
    modes = ["raw", "zeta", "per_sample", "alpha"]
    assert [mode_role(mode, modes) for mode in modes] == ["raw", "other-2", "per_sample", "other-1"]
    assert mode_role("ink", ["ink"]) == "other-1"


def test_every_class_has_a_rule_and_every_rule_a_variable() -> None:
    svg = inline_svg(drawn(), "plot", "a plot")
    used = {name for names in re.findall(r'class="([^"]*)"', svg) for name in names.split()} - {"plot"}
    rules = plot_rules() + mode_rules()
    assert used >= {"s-raw", "f-ink", "f-muted"}
    assert all(f".{name} {{" in rules for name in used)
    for theme in ("light", "dark"):
        assert all(f"{variable}: #" in variables()[theme] for variable in re.findall(r"var\((--[\w-]+)\)", rules))


def test_inline_svg_holds_nothing_but_shapes_and_text() -> None:
    root = ElementTree.fromstring(inline_svg(drawn(HOSTILE), "plot", HOSTILE))
    assert {part.tag for part in root.iter()} <= {"svg", "g", "path", "text", "defs", "clipPath", "rect", "use"}
    assert not [name for part in root.iter() for name in part.attrib if name == "style" or name.startswith("on")]
    assert "alert(2)" in "".join(root.itertext())
    assert root.get("role") == "img"
    assert "\\u202e\\u0000" in root.get("aria-label", "")


def test_ids_of_two_figures_differ_and_every_reference_resolves() -> None:
    roots = [ElementTree.fromstring(inline_svg(drawn(), name, "a plot")) for name in ("one", "two")]
    ids = [{part.get("id") for part in root.iter() if part.get("id")} for root in roots]
    assert ids[0]
    assert not ids[0] & ids[1]
    for root, known in zip(roots, ids, strict=True):
        references = {part.get("href", "")[1:] for part in root.iter("use")}
        references |= {part.get("clip-path", "")[5:-1] for part in root.iter() if part.get("clip-path")}
        assert references == known


def test_a_colour_outside_the_palette_is_refused() -> None:
    with pytest.raises(ValueError, match="stroke #123456 is not a colour of the palette"):
        inline_svg(drawn(colour="#123456"), "plot", "a plot")


def test_a_picture_element_is_refused() -> None:
    with drawing():
        figure = Figure(figsize=(1, 1), facecolor="none")
        figure.add_axes((0, 0, 1, 1)).imshow([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="'image' is not among those allowed"):
        inline_svg(figure, "plot", "a plot")


def test_files_are_the_same_every_time() -> None:
    assert svg_file(drawn(), "plot", "a plot") == svg_file(drawn(), "plot", "a plot")
    assert png_file(drawn()) == png_file(drawn())


def test_svg_file_stands_alone_in_both_themes() -> None:
    content = svg_file(drawn(HOSTILE), "plot", HOSTILE)
    root = ElementTree.fromstring(content)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (root.get("width"), root.get("height")) == ("144", "72")
    style = root.findtext("{http://www.w3.org/2000/svg}style", "")
    assert "prefers-color-scheme: dark" in style
    assert PALETTE["raw"][1] in style
    assert b"http" not in content.replace(b"http://www.w3.org/2000/svg", b"")


def test_png_file_is_twice_the_size_of_the_drawing() -> None:
    content = png_file(drawn())
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (288, 144)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(mpl.rcParams)
    inline_svg(drawn(), "plot", "a plot")
    assert dict(mpl.rcParams) == before
