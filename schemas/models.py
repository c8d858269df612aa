"""The card inside a checkpoint, and the arguments each network is built from.

Everything here is checked data without torch. The networks, and the check that weights fit the card, are in `models`.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from schemas.choices import Mode as Mode
from schemas.split import SplitRule

Statistic = Literal["frozen", "batch"]
Precision = Literal["float32", "tf32", "bf16"]
Normalisation = Literal["none", "l2", "mean_norm"]

MAX_MEMBERS = 16  # memory and time grow with each
MAX_DIM = 65_536  # far above any embedding; keeps a hostile card from asking for the machine's memory
Dim = Annotated[int, Field(ge=1, le=MAX_DIM)]


def uses_batch(mode: str, statistic: Statistic) -> bool:
    """Return whether a feature depends on the batch that its row is in, so that `batch_size` decides its bytes."""
    return mode == "batch_stat" and statistic == "batch"


class _Arguments(BaseModel):
    """Constructor arguments as written to a card: exact types, no unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SEArguments(_Arguments):
    """Arguments of `models.se.SEBlock`."""

    channels: Dim
    reduction: Dim = 16
    use_batch_stat: bool = False

    @property
    def dim(self) -> int:
        """Length of the embeddings that go in and of the features that come out."""
        return self.channels


class DualBranchArguments(_Arguments):
    """Arguments of `models.dual_branch.DualBranchSENet`; `hidden_dim=None` means `feature_dim`."""

    feature_dim: Dim = 512
    reduction: Dim = 16
    fusion_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.7
    learnable_fusion: bool = True
    use_batch_stat: bool = False
    hidden_dim: Dim | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @property
    def dim(self) -> int:
        """Length of the embeddings that go in and of the features that come out."""
        return self.feature_dim


class DualBranchEnsembleArguments(DualBranchArguments):
    """Arguments of `models.dual_branch.DualBranchEnsemble`.

    How many members, what each is built from, and how much of the whitened row is mixed in.
    """

    members: Annotated[int, Field(ge=1, le=MAX_MEMBERS)] = 3
    hidden_dim: Dim | None = 128
    whitening: Annotated[float, Field(ge=0, le=10)] = 0.0


class ModelCard(BaseModel):
    """Everything needed to rebuild a network and to know what it was trained on.

    `normalisation` is how an embedding is scaled before it enters the network, in training and at inference alike.
    `mean_norm` is the mean length of the training embeddings; it goes with the normalisation of that name and no other.
    `training_data` is a digest of the training rows. `split` decides which subjects were trained on. `metrics` holds
    any JSON. `created` is free text (ISO 8601 by custom); leave it out where equal training must give equal bytes.

    `seen_key` is the key of the hashes of training subjects. It is random for each checkpoint: hashes of two
    checkpoints cannot be compared, and no table of names made in advance helps. In older files the key is the salt of
    the split.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    architecture: str
    arguments: dict[str, JsonValue]
    mode: Mode
    embedding_dim: Dim
    normalisation: Normalisation = "l2"
    mean_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    training_data: str | None = None
    split: SplitRule | None = None
    seen_key: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None
    metrics: dict[str, JsonValue] = {}
    versions: dict[str, str] = {}
    created: str | None = None

    @model_validator(mode="after")
    def _scale_is_known(self) -> Self:
        if (self.normalisation == "mean_norm") != (self.mean_norm is not None):
            raise ValueError(
                f"normalisation {self.normalisation!r} with mean_norm {self.mean_norm}; one needs the other"
            )
        return self
