"""Which subjects train a model, which choose it, and which measure it.

The rule is a salted hash of the subject's name, so it needs no list: any machine that knows the salt and the fractions
decides the same, and a subject that arrives next year has its part already. Counting what fell where is left to the
training and evaluation tasks.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Part = Literal["train", "validation", "test"]
Fraction = Annotated[float, Field(ge=0, le=1)]

_KEY_BYTES = 64  # the longest key that BLAKE2b takes
_POSITION_BITS = 53  # positions on [0, 1) that a float64 holds exactly


def _fits_blake2b(salt: str) -> str:
    size = len(salt.encode())
    if not 1 <= size <= _KEY_BYTES:
        raise ValueError(f"the salt has {size} bytes in UTF-8; give one of 1 to {_KEY_BYTES} bytes")
    return salt


class SplitRule(BaseModel):
    """Salt and fractions that give every subject its part; the fractions sum to 1 (to 1e-9).

    Two rules with one salt and different fractions are nested: a larger `train` only adds subjects to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: Annotated[str, AfterValidator(_fits_blake2b)]
    train: Fraction = 0.8
    validation: Fraction = 0.1
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test = {total:g}; the three fractions must sum to 1")
        return self


def subject_key(subject: str, salt: str) -> int:
    """Return the signed 64-bit hash that stands for a subject: BLAKE2b (RFC 7693) keyed by the salt, little-endian.

    It fits an int64 column. Names cannot be read back from it, but whoever holds the salt can test a guessed name:
    it is a pseudonym, not an anonymisation. Raises `ValueError` for a salt that is empty or longer than 64 bytes.
    """
    digest = hashlib.blake2b(subject.encode(), digest_size=8, key=_fits_blake2b(salt).encode()).digest()
    return int.from_bytes(digest, "little", signed=True)


def split_of(subject: str, rule: SplitRule) -> Part:
    """Return the part of the split that the subject belongs to; a part with fraction 0 gets nobody.

    The hash is read as a position on [0, 1), where train, validation and test lie one after the other.
    """
    position = _position(subject, rule.salt)
    shares: tuple[tuple[Part, float], ...] = (
        ("train", rule.train),
        ("validation", rule.validation),
        ("test", rule.test),
    )
    taken: list[Part] = [part for part, share in shares if share > 0]
    edge = 0.0
    for part, share in shares:
        edge += share
        if position < edge:
            return part
    return taken[-1]  # fractions that sum to a hair under 1 leave a hair: it belongs to the last part that has anybody


def with_enough_validation(rule: SplitRule, subjects: Iterable[str], least: int) -> SplitRule:
    """Return the rule with as much more validation, at the cost of train, as gives it `least` of these subjects.

    The rule itself is returned where it gives as many, and where train would be left with fewer than that. Nobody
    enters or leaves test.
    """
    parts: dict[Part, list[float]] = {"train": [], "validation": [], "test": []}
    for subject in subjects:
        parts[split_of(subject, rule)].append(_position(subject, rule.salt))
    missing = least - len(parts["validation"])
    if missing <= 0 or len(parts["train"]) < missing + least:
        return rule
    train = sorted(parts["train"])[-missing]
    return rule.model_copy(update={"train": train, "validation": rule.train + rule.validation - train})


def _position(subject: str, salt: str) -> float:
    unsigned: int = subject_key(subject, salt) % 2**64
    return (unsigned >> (64 - _POSITION_BITS)) / float(2**_POSITION_BITS)
