"""What a release's models were trained on, by name and by row: such subjects stay out, and the notes say so."""

from dataclasses import replace

import numpy as np
import pytest

from models.checkpoint import load, save
from models.seen import Seen
from schemas.errors import StoreError
from schemas.features import digest_of
from schemas.releases import ModelRef
from storage.location import Location
from tasks.evaluation import leakage
from tasks.evaluation.leakage import TrainingData, held_out_rows
from tasks.evaluation.rows import SubjectIndex

KEY = 32 * "0"
NAMES = [f"person {number:03d}" for number in range(60)]
SUBJECTS = np.repeat(np.arange(60), 3)
ROWS = np.random.default_rng(0).normal(size=(180, 32)).astype(np.float32)


def ref(path: str) -> ModelRef:
    return ModelRef(path=path, file_digest="", digest="", statistic="frozen", dim=32)


@pytest.fixture
def store(tmp_path, make_checkpoint) -> Location:
    """Models that have seen the first ten subjects, nobody, or do not say; and one that records names only."""
    made = load(make_checkpoint(tmp_path / "made.safetensors"))
    models = {
        "ten": Seen.of(NAMES[:10], [ROWS[:30]], KEY),
        "nobody": Seen.of([], [ROWS[:0]], KEY),
        "silent": None,
        "names": replace(Seen.of(NAMES[:10], [ROWS[:0]], KEY), rows=None),
    }
    for name, seen in models.items():
        save(made.card, made.model, tmp_path / f"{name}.safetensors", seen)
    return Location(str(tmp_path))


@pytest.fixture
def held_out(store, monkeypatch):
    """`held_out(names, limit, mode=model …)` gives the codes of the held-out subjects, and the notes."""
    monkeypatch.setattr(leakage, "read_raw", lambda store, features, labelled, rows: ROWS[rows].astype(np.float16))

    def found(names: list[str], limit: int = 1000, **models: str) -> tuple[list[int], list[str]]:
        labelled = SubjectIndex(names, SUBJECTS, ["part"], np.zeros(180, np.int64), np.arange(180), 0)
        training = TrainingData.of(store, {mode: ref(f"{name}.safetensors") for mode, name in models.items()})
        result = held_out_rows(store, None, labelled, training, limit)
        return sorted(set(SUBJECTS[result.rows].tolist())), result.notes

    return found


def test_subjects_of_any_model_stay_out_by_name(held_out) -> None:
    kept, notes = held_out(NAMES, per_sample="nobody", batch_stat="ten")
    assert kept == list(range(10, 60))
    assert notes == ["mode per_sample: the model was trained and selected on none of the 60 labelled subjects"]
    assert held_out([name.upper() for name in NAMES], per_sample="ten") == (kept, [])


def test_renamed_subjects_are_known_by_their_rows_and_the_notes_warn(held_out) -> None:
    kept, notes = held_out([str(number) for number in range(60)], per_sample="ten")
    assert kept == list(range(10, 60))
    assert notes == [
        "warning: mode per_sample: 10 subjects were left out whose rows the model was trained or selected on under "
        "other names; it knows nobody here by name: were the subjects renamed?"
    ]
    kept, notes = held_out([f"{name} II" if at == 4 else name for at, name in enumerate(NAMES)], per_sample="ten")
    assert kept == list(range(10, 60))
    assert notes == [
        "warning: mode per_sample: 1 subject was left out whose rows the model was trained or selected on under other "
        "names"
    ]


def test_a_sample_is_searched_until_it_holds_nobody_who_was_seen(held_out) -> None:
    names = [f"new {number}" for number in range(60)]
    order = sorted(range(60), key=lambda at: digest_of(names[at].encode()))
    kept, _ = held_out(names, limit=30, per_sample="ten")
    first = [at for at in order if at in kept][:10]
    assert min(first) >= 10
    assert len(kept) < 60


def test_models_that_record_no_names_or_no_rows_are_noted(held_out, store) -> None:
    kept, notes = held_out(NAMES, per_sample="silent")
    assert kept == list(range(60))
    assert "does not record its training subjects" in notes[0]
    assert "leakage cannot be excluded" in notes[0]
    kept, notes = held_out(NAMES, per_sample="names")
    assert kept == list(range(10, 60))
    assert "not their rows, so a subject who was renamed is not recognised" in notes[0]
    with pytest.raises(StoreError, match=r"gone\.safetensors: the model is missing"):
        TrainingData.of(store, {"per_sample": ref("gone.safetensors")})


def test_rows_of_the_served_models_count_as_well(store) -> None:
    training = TrainingData.of(store, {"per_sample": ref("ten.safetensors"), "batch_stat": ref("nobody.safetensors")})
    seen = training.seen([f"new {number}" for number in range(60)], SUBJECTS[::-1], ROWS)
    assert np.flatnonzero(seen).tolist() == list(range(50, 60))
