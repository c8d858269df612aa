"""Assign subjects to training, validation and test by a salted hash of their names.

No list is needed: any machine that knows the salt and the fractions decides the same, and a subject that arrives next
year has its part already.
"""

import hashlib

from schemas.split import Part, SplitRule, valid_salt

_POSITION_BITS = 53  # positions on [0, 1) that a float64 holds exactly


def subject_key(subject: str, salt: str) -> int:
    """Return the signed 64-bit hash that stands for a subject: BLAKE2b (RFC 7693) keyed by the salt, little-endian.

    It fits an int64 column. Names cannot be read back from it, but anybody with the salt can test a guessed name:
    it is a pseudonym, not an anonymisation. Raises `ValueError` for a salt that is empty or longer than 64 bytes.
    """
    digest = hashlib.blake2b(subject.encode(), digest_size=8, key=valid_salt(salt).encode()).digest()
    return int.from_bytes(digest, "little", signed=True)


def split_of(subject: str, rule: SplitRule) -> Part:
    """Return the part of the split that the subject belongs to; a part with fraction 0 stays empty.

    The hash is read as a position on [0, 1), which train, validation and test divide in this order.
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
    return taken[-1]  # the fractions may sum to slightly less than 1: the rest belongs to the last part in use


def _position(subject: str, salt: str) -> float:
    unsigned: int = subject_key(subject, salt) % 2**64
    return (unsigned >> (64 - _POSITION_BITS)) / float(2**_POSITION_BITS)
