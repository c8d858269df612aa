"""Hashes of names and rows: copies of a row are found whatever their form, and nothing else is."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from models.seen import DOUBT, Seen, name_hashes, row_hashes, rows_in

KEY = 32 * "a"
REAL = Path(__file__).parents[2] / "../shared/data"


def forms(x: np.ndarray) -> dict[str, np.ndarray]:
    """The forms in which the same rows are stored: number types, lengths, and one rounding after another."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    half = x.astype(np.float16)
    return {
        "float32": x.astype(np.float32),
        "float16": half,
        "normalised": unit,
        "normalised float16": unit.astype(np.float16),
        "float16, normalised, float16": (half / np.linalg.norm(half.astype(np.float32), axis=1, keepdims=True)).astype(
            np.float16
        ),
        "a thousand times as long": 1000.0 * x,
    }


@pytest.mark.parametrize("dim", [32, 192, 512])
def test_every_form_of_a_row_is_found_and_no_other_row(dim: int) -> None:
    rows = np.random.default_rng(dim).standard_t(5, size=(4000, dim))
    hashes = np.sort(row_hashes(rows[:2000], KEY))
    assert len(np.unique(hashes)) == 2000
    for name, form in forms(rows).items():
        assert rows_in(form, hashes, KEY).tolist() == [True] * 2000 + [False] * 2000, name
    assert not rows_in(-rows[:100], hashes, KEY).any()
    assert not np.isin(row_hashes(rows[:2000], 32 * "b"), hashes).any()


@pytest.mark.skipif(not REAL.exists(), reason="real embeddings are not here (../shared/data)")
def test_real_rows_are_found_in_every_form_and_mirrored_or_other_pictures_are_not() -> None:
    def read(folder: str) -> np.ndarray:
        return pl.read_parquet(REAL / folder / "*.parquet")["embedding"].to_numpy().astype(np.float32)

    rows = read("cfp-dev-fr512")[::3]
    hashes = np.sort(row_hashes(rows, KEY))
    assert len(np.unique(hashes)) == len(rows)
    split = {name: int((~np.isin(row_hashes(form, KEY), hashes)).sum()) for name, form in forms(rows).items()}
    assert len(rows) == 1625
    assert (split["float32"], split["float16"], split["normalised float16"]) == (0, 27, 39)  # docs/decisions.md
    for name, form in forms(rows).items():
        assert rows_in(form, hashes, KEY).all(), name
    for other in (read("cfp-dev-fr512")[1::3], read("cfp-dev-mirrored-fr512")[::3], read("lfw-dev-fr512")[::3]):
        assert not rows_in(other, hashes, KEY).any()


def test_rows_at_a_boundary_and_hostile_rows_are_looked_up_in_bounded_time() -> None:
    rows = np.zeros((3, 64))
    rows[0, :2] = 1.0, -1.0
    rows[1, 0] = 1e-300
    hashes = np.sort(row_hashes(rows, KEY))
    assert rows_in(rows, hashes, KEY).all()  # the third, of length 0, has all its signs in doubt
    tilted = rows[:1] + DOUBT / 100 * np.random.default_rng(0).normal(size=(200, 64))
    assert rows_in(tilted, hashes, KEY).mean() > 0.95
    assert rows_in(np.zeros((0, 64)), hashes, KEY).shape == (0,)


def test_names_compare_without_case_blanks_and_unicode_form() -> None:
    spelt = ["Zo\u00eb M\u00fcller", " zoe\u0308 mu\u0308ller", "ZO\u00cb M\u00dcLLER "]
    assert len(set(name_hashes(spelt, KEY).tolist())) == 1
    assert name_hashes(["Stra\u00dfe"], KEY) == name_hashes(["STRASSE"], KEY)
    assert len(set(name_hashes(["zoe", "Zo\u00eb", "7", "07"], KEY).tolist())) == 4
    seen = Seen.of(["a"], [np.ones((2, 4)), np.eye(4)], KEY)
    assert len(seen.rows) == 6
