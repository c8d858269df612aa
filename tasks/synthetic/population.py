"""The model of synthetic embeddings: subjects, and photographs of them from the front and from the side.

A population holds what all subjects have in common: the directions in which identities differ, and how the view changes
any face. So what is learned from some subjects holds for others. Numbers were set so that raw cosine behaves as
measured on real embeddings (`docs/synthetic.md`). Files, ids and bad rows are left to `tasks.synthetic.shards`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Shares of the squared length of an embedding, from covariances of 350 real subjects within and between views.
MEAN_FACE = 0.013
IDENTITY = 0.62
FRONTAL_NOISE = 0.33
PROFILE_NOISE = 0.64

TYPICAL_YAW = 55.0  # degrees, of a profile; its effects are given at this angle
IDENTITY_LOST = 0.43  # amplitude
SIDE_IDENTITY = 0.16  # what all profiles of a subject share, but its frontal photographs do not
COMMON_SHIFT = 0.19  # length of the mean change from front to side
# share of the noise in the few directions common to all subjects, which a network can learn to remove
FRONTAL_TURNING, PROFILE_TURNING = 0.3, 0.65

SUBJECT_SPREAD = 0.25  # logarithmic, how unequally the view affects subjects
FRONTAL_SPREAD, PROFILE_SPREAD = 0.7, 0.6  # logarithmic, how unequal photographs are
UNLIKE_FRONTAL, UNLIKE_PROFILE = 0.001, 0.015  # photographs that show something else

FRONTAL_LENGTH, PROFILE_LENGTH = 3.55, 2.37
USED_DIRECTIONS = 160


@dataclass(frozen=True)
class Photographs:
    """n photographs: `yaw`, `pitch` `[n]` in degrees, `embedding` float32 `[n, D]`, not normalised."""

    yaw: np.ndarray
    pitch: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True)
class SyntheticPopulation:
    """What is common to all subjects, in R ≤ D directions; the rows of `basis` `[R, D]` are their orthonormal base.

    Standard deviations along them are `identity` and `noise` `[R]`, each of squared length 1; `mean_face`, `left` and
    `right` `[R]` are unit vectors; turning the head adds noise in the r rows of `turning` `[r, R]`.
    """

    basis: np.ndarray
    identity: np.ndarray
    noise: np.ndarray
    mean_face: np.ndarray
    left: np.ndarray
    right: np.ndarray
    turning: np.ndarray

    @classmethod
    def draw(cls, dim: int, seed: int) -> "SyntheticPopulation":
        """Draw the population of `seed` for embeddings of `dim` numbers, at least 2.

        Networks leave many of their numbers redundant: of 512 real ones about 140 directions are in use, of 192 about
        60. Variances fall off exponentially along them, faster for identities than for noise.
        """
        numbers = np.random.default_rng([seed, dim])
        used = max(2, min(USED_DIRECTIONS, round(0.36 * dim)))
        basis = np.linalg.qr(numbers.standard_normal((dim, used)))[0].T
        identity = _falling(used, 0.28)
        common, left, right, mean_face = _unit(numbers.standard_normal((4, used)) * identity)
        turning = max(1, round(0.8 * used**0.5))
        directions = np.linalg.qr(numbers.standard_normal((used, turning)) * identity[:, None])[0].T
        return cls(
            basis=basis,
            identity=identity,
            noise=_falling(used, 0.5),
            mean_face=mean_face,
            left=_unit(0.95 * common + 0.31 * left),
            right=_unit(0.95 * common + 0.31 * right),
            turning=directions * _falling(turning, 0.6)[:, None],
        )

    def photograph(self, subjects: Sequence[np.random.Generator], frontal: int, profile: int) -> Photographs:
        """Photograph new subjects, each `frontal` times from the front, then `profile` times from either side.

        Each subject is drawn from its own generator, in a fixed order; what follows from the draws is computed for all
        subjects at once.
        """
        used, count, turning = len(self.identity), frontal + profile, len(self.turning)
        rows = len(subjects) * count
        of_subject = np.empty((len(subjects), 2 * used + 1 + count))
        left = np.empty((len(subjects), count), np.int64)
        frontal_yaw = np.empty((len(subjects), count))
        of_photograph = np.empty((len(subjects), count * (1 + 2 * used + turning)))
        chance = np.empty((len(subjects), count))
        of_camera = np.empty((len(subjects), 2 * count))
        for at, numbers in enumerate(subjects):
            numbers.standard_normal(out=of_subject[at])
            left[at] = numbers.integers(0, 2, count)
            frontal_yaw[at] = numbers.laplace(0, 3.2, count)
            numbers.standard_normal(out=of_photograph[at])
            numbers.random(out=chance[at])
            numbers.standard_normal(out=of_camera[at])
        subject, side_subject, suffering, profile_yaw = np.split(of_subject, [used, 2 * used, 2 * used + 1], axis=1)
        edges = count * np.cumsum([1, used, turning])
        blur, noise, moves, something_else = (part.reshape(rows, -1) for part in np.split(of_photograph, edges, axis=1))
        length_noise, pitch = np.split(of_camera, 2, axis=1)

        # a network of fewer directions has less noise and loses less by turning (measured: 60 against 140)
        scale = np.sqrt(used / USED_DIRECTIONS)
        subject = np.repeat(np.sqrt(IDENTITY) * self.identity * subject, count, axis=0)
        side_subject = np.repeat(np.sqrt(SIDE_IDENTITY) * self.identity * side_subject, count, axis=0)
        suffers = np.repeat(np.exp(SUBJECT_SPREAD * suffering), count, axis=0)

        from_side = np.tile(np.arange(count) >= frontal, len(subjects))
        profile_yaw = np.clip(TYPICAL_YAW + 9.5 * profile_yaw, 25, 85) * np.where(left == 0, -1, 1)
        yaw = np.where(from_side, profile_yaw.ravel(), np.clip(frontal_yaw, -15, 15).ravel())
        # how far an effect of turning has come: 0 from the front, 1 at the typical profile, and growing slowly beyond
        view = np.minimum((np.sin(np.radians(yaw)) / np.sin(np.radians(TYPICAL_YAW))) ** 2, 1.6)[:, None]
        part = np.minimum(view, 1)

        kept = np.clip(1 - scale * IDENTITY_LOST * suffers * view, 0, 1)
        shift = COMMON_SHIFT * view * np.where(yaw[:, None] < 0, self.left, self.right)
        face = np.sqrt(MEAN_FACE) * self.mean_face + kept * subject + np.sqrt(view) * side_subject + shift

        spread = np.exp((FRONTAL_SPREAD * (1 - part) + PROFILE_SPREAD * part) * blur)
        frontal_part, profile_part = scale * FRONTAL_NOISE * (1 - part) * spread, scale * PROFILE_NOISE * view
        blurred = frontal_part * (1 - FRONTAL_TURNING) + profile_part * (1 - PROFILE_TURNING) * spread
        moved = frontal_part * FRONTAL_TURNING + profile_part * PROFILE_TURNING
        latent = face + np.sqrt(blurred) * self.noise * noise
        latent += np.sqrt(moved) * (moves @ self.turning)

        unlike = chance.ravel() < np.where(from_side, UNLIKE_PROFILE, UNLIKE_FRONTAL)
        latent[unlike] = something_else[unlike] * self.noise
        length = FRONTAL_LENGTH + (PROFILE_LENGTH - FRONTAL_LENGTH) * np.minimum(view, 1.3)
        length = length * np.exp(0.09 * length_noise.reshape(rows, 1) - 0.05 * blur)
        embedding = ((length * _unit(latent)) @ self.basis).astype(np.float32)
        return Photographs(yaw, 6 * pitch.ravel(), embedding)


def _falling(count: int, reach: float) -> np.ndarray:
    """Return `count` standard deviations of squared length 1, whose squares fall by e every `reach`·`count`."""
    squares = np.exp(-np.arange(count) / (reach * count))
    return np.asarray(np.sqrt(squares / squares.sum()))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
