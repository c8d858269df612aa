"""Frontalis: re-weights face embeddings nightly and measures whether it helped before anybody is served the result.

These are the names to import; everything else is the application's own.
"""

from models.dual_branch import DualBranchSENet
from models.se import SEBlock

__all__ = ["DualBranchSENet", "SEBlock"]
