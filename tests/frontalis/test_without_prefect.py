"""Commands that need no flow do not import Prefect, and those that serve nothing no FastAPI: both take long to load."""

import subprocess
import sys
from pathlib import Path

COMMANDS = (
    ("rollback", "r1"),
    ("forget", "--id", "x"),
    ("vacuum",),
    ("verify",),
    ("releases",),
    ("query", "--id", "x"),
    ("anchor", "r1"),
)
IMPORTED = """
import sys
from typer.testing import CliRunner
from frontalis.cli import app
from frontalis.process import Command
for line in sys.stdin:
    done = CliRunner().invoke(app, line.split(), obj=Command())
    assert "does not exist" in str(done.exception), (line, done.exception)
    print(line.split()[0], sorted({name.partition(".")[0] for name in sys.modules} & {"prefect", "fastapi"}))
"""


def test_prefect_is_not_imported(tmp_path: Path) -> None:
    typed = "\n".join(" ".join((*words, "--store", str(tmp_path / "none"))) for words in COMMANDS)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], input=typed, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{words[0]} []" for words in COMMANDS]
