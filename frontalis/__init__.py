"""Frontalis: re-weights face embeddings nightly and measures whether it helped before anybody is served the result.

These are the names to import; everything else is the application's own.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.dual_branch import DualBranchSENet
    from models.se import SEBlock

__all__ = ["DualBranchSENet", "SEBlock"]


def __getattr__(name: str) -> object:
    """Import a network when it is asked for: most commands need no torch, which takes a second to load."""
    if name == "DualBranchSENet":
        from models.dual_branch import DualBranchSENet

        return DualBranchSENet
    if name == "SEBlock":
        from models.se import SEBlock

        return SEBlock
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
