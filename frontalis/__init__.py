"""Frontalis: re-weights face embeddings nightly and measures whether it helped before anybody is served the result.

These are the names to import; everything else is the application's own.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frontalis.store import Store, open_store
    from models.dual_branch import DualBranchSENet
    from models.se import SEBlock

__version__ = "0.1.0"

__all__ = ["DualBranchSENet", "SEBlock", "Store", "open_store"]


_MODULES = {
    "DualBranchSENet": "models.dual_branch",
    "SEBlock": "models.se",
    "Store": "frontalis.store",
    "open_store": "frontalis.store",
}


def __getattr__(name: str) -> object:
    """Import a name when it is asked for: most commands need no torch, which takes a second to load."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
