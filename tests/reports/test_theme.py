import re

import pytest

from reports.theme import PALETTE, RAMP_STEPS, mode_role, mode_rules, variables


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
