"""The palette of the page and its plots, in a light and a dark theme. Drawing is left to `reports.drawing`."""

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
