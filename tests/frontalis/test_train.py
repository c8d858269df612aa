"""The training flow from a shell: a checkpoint, its card, one table or one JSON document."""

import json

import pytest

from models.checkpoint import load
from tests.commands import frontalis

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    from tasks.synthetic.shards import synthesize

    folder = tmp_path_factory.mktemp("shards")
    synthesize(folder, subjects=60, per_subject=14, dim=32, shards=2)
    return folder


def test_train_writes_a_checkpoint_and_prints_one_json_document(shards, tmp_path):
    out = tmp_path / "model.safetensors"
    options = ("--mode", "batch_stat", "--steps", 3, "--validation", 0.2, "--test", 0.2, "--seed", 7, "--json")
    done = frontalis("train", shards, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    card = load(out.read_bytes()).card
    assert "seen_key" not in said["card"]  # the key of the hashes of training subjects stays in the file
    assert said["card"] == card.model_dump(mode="json", exclude={"seen_key"})
    assert (card.mode, card.metrics["seed"], card.split.test) == ("batch_stat", 7, 0.2)
    assert "step 3 of 3" in done.stderr
    assert done.stderr.splitlines()[0].endswith(f"train: batch_stat of {shards} into {out}")
    assert (tmp_path / "model.safetensors.md").exists()


def test_train_prints_the_model_beside_raw(shards, tmp_path):
    out = tmp_path / "model.safetensors"
    done = frontalis("train", shards, "--out", out, "--steps", 2, "--architecture", "se", "--loss", "triplet")
    assert done.returncode == 0, done.stderr
    assert "per_sample" in done.stdout
    assert "raw" in done.stdout
    assert str(out) in done.stdout.replace("\n", "")


def test_train_refuses_in_one_line(shards, tmp_path):
    done = frontalis("train", shards, "--out", tmp_path / "m.safetensors", "--validation", 0.7, "--test", 0.4)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("frontalis: ")
    assert "validation 0.7 + test 0.4 leave nobody to train on" in last
    assert not (tmp_path / "m.safetensors").exists()
