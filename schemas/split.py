"""The rule that assigns subjects to training, validation and test. Applying it is `models.split`."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Part = Literal["train", "validation", "test"]
Fraction = Annotated[float, Field(ge=0, le=1)]

_KEY_BYTES = 64  # the longest key that BLAKE2b takes


def valid_salt(salt: str) -> str:
    """Return the salt. Raises ValueError where BLAKE2b cannot take it as a key."""
    size = len(salt.encode())
    if not 1 <= size <= _KEY_BYTES:
        raise ValueError(f"the salt has {size} bytes in UTF-8; give one of 1 to {_KEY_BYTES} bytes")
    return salt


class SplitRule(BaseModel):
    """Salt and fractions that assign every subject to a part; the fractions sum to 1 (to 1e-9).

    Two rules with one salt and different fractions are nested: a larger `train` only adds subjects to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: Annotated[str, AfterValidator(valid_salt)]
    train: Fraction = 0.8
    validation: Fraction = 0.1
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test = {total:g}; the three fractions must sum to 1")
        return self
