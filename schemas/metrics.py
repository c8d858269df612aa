"""Names of what is measured: modes, populations, pose cells and metric ids.

Records, settings, the gate and the report all use these. Words for people are made in `reports.text`.
"""

from collections.abc import Collection
from decimal import Decimal
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

RAW = "raw"
MODES = (RAW, "per_sample", "batch_stat")  # the order of every table, plot and log

ALL = "all"  # every labelled subject, where it names a population; every pair, where it names a cell
HELD_OUT = "held_out"  # subjects that no model was trained or selected on

POSE_CLASSES = ("frontal", "half", "profile", "unknown")


def pose_cell(first: str, second: str) -> str:
    """Return the name of the cell of two pose classes: `frontal-profile`, in the order of `POSE_CLASSES`.

    Raises ValueError for anything that is no pose class.

    >>> pose_cell("profile", "frontal")
    'frontal-profile'
    """
    if unknown := {first, second} - set(POSE_CLASSES):
        raise ValueError(f"{min(unknown)!r} is no pose class; use {', '.join(POSE_CLASSES)}")
    return "-".join(sorted((first, second), key=POSE_CLASSES.index))


FRONTAL_FRONTAL = pose_cell("frontal", "frontal")
FRONTAL_PROFILE = pose_cell("frontal", "profile")
PROFILE_PROFILE = pose_cell("profile", "profile")
MAIN_CELLS = (ALL, FRONTAL_FRONTAL, FRONTAL_PROFILE, PROFILE_PROFILE)  # shown first, in this order


def measured_modes(models: Collection[str]) -> list[str]:
    """Return raw and the modes that have a model, in the order of `MODES`.

    >>> measured_modes({"batch_stat", "per_sample"})
    ['raw', 'per_sample', 'batch_stat']
    """
    return [mode for mode in MODES if mode == RAW or mode in models]


class MetricId(str):
    """The id of one verification metric, such as `eer` or `fnmr_global@1e-3`.

    | id | metric |
    |---|---|
    | `eer` | equal error rate |
    | `auc` | area under the ROC curve |
    | `fnmr@<fmr>` | FNMR at the FMR, at the cell's own threshold |
    | `fnmr_global@<fmr>` | FNMR of the cell at the threshold where all pairs together reach the FMR |
    | `fmr_global@<fmr>` | FMR of the cell at that same threshold |

    It is a string, so it can be a key of JSON. The rate has one spelling: `MetricId("fnmr@0.001") == "fnmr@1e-3"`.
    Raises ValueError for anything else.

    >>> MetricId("fnmr_global@0.001")
    MetricId('fnmr_global@1e-3')
    >>> MetricId.at("fnmr", 0.015).fmr
    0.015
    """

    __slots__ = ()
    _PLAIN = ("eer", "auc")
    _AT_FMR = ("fnmr", "fnmr_global", "fmr_global")

    def __new__(cls, text: str) -> "MetricId":
        """Check an id and spell its rate in the one way."""
        if isinstance(text, cls):
            return text
        kind, at, rate = text.partition("@")
        if (at and kind in cls._AT_FMR) or (not at and kind in cls._PLAIN):
            try:
                return super().__new__(cls, f"{kind}@{rate_text(rate)}" if at else kind)
            except ValueError as error:
                raise ValueError(f"{text!r}: {error}") from error
        raise ValueError(f"{text!r} is unknown; use 'eer', 'fnmr@<fmr>' or 'fnmr_global@<fmr>'")

    @classmethod
    def at(cls, kind: str, fmr: float | str) -> "MetricId":
        """Return the id of a kind of metric at a false match rate."""
        return cls(f"{kind}@{fmr}")

    @property
    def kind(self) -> str:
        """What is measured: `eer`, `auc`, `fnmr`, `fnmr_global` or `fmr_global`."""
        return self.partition("@")[0]

    @property
    def fmr(self) -> float | None:
        """The false match rate it is taken at, None for `eer` and `auc`."""
        rate = self.partition("@")[2]
        return float(rate) if rate else None

    @property
    def fmr_text(self) -> str:
        """The false match rate as records spell it: `1e-3`; empty for `eer` and `auc`."""
        return self.partition("@")[2]

    @property
    def is_global(self) -> bool:
        """Whether the threshold is that of all pairs together, not the cell's own."""
        return self.kind in ("fnmr_global", "fmr_global")

    def __repr__(self) -> str:
        return f"MetricId({str(self)!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let pydantic read and write it as a string."""
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


EER = MetricId("eer")
AUC = MetricId("auc")


def rate_text(rate: float | str) -> str:
    """Return the one spelling of a rate between 0 and 1.

    Raises ValueError for anything else.

    >>> rate_text(0.001), rate_text("0.05"), rate_text(1.5e-6)
    ('1e-3', '5e-2', '1.5e-6')
    """
    try:
        number = float(rate)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise ValueError(f"{rate!r} is no rate between 0 and 1, such as '1e-3'")
    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    assert isinstance(exponent, int)
    first, rest = str(digits[0]), "".join(map(str, digits[1:]))
    return f"{first}{'.' * bool(rest)}{rest}e{exponent + len(digits) - 1}"
