"""Training from shards to checkpoint: the split, what is refused, what a model is worth on held-out subjects."""

import itertools
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.checkpoint import load, to_bytes
from models.inference import Reweighter
from models.split import split_of
from schemas.errors import TrainingError
from schemas.settings import ColumnNames, TrainingSettings
from tasks.synthetic.shards import synthesize
from tasks.training.rows import read_training_rows
from tasks.training.selection import compare_by_pose, error_rates
from tasks.training.train import train_model

REAL = Path(__file__).parents[3] / "../shared/data"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    """Less exact standard errors, for a third of the time; `test_length.py` has the full number."""
    with mock.patch("tasks.training.length.DRAWS", 40):
        yield


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder, subjects=120, per_subject=10, dim=64, shards=2)
    return folder


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "model.safetensors"
    return train_model(settings([synthetic], out, steps=80, test=0.3, resamples=200))


def settings(sources, out, **changes):
    values = {"sources": tuple(map(str, sources)), "out": str(out), "steps": 4, "resamples": 20, "device": "cpu"}
    return TrainingSettings(**{**values, **changes})


def write(folder, x, subjects, **columns):
    folder.mkdir(exist_ok=True)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    table = {"id": [f"{folder.name}-{i}" for i in range(len(x))], "embedding": lists, "subject": subjects, **columns}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return folder


def people(subjects=60, each=6, dim=16, seed=0, noise=0.8):
    random = np.random.default_rng(seed)
    x = np.repeat(random.normal(size=(subjects, dim)), each, axis=0) + noise * random.normal(
        size=(subjects * each, dim)
    )
    return x.astype(np.float32), [f"person {number}" for number in range(subjects) for _ in range(each)]


def test_model_helps_the_subjects_that_its_card_calls_held_out(trained, synthetic):
    assert trained.improved
    assert trained.choice.best.score < 0
    assert trained.parts["validation"] == 0
    assert trained.choice.subjects == trained.parts["train"]
    assert trained.measured_on == "test"
    change = trained.difference["frontal-profile"]["eer"]
    assert change.low < change.high < 0
    # The same, computed again: from the file, through the inference graph, on the held-out subjects.
    checkpoint = load(Path(trained.out).read_bytes())
    rows = read_training_rows([str(synthetic)], ColumnNames())
    seen = checkpoint.has_seen(rows.subjects)
    held_out = rows.take(~seen)
    assert {split_of(name, checkpoint.card.split) for name in held_out.subjects} == {"test"}
    assert {split_of(name, checkpoint.card.split) for name in rows.subjects[seen]} == {"train"}
    assert checkpoint.has_seen_rows(rows.x.astype(np.float16)).tolist() == seen.tolist()
    _, codes = np.unique(held_out.subjects, return_inverse=True)
    front = Reweighter(checkpoint, device="cpu")(held_out.x)["front"]
    again = error_rates(compare_by_pose(front, codes, held_out.classes).cells["frontal-profile"])
    assert again["eer"] == pytest.approx(trained.rates["per_sample"]["frontal-profile"]["eer"], abs=2e-4)
    raw = error_rates(compare_by_pose(held_out.x, codes, held_out.classes).cells["frontal-profile"])
    assert raw == trained.rates["raw"]["frontal-profile"]
    assert again["eer"] < 0.97 * raw["eer"]


def test_card_says_what_was_done(trained):
    card = load(Path(trained.out).read_bytes()).card
    assert card == trained.card
    assert (card.architecture, card.normalisation, card.mode) == ("dual_branch_ensemble", "mean_norm", "per_sample")
    assert [len(card.metrics["alpha"]), card.arguments["members"]] == [3, 3]
    assert [one["share"] for one in card.metrics["lengths"]] == [1.0, 0.75, 0.5, 0.25, 0.0, None]
    assert card.metrics["chosen_on"] == "cross-validation in 3 folds"
    assert card.metrics["subjects"] == trained.parts
    assert sum(trained.parts.values()) == 120
    text = Path(f"{trained.out}.md").read_text()
    assert "| raw | +0.0000 | 0.0000 |" in text
    assert "no training subject has frontal pictures only" in text


def equal_but_for_the_key(one: bytes, other: bytes) -> bool:
    """Whether two checkpoints are equal but for the hashes of their training subjects, which have random keys."""
    first, second = load(one), load(other)
    assert first.card.seen_key != second.card.seen_key
    assert not np.isin(first.seen_subjects, second.seen_subjects).any()
    assert len(first.seen_subjects) == len(second.seen_subjects)
    contents = [to_bytes(item.card.model_copy(update={"seen_key": None}), item.model) for item in (first, second)]
    return contents[0] == contents[1]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("architecture", "mode"),
    [("dual_branch_ensemble", "per_sample"), ("dual_branch", "batch_stat"), ("se", "batch_stat")],
)
def test_equal_training_gives_equal_weights_and_another_seed_does_not(tmp_path, architecture, mode):
    x, names = people(subjects=24, each=4)
    source = write(tmp_path / "s", x, names, pose=["frontal", "profile"] * (len(x) // 2))
    files = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.safetensors"
        train_model(settings([source], out, architecture=architecture, mode=mode, seed=seed, test=0.0, resamples=0))
        files.append((out.read_bytes(), Path(f"{out}.md").read_bytes()))
    assert equal_but_for_the_key(files[0][0], files[1][0])
    assert not equal_but_for_the_key(files[0][0], files[2][0])
    assert files[0][1] == files[1][1]
    assert load(files[0][0]).card.mode == mode


def test_augment_teaches_only_about_people_in_training(tmp_path, caplog):
    x, names = people()
    source = write(tmp_path / "source", x, names)
    more = write(tmp_path / "more", *people(subjects=80, seed=1))
    with caplog.at_level(logging.INFO, "frontalis.train"):
        trained = train_model(settings([source], tmp_path / "m.safetensors", augment=(str(more),)))
    # Persons 60 to 79 are not in the source, those in validation or test would leak.
    assert trained.card.metrics["augmented_rows"] == 6 * trained.parts["train"]
    plain = train_model(settings([source], tmp_path / "p.safetensors"))
    assert plain.card.training_data != trained.card.training_data
    assert plain.parts == trained.parts


@pytest.mark.parametrize("first", [0, 30])
def test_ten_subjects_can_be_trained_on_whatever_their_names(tmp_path, first):
    x, _ = people(10)
    names = [f"person {first + row // 6}" for row in range(len(x))]
    trained = train_model(settings([write(tmp_path / "s", x, names)], tmp_path / "m.safetensors"))
    assert not trained.improved, "nine subjects are too few for a claim"
    checkpoint = load((tmp_path / "m.safetensors").read_bytes())
    seen = checkpoint.has_seen(np.array(names, object))
    for name, one in zip(names, seen, strict=True):
        assert (split_of(name, checkpoint.card.split) != "test") == one


def test_without_poses_all_pairs_decide(tmp_path):
    source = write(tmp_path / "s", *people(noise=2.0))
    trained = train_model(settings([source], tmp_path / "m.safetensors", steps=30))
    assert set(trained.rates["raw"]) == {"all", "unknown-unknown"}
    assert trained.choice.cell == "all"
    assert trained.choice.scored[0].score != 0


def test_many_validation_subjects_choose_and_are_measured_without_test_subjects(tmp_path):
    source = write(tmp_path / "s", *people(subjects=230, each=3))
    trained = train_model(settings([source], tmp_path / "m.safetensors", validation=0.5, test=0.0))
    assert (trained.chosen_on, trained.measured_on) == ("validation", "validation")
    assert trained.choice.subjects == trained.parts["validation"] >= 100
    assert "Measured on the validation subjects" in Path(f"{trained.out}.md").read_text()


def test_without_test_and_validation_subjects_nothing_is_measured(tmp_path):
    trained = train_model(settings([write(tmp_path / "s", *people())], tmp_path / "m.safetensors", test=0.0))
    assert (trained.measured_on, trained.rates, trained.parts["train"]) == (None, {}, 60)
    assert "Measured" not in Path(f"{trained.out}.md").read_text()


def test_model_that_is_no_better_than_raw_says_so_loudly(tmp_path, caplog):
    random = np.random.default_rng(0)  # names without meaning: nothing to be learnt
    x = random.normal(size=(360, 16)).astype(np.float32)
    source = write(tmp_path / "s", x, [f"person {number // 6}" for number in range(360)])
    for architecture in ("dual_branch_ensemble", "dual_branch", "se"):
        out = tmp_path / f"{architecture}.safetensors"
        worse = train_model(settings([source], out, steps=10, architecture=architecture, resamples=0))
        assert (worse.improved, worse.choice.best.share) == (False, None)
        rows = Reweighter(load(out.read_bytes()), device="cpu")(x)["front"]
        np.testing.assert_allclose(
            rows / np.linalg.norm(rows, axis=1)[:, None], x / np.linalg.norm(x, axis=1)[:, None], atol=1e-6
        )
    assert "NO LENGTH OF THE CHANGE WAS BETTER THAN RAW" in caplog.text


@pytest.mark.e2e
def test_interrupted_training_writes_what_it_has_and_says_so(tmp_path, synthetic, caplog):
    steps = itertools.count()
    trained = train_model(
        settings([synthetic], tmp_path / "m.safetensors", steps=360, resamples=0), should_stop=lambda: next(steps) == 40
    )
    assert (trained.interrupted, trained.steps, trained.improved) == (True, 40, True)
    assert load(Path(trained.out).read_bytes()).card.metrics["steps"] == 40
    assert "interrupted; step 40 is kept" in caplog.text


def test_two_trainings_to_one_file_leave_one_whole_checkpoint(tmp_path):
    source, out = write(tmp_path / "s", *people(24, 4)), tmp_path / "out" / "m.safetensors"
    both = threading.Barrier(2, timeout=60)

    def train(seed: int):
        return train_model(
            settings([source], out, seed=seed, test=0.0, resamples=0), should_stop=lambda: both.wait() < 0
        )

    with ThreadPoolExecutor(2) as trainings:  # side by side, step for step
        running = [trainings.submit(train, seed) for seed in (1, 2)]
        while not all(one.done() for one in running):
            if out.exists():
                load(out.read_bytes())
            time.sleep(0.005)
        cards = [one.result().card for one in running]
    assert load(out.read_bytes()).card in cards
    assert sorted(path.name for path in out.parent.iterdir()) == ["m.safetensors", "m.safetensors.md"]
    assert cards[0].seen_key != cards[1].seen_key


def test_a_training_that_is_killed_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """A kill leaves what is on the disk at that moment: here before and after each time that it is synced."""
    source, out = write(tmp_path / "s", *people(24, 4)), tmp_path / "out" / "m.safetensors"
    moments: list[Path] = []

    def keep_moment(_: int) -> None:
        moments.append(tmp_path / f"moment-{len(moments)}")
        shutil.copytree(out.parent, moments[-1])

    train_model(settings([source], out, seed=1))
    before = out.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", keep_moment)
        train_model(settings([source], out, seed=2))
    found = [(moment / out.name).read_bytes() for moment in moments]
    assert len(moments) == 4, "the checkpoint, its folder, its card, its folder"
    assert [content == before for content in found] == [True, False, False, False]
    assert {load(content).card.metrics["seed"] for content in found} == {1, 2}
    assert list(moments[0].glob(".tmp-*")), "the new file is complete beside the old one"
    train_model(settings([source], moments[0] / out.name, seed=3))
    assert load((moments[0] / out.name).read_bytes()).card.metrics["seed"] == 3


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (people(subjects=9), {}, "9 subjects are too few"),
        (people(subjects=40, each=1), {}, "each of the 40 subjects has a single row"),
        (people(subjects=12), {"test": 0.98, "validation": 0.01}, r"the train part has \d sub.* or a smaller .*--test"),
        (
            people(subjects=120, each=2),
            {"validation": 0.98, "test": 0.015},
            r"the train part has \d sub.* or a smaller --validation or --test",
        ),
    ],
)
def test_data_that_cannot_support_a_model_is_refused(tmp_path, rows, changes, message):
    with pytest.raises(TrainingError, match=message):
        train_model(settings([write(tmp_path / "s", *rows)], tmp_path / "m.safetensors", **changes))
    assert not (tmp_path / "m.safetensors").exists()


def test_augment_of_other_people_or_of_another_network_is_refused(tmp_path):
    source = write(tmp_path / "source", *people())
    x, names = people(seed=1)
    others = write(tmp_path / "others", x, [f"no {name}" for name in names])
    longer = write(tmp_path / "longer", *people(dim=20))
    for other, message in ((others, "no row of a training subject"), (longer, "have 20 numbers, the sources 16")):
        with pytest.raises(TrainingError, match=f"--augment: .*{message}"):
            train_model(settings([source], tmp_path / "m.safetensors", augment=(str(other),)))


@pytest.mark.skipif(not REAL.exists(), reason="real embeddings are not here (../shared/data)")
@pytest.mark.parametrize(("net", "dim"), [("fr512", 512), ("mfn192", 192)])
def test_real_embeddings_of_either_length_can_be_trained_on(tmp_path, net, dim):
    sources = [REAL / f"cfp-dev-{net}/fold0{fold}.parquet" for fold in (1, 2)]
    mirrored = REAL / f"cfp-dev-mirrored-{net}/fold01.parquet"
    trained = train_model(
        settings(sources, tmp_path / "m.safetensors", augment=(str(mirrored),), steps=6, validation=0.3, test=0.3)
    )
    assert trained.card.embedding_dim == dim
    assert sum(trained.parts.values()) == 100
    assert 0.03 < trained.rates["raw"]["frontal-profile"]["eer"] < 0.25
