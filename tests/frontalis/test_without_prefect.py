"""Commands that need no flow do not import Prefect, which takes seconds to load."""

import subprocess
import sys
from pathlib import Path

import pytest

IMPORTED = """
import sys
from typer.testing import CliRunner
from frontalis.cli import app
from frontalis.process import Command
done = CliRunner().invoke(app, sys.argv[1:], obj=Command())
assert not isinstance(done.exception, SystemExit), done.output
assert "does not exist" in str(done.exception), done.exception
print(sorted({name.partition(".")[0] for name in sys.modules} & {"prefect", "fastapi"}))
"""


@pytest.mark.parametrize(
    "words",
    [["rollback", "r1"], ["forget", "--id", "x"], ["vacuum"], ["verify"], ["releases"], ["query", "--id", "x"]],
    ids=lambda words: words[0],
)
def test_prefect_is_not_imported(tmp_path: Path, words: list[str]) -> None:
    command = [sys.executable, "-c", IMPORTED, words[0], "--store", str(tmp_path / "none"), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
