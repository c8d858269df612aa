"""Query expansion on the labelled features of a store: rank-1 rate and FNIR at FPIR, by rows enrolled a subject.

    python -m benchmarks.expansion STORE [--mode per_sample] [--rounds 20]

Subjects are those that no model of the served release was trained or selected on. In each round another third of
them, drawn at random, is left out of the gallery (non-mated). Two kinds of gallery are searched:

- frontal: some frontal rows of each subject; probes are the profile rows, as in the evaluation;
- all: every row but the probe itself, as in a served store; probes are the profile or the frontal rows.

A probe is expanded with rows of the gallery that it is searched in. The last column counts the rounds in which FNIR at
FPIR 1% was lower than without expansion, those without a difference left out.
"""

import argparse

import numpy as np

from metrics.expansion import expanded
from metrics.poses import FRONTAL, PROFILE
from schemas.settings import EvaluationSettings
from storage.features import features_table
from storage.location import Location
from storage.releases import Releases
from storage.vectors.exact import unit_rows
from tasks.evaluation.leakage import TrainingData, held_out_rows
from tasks.evaluation.rows import LabelledRows, read_labelled, read_subject_index

PLAIN = (0, 3.0)
SETTINGS = (PLAIN, (1, 3.0), (3, 3.0), (5, 0.0), (5, 1.0), (5, 3.0), (10, 3.0), (20, 3.0))
FPIRS = (0.1, 0.01)
EVERY_ROW = 10**6


def held_out(store: str, mode: str) -> LabelledRows:
    history = Releases.of(Location(store))
    release = history.serving()
    snapshot = features_table(history.store).snapshot(release.features_version)
    labelled = read_subject_index(history.store, snapshot)
    settings = EvaluationSettings()
    training = TrainingData.of(history.store, release.models)
    rows = held_out_rows(history.store, snapshot, labelled, training, settings.max_rows).rows
    modes = list(dict.fromkeys(["raw", mode]))
    return read_labelled(history.store, snapshot, labelled, rows, modes, settings)


def rates(scores: np.ndarray, subjects: np.ndarray, probes: np.ndarray, mated: np.ndarray) -> list[float]:
    """Return the rank-1 rate and FNIR at each FPIR from all scores `[probes, gallery]`; -inf is not compared."""
    order = np.argsort(subjects, kind="stable")
    names, starts = np.unique(subjects[order], return_index=True)
    best = np.maximum.reduceat(scores[:, order], starts, axis=1)
    own = np.where(names == probes[:, None], best, -np.inf).max(axis=1)
    others = np.where(names == probes[:, None], -np.inf, best).max(axis=1)
    impostor = np.sort(others[~mated])[::-1]
    fnir = [float((own[mated] <= impostor[int(fpir * len(impostor))]).mean()) for fpir in FPIRS]
    return [float((own > others)[mated].mean()), *fnir]


def search(unit: np.ndarray, probes: np.ndarray, gallery: np.ndarray, rows: int, alpha: float) -> np.ndarray:
    itself = probes[:, None] == gallery
    queries, scores = unit[probes], np.where(itself, -np.inf, unit[probes] @ unit[gallery].T)
    if rows:
        near = np.argpartition(-scores, rows - 1, axis=1)[:, :rows]
        queries = expanded(queries, unit[gallery][near], np.take_along_axis(scores, near, 1), alpha)
    return np.where(itself, -np.inf, queries @ unit[gallery].T)


def measure(found: LabelledRows, mode: str, gallery: str, limit: int, probe_class: int, rounds: int) -> np.ndarray:
    """Return `[rounds, settings, 3]` rates."""
    unit = unit_rows(found.features[mode], found.features[mode].shape[1])
    subjects, result = found.subjects, []
    probes = np.flatnonzero(found.classes == probe_class)
    for number in range(rounds):
        random = np.random.default_rng(number)
        shuffled = random.permutation(np.unique(subjects))
        left_out = shuffled[: len(shuffled) // 3]
        enrolled = ~np.isin(subjects, left_out)
        if gallery == "frontal":
            enrolled &= found.classes == FRONTAL
        mixed = random.permutation(np.flatnonzero(enrolled))
        order = mixed[np.argsort(subjects[mixed], kind="stable")]
        starts = np.unique(subjects[order], return_index=True)[1]
        place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        rows = np.sort(order[place < limit])
        mated = np.isin(subjects[probes], subjects[rows])
        result.append(
            [rates(search(unit, probes, rows, *one), subjects[rows], subjects[probes], mated) for one in SETTINGS]
        )
    return np.array(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("--mode", default="per_sample")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    found = held_out(given.store, given.mode)
    print(f"{given.mode}: {len(found):,} rows of {len(np.unique(found.subjects))} subjects, {given.rounds} rounds\n")
    print("| gallery | probes | rows | expansion | rank 1, % | FNIR at FPIR 10%, % | at 1%, % | lower in |")
    print("|---|---|---:|---|---:|---:|---:|---:|")
    experiments = [("frontal", limit, PROFILE, "profile") for limit in (1, 2, 5, EVERY_ROW)]
    experiments += [("all", EVERY_ROW, PROFILE, "profile"), ("all", EVERY_ROW, FRONTAL, "frontal")]
    for gallery, limit, probe_class, name in experiments:
        measured = measure(found, given.mode, gallery, limit, probe_class, given.rounds)
        for at, (rows, alpha) in enumerate(SETTINGS):
            change = measured[:, at, 2] - measured[:, 0, 2]
            lower = f"{(change < 0).sum()} of {(change != 0).sum()}" if rows else ""
            what = f"{rows} row{'s' * (rows > 1)}, α = {alpha:g}" if rows else "none"
            values = " | ".join(f"{100 * value:.1f}" for value in measured[:, at].mean(axis=0))
            limited = "every" if limit == EVERY_ROW else limit
            print(f"| {gallery} | {name} | {limited} | {what} | {values} | {lower} |", flush=True)


if __name__ == "__main__":
    main()
