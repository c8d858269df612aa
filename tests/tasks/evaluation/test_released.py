"""Measuring a release again changes nothing in its store."""

from pathlib import Path

from tasks.evaluation.released import evaluate_release


def test_measuring_again_writes_nothing(published) -> None:
    """So that a kill at any moment leaves the store as it was."""
    store = published()

    def files() -> dict[Path, tuple[int, int, int]]:
        found = {path: path.stat() for path in store.rglob("*")}
        return {path: (one.st_ino, one.st_mtime_ns, one.st_size) for path, one in found.items()}

    before = files()
    assert evaluate_release(str(store)).populations
    assert files() == before
