"""What a command shows when the world around it is broken: one line and an exit code, from real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
FRONTALIS = [sys.executable, "-m", "frontalis"]


def shell(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `$F` is the command line."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", words],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=folder,
        timeout=120,
        check=False,
        env={**os.environ, "F": " ".join(FRONTALIS)},
    )


@pytest.mark.parametrize(
    "words", ["releases --store $'caf\\xe9'", "query --store x --id $'\\xff'", "synth $'\\xc3\\x28'", "$'\\xff'"]
)
def test_arguments_that_are_no_utf8_are_refused(tmp_path, words) -> None:
    done = shell(f"$F {words}", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("frontalis: ")
    assert line.endswith("is no UTF-8; type or name it in UTF-8.")


def test_output_that_cannot_be_written_is_an_error(tmp_path) -> None:
    done = shell("$F -q synth shards --subjects 2 --per-subject 2 --dim 8 --shards 1 > /dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "frontalis: stdout cannot be written (No space left on device); the work itself is done."
    ]
    assert len(list(tmp_path.glob("shards/*.parquet"))) == 1


@pytest.mark.parametrize("setting", ["PYTHONIOENCODING=ascii", "PYTHONIOENCODING=ascii:strict"])
def test_a_terminal_that_lacks_a_character_shows_its_number(tmp_path, setting) -> None:
    done = shell(f"{setting} $F -q synth gesichter-é --subjects 2 --per-subject 2 --dim 8 --shards 1", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("gesichter-\\xe9\n")


@pytest.mark.parametrize(
    "words",
    [
        "vacuum --grace-hours inf", "vacuum --grace-hours nan", "vacuum --wait nan", "vacuum --wait 1e300",
        "forget --id x --wait inf", "query --id x -k " + "9" * 30, "query --id x -k -1",
    ],
)  # fmt: skip
def test_numbers_that_are_out_of_range_are_refused(tmp_path, words) -> None:
    done = shell(f"$F {words} --store {tmp_path}", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert words.split()[-2] in done.stderr


def test_stack_frames_of_compiled_libraries_stay_out_of_messages(tmp_path) -> None:
    log = tmp_path / "store" / "releases" / "_delta_log"
    log.mkdir(parents=True)
    (log / "00000000000000000000.json").write_text("{")
    done = shell("RUST_BACKTRACE=1 $F releases --store store", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "stack backtrace" not in line
    assert "\\n" not in line


def test_a_reader_that_has_read_enough_is_no_error(tmp_path) -> None:
    done = shell("$F -q synth shards --subjects 2 --per-subject 2 --dim 8 --shards 1 | true", tmp_path)
    assert done.returncode in (0, 1)
    assert done.stderr == ""


def test_a_closed_stdout_is_no_error(tmp_path) -> None:
    done = shell("$F -q synth shards --subjects 2 --per-subject 2 --dim 8 --shards 1 >&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


BROKEN = """
import errno, sys, typer
from frontalis.process import run
from schemas.errors import StoreBusyError
app = typer.Typer()
@app.command()
def command() -> None:
    print("an outcome")
    {body}
@app.command()
def other() -> None: ...
sys.argv = ["frontalis", "command"]
sys.exit(run(app))
"""


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    ("body", "where", "code", "said"),
    [
        ("raise StoreBusyError('busy')", "/dev/full", 3, "frontalis: busy"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device')",
            "/dev/full",
            1,
            "frontalis: No space left on device.",
        ),
        ("raise OSError(errno.ENOSPC, 'No space left on device')", "out", 1, "frontalis: No space left on device."),
        (
            "raise BrokenPipeError(errno.EPIPE, 'Broken pipe')",
            "out",
            1,
            "frontalis: Broken pipe: the other end",
        ),
        ("pass", "/dev/full", 1, "frontalis: stdout cannot be written (No space left on device)"),
        ("pass", "out", 0, ""),
    ],
)
def test_the_exit_code_is_that_of_the_work(tmp_path, body, where, code, said, buffered) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    if not buffered:
        environment["PYTHONUNBUFFERED"] = "1"
    with (tmp_path / where).open("w") as out:
        words = [sys.executable, "-c", BROKEN.format(body=body)]
        done = subprocess.run(
            words, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, check=False, env=environment
        )
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == bool(said)
    if where == "out":
        assert (tmp_path / "out").read_text() == "an outcome\n"


def test_what_the_system_refuses_names_the_file(tmp_path) -> None:
    (tmp_path / "file").touch()
    done = shell("$F -q synth file/shards --subjects 2 --per-subject 2 --dim 8 --shards 1", tmp_path)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("frontalis: ")
    assert "file/shards" in line
    assert "Not a directory" in line or "not a folder" in line


def test_a_mistyped_option_is_refused_with_its_name(tmp_path) -> None:
    done = shell("$F releases --stor x", tmp_path)
    assert done.returncode == 2
    assert "--stor" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_defect_keeps_its_traceback(tmp_path) -> None:
    code = (
        "import sys, typer\nfrom frontalis.process import run\napp = typer.Typer()\n"
        "@app.command()\ndef broken() -> None:\n    raise KeyError('defect')\n"
        "sys.argv = ['broken']\nsys.exit(run(app))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "KeyError: 'defect'" in done.stderr


SYNTH = "umask 000; $F -q synth shards --subjects 2 --per-subject 2 --dim 8 --shards 1 && stat -c %a shards shards/*"


@pytest.mark.parametrize(
    ("setting", "modes"),
    [("", ["700", "600"]), ("FRONTALIS_UMASK=027 ", ["750", "640"]), ("FRONTALIS_UMASK=0 ", ["777", "666"])],
)
def test_new_files_are_for_their_owner_only(tmp_path, setting, modes) -> None:
    done = shell(SYNTH.replace("$F", f"{setting}$F"), tmp_path)
    assert done.stdout.split()[-2:] == modes, done.stderr


@pytest.mark.parametrize("value", ["secret", "-1", "777"])
def test_a_umask_that_is_none_is_refused(tmp_path, value) -> None:
    done = shell(f"FRONTALIS_UMASK={value} $F releases --store none", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"FRONTALIS_UMASK='{value}' is no umask" in done.stderr
