import hashlib
import math

import numpy as np
import pytest
from pydantic import ValidationError

from models.split import split_of, subject_key
from schemas.split import SplitRule

RULE = SplitRule(salt="pepper", train=0.7, validation=0.1, test=0.2)
NAMES = [f"person {i}" for i in range(20_000)]


def test_subject_key_is_keyed_blake2b_as_signed_64_bit():
    digest = hashlib.blake2b("Zoë".encode(), key=b"pepper", digest_size=8).digest()
    assert subject_key("Zoë", "pepper") == int(np.frombuffer(digest, dtype="<i8")[0])
    keys = [subject_key(name, "pepper") for name in NAMES]
    assert np.array(keys, dtype=np.int64).tolist() == keys
    assert min(keys) < 0 < max(keys)
    assert len(set(keys)) == len(keys)
    assert subject_key("Zoë", "salt") != subject_key("Zoë", "pepper")


def test_split_stays_what_it_was_when_old_models_were_trained():
    expected = "train train validation test train test test test validation validation train train"
    assert [split_of(name, RULE) for name in NAMES[:12]] == expected.split()


def test_parts_have_the_wanted_sizes():
    parts = [split_of(name, RULE) for name in NAMES]
    for part, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        four_sigma = 4 * math.sqrt(share * (1 - share) / len(NAMES))
        assert parts.count(part) / len(NAMES) == pytest.approx(share, abs=four_sigma)


def test_another_salt_gives_another_split():
    other = RULE.model_copy(update={"salt": "salt"})
    assert sum(split_of(name, RULE) != split_of(name, other) for name in NAMES[:1000]) > 200


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_whole_and_empty_parts(part):
    rule = SplitRule(**{"salt": "x", "train": 0, "validation": 0, "test": 0, part: 1})
    assert {split_of(name, rule) for name in NAMES[:500]} == {part}


def test_hair_left_by_rounding_goes_to_the_last_part_that_has_anybody(monkeypatch):
    rule = SplitRule(salt="x", train=0.6, validation=0.4 - 1e-10, test=0)
    monkeypatch.setattr("models.split.subject_key", lambda subject, salt: -1)  # the highest position there is
    assert split_of("anybody", rule) == "validation"


def test_larger_train_share_only_adds_subjects():
    small = SplitRule(salt="x", train=0.3, validation=0.1, test=0.6)
    large = SplitRule(salt="x", train=0.6, validation=0.1, test=0.3)
    for name in NAMES[:1000]:
        if split_of(name, small) == "train":
            assert split_of(name, large) == "train"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"salt": ""}, "1 to 64 bytes"),
        ({"salt": "ä" * 33}, "66 bytes"),
        ({"salt": "x", "train": 0.9}, "must sum to 1"),
        ({"salt": "x", "train": 1.2, "validation": -0.1, "test": -0.1}, "train"),
        ({"salt": "x", "train": float("nan")}, "train"),
        ({"salt": "x", "seed": 3}, "seed"),
    ],
)
def test_rule_that_cannot_be_is_refused(fields, named):
    with pytest.raises(ValidationError, match=named):
        SplitRule(**fields)


@pytest.mark.parametrize("salt", ["", "x" * 65])
def test_subject_key_refuses_a_salt_that_blake2b_would(salt):
    with pytest.raises(ValueError, match="1 to 64 bytes"):
        subject_key("adam", salt)
