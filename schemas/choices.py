"""Names that a person chooses among, as types without any import: settings, flows and the command line share them."""

from typing import Literal

Mode = Literal["per_sample", "batch_stat"]
SearchedMode = Literal["per_sample", "batch_stat", "raw"]
Architecture = Literal["dual_branch_ensemble", "dual_branch", "se"]
Loss = Literal["global_threshold", "supcon", "triplet"]
By = Literal["row", "subject"]
