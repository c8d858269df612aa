"""The simulated gate keeps what its documentation promises, on few repeats."""

from benchmarks.gate import drift, outcomes


def test_harm_that_passed_before_is_rejected_and_equal_models_pass() -> None:
    equal = outcomes(350, (1.0, 1.0), repeats=60, seed=0)["after"]
    assert equal["promoted"] >= 0.95
    for harms in ((1.1, 1.0), (1.0, 1.1)):
        worse = outcomes(350, harms, repeats=60, seed=1)
        assert worse["after"]["promoted"] <= 0.05
    assert worse["before"]["promoted"] >= 0.9  # frontal–frontal FNMR was not guarded this tightly
    few = outcomes(35, (1.0, 1.0), repeats=60, seed=2)["after"]
    assert few["undecided"] > 0.05


def test_many_small_losses_do_not_add_up() -> None:
    ends = drift(100, 0.02, repeats=12, seed=0)
    assert ends["after"][0] < 0.06 < ends["before"][0]
