"""What a model has seen: keyed 64-bit hashes of the names and of the rows that it was trained or selected on.

A name is hashed as it compares: NFC, without blanks at either end, case folded.

A row is hashed as a direction, since copies of it differ in length (L2 normalisation) and in the last bits (float16 or
float32). In float64,

    p_j = w_j · x / (|x| σ),   j = 1 … 256,
    hash = BLAKE2b(signs of p_1 … p_256, key),

with weights w_j that SHAKE-256 derives from the key: odd integers, uniform within ±2^16, of standard deviation σ. So
p_j is about standard normal over rows. The hash is that of a sign code (random hyperplanes; Charikar, "Similarity
estimation techniques from rounding algorithms", STOC 2002). Rounding can change a sign only where p_j is near 0, and
such signs are looked up both ways. Rounding to float16 moves p_j by about 2e-4, a twentieth of `DOUBT`. Of 1,625 real
rows it changes a sign in 27; none is missed where both signs are tried (`tests/models/test_seen.py`).

Rows of one direction to within rounding therefore hash alike. At cosine 0.9 all signs of two rows agree with a
probability of 1e-17, at 0.99 of 1e-5. The hashes are pseudonyms: who has the file can test a name or a vector, and
cannot read one from it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.split import subject_key
from schemas.identity import folded_text

SIGNS = 256
DOUBT = 2.0**-8
_MOST_DOUBTFUL = 10  # signs of a row that are tried both ways; of real rows one in 1e8 has more
_SIGMA = 2**16 / 3**0.5
_BLOCK = 8192  # rows whose projections are in memory at once: 16 MiB

Hashes = NDArray[np.int64]


@dataclass(frozen=True)
class Seen:
    """What a checkpoint records of its training and validation data: hashes of subjects, and of rows.

    `rows` is None in files of earlier versions.
    """

    subjects: Hashes
    rows: Hashes | None = None

    @classmethod
    def of(cls, subjects: Iterable[str], rows: Sequence[NDArray[np.floating]], key: str) -> "Seen":
        """Hash names, and embeddings given in parts of `[N, D]`."""
        return cls(name_hashes(subjects, key), np.concatenate([row_hashes(part, key) for part in rows]))


def name_hashes(names: Iterable[str], key: str) -> Hashes:
    """Return the hash of each name, int64 `[N]`; equal for names that differ in case, blanks at the ends, or NFC."""
    return np.fromiter((subject_key(folded_text(name), key) for name in names), np.int64)


def row_hashes(x: NDArray[np.floating], key: str) -> Hashes:
    """Return the hash of each row of `[N, D]`, int64 `[N]`.

    Two copies of a row may hash differently where a sign is in doubt: look rows up with `rows_in`.
    """
    found = [_hash(code, key) for block in _blocks(x) for code in _codes(_projected(block, key))]
    return np.array(found, np.int64)


def rows_in(x: NDArray[np.floating], hashes: Hashes, key: str) -> NDArray[np.bool_]:
    """Return for each row of `[N, D]` whether it, or a copy of it, is among hashed rows.

    Args:
        x: rows of any float type, normalised or not.
        hashes: those of `row_hashes` under the same key, sorted.
        key: that of the hashes.

    >>> rows = np.random.default_rng(0).normal(size=(3, 64))
    >>> rows_in(rows.astype(np.float16), np.sort(row_hashes(rows[:2], "k")), "k").tolist()
    [True, True, False]
    """
    tried: list[int] = []
    variants = []
    for block in _blocks(x):
        projected = _projected(block, key)
        doubtful = np.abs(projected) < DOUBT
        for row, code in enumerate(_codes(projected)):
            at = np.flatnonzero(doubtful[row])
            if len(at) > _MOST_DOUBTFUL:
                at = at[np.argsort(np.abs(projected[row, at]))[:_MOST_DOUBTFUL]]
            codes = [code]
            for sign in at.tolist():
                codes += [one ^ (1 << (SIGNS - 1 - sign)) for one in codes]
            tried += [_hash(one, key) for one in codes]
            variants.append(len(codes))
    seen = np.zeros(len(x), bool)
    seen[np.repeat(np.arange(len(x)), variants)[np.isin(np.array(tried, np.int64), hashes)]] = True
    return seen


def _blocks(x: NDArray[np.floating]) -> Iterable[NDArray[np.floating]]:
    return (x[start : start + _BLOCK] for start in range(0, len(x), _BLOCK))


def _projected(x: NDArray[np.floating], key: str) -> NDArray[np.float64]:
    rows = torch.from_numpy(x.astype(np.float64))
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(np.finfo(np.float64).tiny)
    stream = hashlib.shake_256(key.encode()).digest(2 * SIGNS * x.shape[1])
    # Row by row of w, so that the weights of a dimension do not depend on how many there are.
    weights = 2.0 * np.frombuffer(stream, "<i2").astype(np.float64).reshape(x.shape[1], SIGNS) + 1
    return np.asarray((rows / lengths @ torch.from_numpy(weights / _SIGMA)).numpy())


def _codes(projected: NDArray[np.float64]) -> list[int]:
    """Return the signs of each row as an integer, the first sign in its highest bit."""
    return [int.from_bytes(code.tobytes()) for code in np.packbits(projected > 0, axis=1)]


def _hash(code: int, key: str) -> int:
    digest = hashlib.blake2b(code.to_bytes(SIGNS // 8), digest_size=8, key=key.encode()).digest()
    return int.from_bytes(digest, "little", signed=True)
