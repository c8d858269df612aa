"""What the evaluation tables say on a terminal: which threshold a rate belongs to, and every pose that was measured."""

import io
import logging
import re

import pytest
from rich.console import Console

from frontalis.evaluations import show_evaluation
from frontalis.history import short_reason
from frontalis.printing import print_evaluation
from frontalis.progress import ProgressBar
from schemas.metrics import RAW
from schemas.reports import (
    CellResult,
    Estimate,
    Evaluation,
    GateDecision,
    GuardedResult,
    IdentificationResult,
    IndexRecall,
    LimitResult,
    ModeResult,
    PairsResult,
    Population,
)

OWN, AT_ONE_THRESHOLD = 0.7179, 0.4667


def cell(n_genuine: int = 200, n_impostor: int = 4000) -> CellResult:
    return CellResult(
        n_genuine=n_genuine,
        n_impostor=n_impostor,
        eer=Estimate(value=0.12, low=0.1, high=0.14),
        auc=Estimate(value=0.9),
        d_prime=2.0,
        fnmr={"1e-3": Estimate(value=OWN)},
        fnmr_global={"1e-3": Estimate(value=AT_ONE_THRESHOLD, low=0.4, high=0.5)},
        fmr_global={"1e-3": 0.0054},
    )


def mode(name: str, **values: object) -> ModeResult:
    cells = {"frontal-profile": cell(), "half-unknown": cell(7, 1234), "unknown-unknown": cell(0, 0), "all": cell()}
    return ModeResult(**{"mode": name, "model_digest": None, "thresholds": {"1e-3": 0.4375}, "cells": cells, **values})


SEARCH = IdentificationResult(
    gallery="frontal",
    probes="profile",
    n_gallery=10,
    n_gallery_subjects=5,
    n_mated=20,
    n_non_mated=12,
    rank={"1": Estimate(value=0.8)},
    fnir={"1e-1": Estimate(value=0.31, low=0.28, high=0.34), "1e-2": Estimate(value=None, reason="too few")},
)


PAIRS = PairsResult(
    protocol="FP", n_pairs=242, missing=3, left_out=4636, copies=1, repeated=2, n_folds=2, accuracy_mean=0.9,
    accuracy_sd=0.01, eer=0.1,
)  # fmt: skip


def evaluation() -> Evaluation:
    worse = {"eer": Estimate(value=-0.02, low=-0.03, high=-0.01)}
    worse["fnmr_global@1e-3"] = Estimate(value=0.05, low=0.02, high=0.08)
    worse["fnmr@1e-3"] = Estimate(value=-0.3, low=-0.4, high=-0.2)
    modes = {
        RAW: mode(RAW, identification=SEARCH, pairs=[PAIRS]),
        "per_sample": mode("per_sample", difference={"frontal-profile": worse}),
    }
    population = Population(name="held_out", n_rows=90, n_subjects=9, left_out_subjects=0, left_out_rows=0, modes=modes)
    return Evaluation(
        release="r1", resamples=10, seed=0, fmrs=["1e-3"], unlabelled_rows=0, duplicate_rows=0,
        populations={"held_out": population},
        indexes={
            RAW: IndexRecall(kind="Flat", rows=90, recall_at_1=1.0, recall_at_10=1.0, queries=0),
            "per_sample": IndexRecall(kind="IVF8,SQ8", rows=90, recall_at_1=0.972, recall_at_10=0.9634, queries=64),
        },
    )  # fmt: skip


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_evaluation(evaluation(), as_json=False, details=True)
    return [re.sub(r" +", " ", line).strip() for line in capsys.readouterr().out.splitlines()]


def test_rates_belong_to_the_thresholds_printed_below_them(printed: list[str]) -> None:
    assert "FNMR % @ global FMR 1e-3" in printed[1]
    raw = next(line for line in printed if line.startswith("frontal–profile"))
    assert "46.67 [40.00, 50.00]" in raw
    assert "71.79" not in "\n".join(printed)
    assert any(line.startswith("score >= raw, global FMR 1e-3: 0.4375") for line in printed)
    assert any("at one threshold per mode; the FMR is over all impostor pairs" in line for line in printed)


def test_harm_at_the_one_threshold_is_seen_beside_the_gain_in_eer(printed: list[str]) -> None:
    (line,) = (line for line in printed if line.startswith("per_sample") and "better" in line)
    assert "−2.00 [−3.00, −1.00] better +5.00 [+2.00, +8.00] worse" in line


def test_every_pose_pair_that_holds_pairs_is_printed(printed: list[str]) -> None:
    names = [line.split(" raw ")[0] for line in printed if " raw " in line and "[" in line]
    assert names == ["all pairs", "frontal–profile", "half–unknown"]
    assert any(line.startswith("half–unknown") and line.endswith("7 1,234") for line in printed)


def test_misses_of_the_open_search_are_printed(printed: list[str]) -> None:
    (line,) = (line for line in printed if line.startswith("1:N"))
    assert "(20 mated, 12 non-mated): rank-1 80.00%" in line
    assert line.endswith("FNIR @ FPIR 1e-1 31.00 [28.00, 34.00]%; FNIR @ FPIR 1e-2 n/e")


def test_the_indexes_of_the_release_are_printed_with_their_recall(printed: list[str]) -> None:
    assert "index raw: Flat, 90 rows, exact" in printed
    assert "index per_sample: IVF8,SQ8, 90 rows, recall@1 97.20%, recall@10 96.34% over 64 queries" in printed


def test_pairs_that_were_not_compared_are_explained(printed: list[str]) -> None:
    assert (
        "pairs raw, FP: 2-fold accuracy 90.00 ± 1.00% over 242 pairs; 4,636 excluded: a row has no subject, is not "
        "held out, or was not sampled; 1 excluded: same id or identical embedding; 3 skipped: id not in this "
        "release; 2 repeated, each counted"
    ) in printed


def on_terminal(width: int, **options: bool) -> list[str]:
    file = io.StringIO()
    show_evaluation(Console(file=file, width=width, force_terminal=True, no_color=True), evaluation(), **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()


@pytest.mark.parametrize(
    ("width", "head", "row"),
    [
        (72, "pose pair mode EER % verdict FNMR@1e-3 % verdict", "per_sample 12.00 better 46.67 (few) worse"),
        (100, "pose pair mode EER % − raw verdict FNMR@1e-3 % − raw verdict",
         "per_sample 12.00 −2.00 better 46.67 (few) +5.00 worse"),
    ],
)  # fmt: skip
def test_a_narrow_terminal_gets_fewer_columns_and_whole_verdicts(width: int, head: str, row: str) -> None:
    lines = on_terminal(width)
    assert max(map(len, lines[1:])) <= width
    assert "…" not in "".join(lines)
    assert lines[1].split() == head.split()
    assert any(line.split() == row.split() for line in lines)
    assert not any(line.startswith(("1:N", "index", "score >=")) for line in lines), "these are for --details"
    assert any(line.startswith("pairs") for line in lines), "a pairs file was asked for"


def test_a_bar_shows_stages_and_lines_stay_above_it() -> None:
    file = io.StringIO()
    bar = ProgressBar(Console(file=file, width=80, force_terminal=True))
    log = logging.Logger("frontalis.test")
    log.addHandler(bar)
    log.info("plan: 3 shards")
    log.info("moved", extra={"stage": "reweight", "done": 500, "total": 1000})
    log.warning("a shard is bad", extra={"stage": "reweight", "done": 500, "total": 1000})
    bar._progress.refresh()
    bar.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert shown.startswith("plan: 3 shards\n")
    assert "reweight" in shown
    assert "500 of 1,000" in shown
    assert "a shard is bad" in shown
    assert "moved" not in shown
    log.info("after")
    assert file.getvalue().endswith("after\x1b[0m\n")


def test_reasons_in_a_few_words() -> None:
    def decided(**values: object) -> str:
        return short_reason(
            GateDecision(**{"promoted": False, "reason": "why; and more", "compared_with": "r1", **values})
        )

    limit = LimitResult(setting="max_removed_rows", count=5, total=6, limit=0.2)
    judged = GuardedResult(
        mode="per_sample", cell="frontal-profile", metric="eer", tolerance=0, value=0.1, reference="r1",
        difference=Estimate(value=0.1), outcome="worse",
    )  # fmt: skip
    assert decided(promoted=True) == "not worse than r1"
    assert decided(limits=[limit]) == "83.3% of rows removed"
    assert decided(missing_modes=["batch_stat"]) == "lacks batch_stat"
    assert decided(judged=[judged]) == "per_sample frontal–profile EER: worse than served"
    undecided = judged.replaced(outcome="undecided", against="anchor")
    assert decided(judged=[undecided]) == "per_sample frontal–profile EER: too few subjects to compare with anchor"
    assert decided(judged=[judged.replaced(outcome="not compared")]) == "cannot be compared with r1"
    assert decided() == "why"
