import pytest

from benchmarks.index import main


def test_a_small_size_compares_the_former_and_the_present_kind(capsys: pytest.CaptureFixture[str]) -> None:
    lines = main(["--rows", "3000", "--dim", "32"])
    assert [line.kind for line in lines] == ["IVF16,Flat", "PCAR16,IVF16,PQ4x4fs,RFlat"]
    assert all(line.recall_at_10 > 0.8 and line.queries > 0 for line in lines)
    assert capsys.readouterr().out.count("IVF16,") == 2
