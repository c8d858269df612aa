import json
from pathlib import Path

import pytest

from benchmarks.gpu import main


def test_a_small_size_runs_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "gpu.json"
    small = ["--device", "cpu", "--rows", "500", "--pair-rows", "700", "--dim", "32", "--repeats", "1"]
    lines = main([*small, "--json", str(report)])
    assert len(json.loads(report.read_text())["lines"]) == len(lines) == 14
    assert all(line.millions_per_second > 0 for line in lines)
    assert capsys.readouterr().out.count("exact scores: equal to the CPU") == 1
