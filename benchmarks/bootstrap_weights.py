"""Which weight an impostor pair should have in the bootstrap over subjects: coverage and width, simulated.

    python -m benchmarks.bootstrap_weights [--subjects 60] [--experiments 400]

Impostor score of subjects s, t = shift_s + shift_t + noise; so FMR at a threshold has a known truth. Each experiment
draws new subjects and asks whether the 95% interval of FMR holds the truth, for four candidate weights;
`metrics.bootstrap` uses the last.
"""

import argparse
from statistics import NormalDist

import numpy as np

SHIFT, NOISE, DRAWS = 0.05, 0.08, 400


def drawn_rates(matches: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """FMR in every draw from the symmetric 0/1 matrix of matches and the multiplicities `[draws, subjects]`."""
    n_subjects = len(matches)
    ends, pairs = matches.sum(axis=1), n_subjects * (n_subjects - 1) / 2
    all_ends = np.full(n_subjects, n_subjects - 1)
    others = 1 - np.eye(n_subjects)
    product = ((times @ matches) * times).sum(axis=1) / ((times @ others) * times).sum(axis=1)
    return {
        "mean (m_s + m_t) / 2": (times @ ends) / (times @ all_ends),
        "projection m_s + m_t - 1": (times @ ends - ends.sum() / 2) / (times @ all_ends - pairs),
        "product m_s m_t": product,
        "squared sum (used)": (times @ ends) ** 2
        / (2 * max(ends.sum(), 1) * pairs)
        / ((times @ all_ends) / 2 / pairs) ** 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--subjects", type=int, default=60)
    parser.add_argument("--experiments", type=int, default=400)
    arguments = parser.parse_args()
    scores = NormalDist(0, np.sqrt(2 * SHIFT**2 + NOISE**2))
    print("| FMR | weight | 95% interval covers | mean width |\n|---:|---|---:|---:|")
    for fmr in (0.1, 0.01, 0.001):
        threshold = scores.inv_cdf(1 - fmr)
        found: dict[str, list[tuple[bool, float]]] = {}
        for seed in range(arguments.experiments):
            random = np.random.default_rng(seed)
            shift = random.normal(0, SHIFT, arguments.subjects)
            noise = random.normal(0, NOISE, (arguments.subjects, arguments.subjects))
            upper = np.triu(shift[:, None] + shift + noise >= threshold, 1)
            times = random.multinomial(arguments.subjects, np.full(arguments.subjects, 1 / arguments.subjects), DRAWS)
            for weight, rates in drawn_rates((upper | upper.T).astype(float), times.astype(float)).items():
                low, high = np.quantile(rates, [0.025, 0.975])
                found.setdefault(weight, []).append((low <= fmr <= high, high - low))
        for weight, pairs in found.items():
            covered, width = np.mean(pairs, axis=0)
            print(f"| {fmr:g} | {weight} | {covered:.1%} | {width:.4f} |")


if __name__ == "__main__":
    main()
