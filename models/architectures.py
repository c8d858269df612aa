"""The networks a checkpoint can name: for each, its checked arguments and its constructor.

A new network joins by an entry here and, to be fast at inference, a rule in `models.folding`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue, ValidationError
from torch import nn

from models.dual_branch import DualBranchEnsemble, DualBranchSENet
from models.se import SEBlock
from schemas.errors import SettingsError, clipped
from schemas.models import DualBranchArguments, DualBranchEnsembleArguments, Mode, SEArguments

MOST_ERRORS = 5

Arguments = SEArguments | DualBranchArguments


@dataclass(frozen=True)
class Architecture:
    """How to check the arguments of a network, and how to build it from them."""

    arguments: type[Arguments]
    constructor: Callable[..., nn.Module]


ARCHITECTURES: Mapping[str, Architecture] = {
    "se": Architecture(SEArguments, SEBlock),
    "dual_branch": Architecture(DualBranchArguments, DualBranchSENet),
    "dual_branch_ensemble": Architecture(DualBranchEnsembleArguments, DualBranchEnsemble),
}


def build(name: str, arguments: Mapping[str, JsonValue]) -> nn.Module:
    """Return a new, untrained network. Raises `SettingsError` as `check_arguments`, or when its sizes do not fit."""
    checked = check_arguments(name, arguments)
    return ARCHITECTURES[name].constructor(**checked.model_dump())


def check_arguments(name: str, arguments: Mapping[str, Any]) -> Arguments:
    """Return the arguments with defaults filled in; `SettingsError` names the unknown network or the bad argument."""
    if name not in ARCHITECTURES:
        raise SettingsError(f"architecture {clipped(name)} is unknown; known are {', '.join(sorted(ARCHITECTURES))}")
    try:
        return ARCHITECTURES[name].arguments.model_validate(dict(arguments))
    except ValidationError as error:
        raise SettingsError(f"arguments of {name!r}: {describe(error)}") from error


def mode_of(arguments: Arguments) -> Mode:
    """Return the mode that a network with these arguments computes."""
    return "batch_stat" if arguments.use_batch_stat else "per_sample"


def describe(error: ValidationError) -> str:
    """Return what pydantic found as one line: the field, the value, and what is wanted, without internals."""
    found = error.errors(include_url=False, include_context=False)
    parts = [
        f"{'.'.join(map(str, item['loc'])) or 'the whole':.60} = {item['input']!r:.60}: {item['msg']}"
        for item in found[:MOST_ERRORS]
    ]
    more = f"; and {len(found) - MOST_ERRORS} more" if len(found) > MOST_ERRORS else ""
    return "; ".join(parts) + more
