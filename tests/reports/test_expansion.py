"""Query expansion in the report: the table by rows enrolled, and the advice that follows from the intervals alone."""

import pytest

from reports.expansion import expansion_advice, expansion_table
from schemas.reports import Estimate, ExpandedRates, ExpansionResult, Population, ReportInput

UNKNOWN = Estimate(value=None, reason="too few probes")
NONE = Estimate(value=0.0, low=-0.01, high=0.01)
UP = Estimate(value=0.02, low=0.01, high=0.03)
DOWN = Estimate(value=-0.02, low=-0.03, high=-0.01)


def group(enrolled: str, rank: Estimate, fnir: Estimate) -> ExpandedRates:
    return ExpandedRates(
        enrolled=enrolled,
        n_mated=90,
        rank={"1": Estimate(value=0.8)},
        fnir={"1e-2": Estimate(value=0.4), "1e-3": UNKNOWN},
        rank_difference={"1": rank},
        fnir_difference={"1e-2": fnir, "1e-3": UNKNOWN},
    )


@pytest.mark.parametrize(
    ("everybody", "alone", "says"),
    [
        ((NONE, DOWN), (NONE, NONE), "[query] expand = 5 is worth using: FNIR at FPIR 1% gets better, by −2.00 points"),
        ((UP, NONE), (NONE, NONE), "expand = 5 is worth using: the rank-1 rate gets better, by +2.00 points"),
        (
            (NONE, DOWN),
            (NONE, UP),
            "leave it off: FNIR at FPIR 1% of subjects with 1 row enrolled gets worse, by +2.00",
        ),
        (
            (DOWN, DOWN),
            (NONE, NONE),
            "leave it off: the rank-1 rate gets worse, by −2.00 points (95% interval −3.00 to",
        ),
        ((NONE, NONE), (UP, DOWN), "leave it off: no significant difference"),
        ((UNKNOWN, UNKNOWN), (UNKNOWN, UNKNOWN), "leave it off: too few probes to compare"),
    ],
)
def test_advice(everybody, alone, says) -> None:
    assert says in expansion_advice(ExpansionResult(rows=5, groups=[group("any", *everybody), group("1", *alone)]))


def test_table_has_a_group_for_each_number_of_rows_enrolled(report_input: ReportInput) -> None:
    population = report_input.evaluation.populations["held_out"]
    result = ExpansionResult(rows=5, groups=[group("any", UP, DOWN), group("1", DOWN, NONE)])
    modes = {
        name: mode.replaced(identification=mode.identification.replaced(expansion=result if name == "raw" else None))
        for name, mode in population.modes.items()
    }
    found = expansion_table(population.replaced(modes=modes))
    assert found is not None
    advice, table = found
    assert [line.split(":")[0] for line in advice] == ["raw"]
    assert table.heads == ["rank 1", "FNIR at FPIR 1%", "FNIR at FPIR 0.1%"]
    assert [(title, sizes) for title, sizes, _ in table.groups] == [
        ("all probes", "90 mated probes"),
        ("1 row enrolled", "90 mated probes"),
    ]
    (name, cells), (_, alone) = (rows[0] for _, _, rows in table.groups)
    assert name.name == "raw"
    assert [(cell.value, cell.difference, cell.sign, cell.verdict) for cell in cells] == [
        ("80.00", "+2.00", "↑", "better"),  # of a rank, higher is better
        ("40.00", "−2.00", "↓", "better"),
        ("n/e", None, "", None),
    ]
    assert (alone[0].verdict, table.notes) == ("worse", ["too few probes"])
    nothing = {name: mode.replaced(identification=None) for name, mode in population.modes.items()}
    assert expansion_table(Population.model_validate({**dict(population), "modes": nothing})) is None
