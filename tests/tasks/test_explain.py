"""Explaining a model: the files hold the weights, and relatedness is measured where subjects and poses are known."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr

from models.checkpoint import load, save
from models.se import SEBlock
from models.seen import Seen
from schemas.errors import BadModelError, SettingsError, TrainingError
from schemas.models import ModelCard
from schemas.settings import ColumnNames
from schemas.split import SplitRule
from tasks.explain import AS_TRAINED, ONE_WEIGHT, SHUFFLED, explain_model
from tasks.training.length import FEWEST

DIM = 32


def shard(folder: Path, x: np.ndarray, **columns: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).reshape(-1)), x.shape[1])
    ids = [f"id-{row}" for row in range(len(x))]
    pq.write_table(pa.table({"id": ids, "embedding": embedding, **columns}), folder / "a.parquet")
    return str(folder)


def table_of(folder: Path) -> dict[str, list[str]]:
    with (folder / "channels.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def weights_of(model: Path, branch: str, x: np.ndarray) -> np.ndarray:
    se = getattr(load(model.read_bytes()).model, f"{branch}_branch").se
    first, second = (weights.detach().double().numpy() for weights in se.fc.parameters())
    s = se.frozen_mean.double().numpy().reshape(1, -1) if se.use_batch_stat else x
    s = s if se.use_batch_stat else s / np.linalg.norm(s, axis=1, keepdims=True)
    return 1 / (1 + np.exp(-np.maximum(s @ first.T, 0) @ second.T))


@pytest.fixture(scope="module")
def people() -> tuple[np.ndarray, list[str], list[str]]:
    """Ten people in two views, three rows each: even channels distinguish them, odd ones only the view."""
    random = np.random.default_rng(4)
    centre, turn = random.standard_normal((10, DIM)), random.standard_normal((10, 2, DIM))
    even = np.arange(DIM) % 2 == 0
    rows, subjects, poses = [], [], []
    for person in range(10):
        for view, pose in enumerate(("frontal", "profile")):
            for _ in range(3):
                base = np.where(even, centre[person], 1.0) + np.where(even, 0.1, 1.0) * turn[person, view]
                rows.append(base + 0.01 * random.standard_normal(DIM))
                subjects.append(f"person-{person}")
                poses.append(pose)
    return np.array(rows, np.float32), subjects, poses


def test_files_hold_the_weights_of_every_channel(tiny_models, people, tmp_path: Path) -> None:
    x, subjects, poses = people
    source = shard(tmp_path / "source", x, subject=subjects, pose=poses)
    found = explain_model(str(tiny_models.per_sample), source, str(tmp_path / "out"), k=3)
    assert [one.branch for one in found.weights] == ["identity", "pose"]
    table = table_of(tmp_path / "out")
    assert table["channel"] == [str(channel) for channel in range(DIM)]
    for one in found.weights:
        wanted = weights_of(tiny_models.per_sample, one.branch, x.astype(np.float64))
        np.testing.assert_allclose(np.float64(table[f"{one.branch} weight"]), wanted.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(np.float64(table[f"{one.branch} spread"]), wanted.std(axis=0), atol=1e-5)
        relatedness = np.float64(table["identity relatedness"])
        assert found.correlation[one.branch] == pytest.approx(spearmanr(one.mean, relatedness).statistic)
    assert len(found.weights[0].top) == len(found.related) == 3
    assert sorted(Path(file).name for file in found.files) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {Path(file).suffix for file in found.files} == {".csv", ".json", ".svg", ".png"}
    assert all(Path(file).stat().st_size for file in found.files)


def test_channels_that_distinguish_people_come_first(tiny_models, people, tmp_path: Path) -> None:
    x, subjects, poses = people
    source = shard(tmp_path / "source", x, subject=subjects, pose=poses)
    found = explain_model(str(tiny_models.per_sample), source, str(tmp_path / "out"), k=DIM // 2)
    assert sorted(channel for channel, _ in found.related) == list(range(0, DIM, 2))
    assert sorted(channel for channel, _ in found.changing) == list(range(1, DIM, 2))
    ratios = [ratio for _, ratio in found.changing]
    assert ratios[0] > 0
    assert ratios == sorted(ratios)
    assert ratios[-1] < found.related[-1][1]
    summary = json.loads((tmp_path / "out/explanation.json").read_text())
    assert summary["mode"] == "per_sample"
    assert summary["top channels by identity relatedness"] == [list(pair) for pair in found.related]
    assert summary["channels that change most with the view"] == [list(pair) for pair in found.changing]
    assert summary["agreement of the members' weights"] == {"identity": None, "pose": None}
    assert {"relatedness-per_sample-pose.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert summary["top channels by weight"]["pose"] == [list(pair) for pair in found.weights[1].top]
    assert summary["rank correlation of weight and identity relatedness"] == found.correlation


def test_a_frozen_statistic_needs_no_rows(tiny_models, tmp_path: Path) -> None:
    found = explain_model(str(tiny_models.batch_stat), None, str(tmp_path))
    for one in found.weights:
        wanted = weights_of(tiny_models.batch_stat, one.branch, np.ones((1, DIM)))
        np.testing.assert_allclose(one.mean, wanted[0], atol=1e-6)
        assert max(one.spread) < 1e-7
    assert (found.related, found.correlation) == ([], {"identity": None, "pose": None})
    assert set(table_of(tmp_path)["identity relatedness"]) == {""}


def test_a_frozen_statistic_weighs_any_rows_alike(tiny_models, people, tmp_path: Path) -> None:
    x, subjects, poses = people
    source = shard(tmp_path / "source", x, subject=subjects, pose=poses)
    with_rows = explain_model(str(tiny_models.batch_stat), source, str(tmp_path / "a"))
    without = explain_model(str(tiny_models.batch_stat), None, str(tmp_path / "b"))
    for one, other in zip(with_rows.weights, without.weights, strict=True):
        np.testing.assert_allclose(one.mean, other.mean, atol=1e-6)
    assert with_rows.related


def test_columns_of_other_names_are_named(tiny_models, people, tmp_path: Path) -> None:
    x, subjects, poses = people
    model = str(tiny_models.per_sample)
    own = explain_model(model, shard(tmp_path / "own", x, subject=subjects, pose=poses), str(tmp_path / "a"))
    other = shard(tmp_path / "other", x, person=subjects, view=poses)
    named = explain_model(model, other, str(tmp_path / "b"), columns=ColumnNames(subject="person", pose="view"))
    assert named.related == own.related
    assert named.correlation == own.correlation


def test_rows_without_subjects_are_weighed_and_relatedness_is_left_out(tiny_models, people, tmp_path: Path) -> None:
    x, subjects, poses = people
    model = str(tiny_models.per_sample)
    with_them = explain_model(model, shard(tmp_path / "a", x, subject=subjects, pose=poses), str(tmp_path / "out"))
    for columns in ({}, {"pose": poses}, {"pose": poses, "subject": pa.nulls(len(x), pa.string())}):
        found = explain_model(model, shard(tmp_path / "b", x, **columns), str(tmp_path / "out"))
        assert found.weights == with_them.weights
        assert (found.related, found.correlation) == ([], {"identity": None, "pose": None})


def test_a_row_without_a_subject_counts_for_weights_only(tiny_models, people, tmp_path: Path) -> None:
    x, subjects, poses = people
    model = str(tiny_models.per_sample)
    partly = [name if row % 6 else None for row, name in enumerate(subjects)]
    known = np.array([name is not None for name in partly])
    found = explain_model(model, shard(tmp_path / "a", x, subject=partly, pose=poses), str(tmp_path / "out"))
    for one in found.weights:
        wanted = weights_of(tiny_models.per_sample, one.branch, x.astype(np.float64))
        np.testing.assert_allclose(one.mean, wanted.mean(axis=0), atol=1e-5)
    named = {"subject": list(np.array(subjects)[known]), "pose": list(np.array(poses)[known])}
    labelled = explain_model(model, shard(tmp_path / "b", x[known], **named), str(tmp_path / "out"))
    assert dict(found.related) == pytest.approx(dict(labelled.related), rel=1e-4)


def test_relatedness_is_left_out_where_nobody_was_seen_twice(tiny_models, people, tmp_path: Path) -> None:
    x, subjects, _ = people
    source = shard(tmp_path / "source", x, subject=subjects, pose=["frontal"] * len(x))
    found = explain_model(str(tiny_models.per_sample), source, str(tmp_path / "out"))
    assert (found.related, found.correlation) == ([], {"identity": None, "pose": None})
    json.loads((tmp_path / "out/explanation.json").read_text(), parse_constant=pytest.fail)


def test_channels_without_a_ratio_are_not_ranked_and_leave_the_summary_json(
    tiny_models, people, tmp_path: Path
) -> None:
    x, subjects, poses = people
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x[:, 5] = 0  # varies nowhere
    source = shard(tmp_path / "source", x, subject=subjects, pose=poses)
    found = explain_model(str(tiny_models.per_sample), source, str(tmp_path / "out"), k=DIM)
    json.loads((tmp_path / "out/explanation.json").read_text(), parse_constant=pytest.fail)
    assert sorted(channel for channel, _ in found.related) == [channel for channel in range(DIM) if channel != 5]
    assert table_of(tmp_path / "out")["identity relatedness"][5] == "nan"


def test_the_same_model_and_rows_give_the_same_files(tiny_models, people, tmp_path: Path) -> None:
    x, subjects, poses = people
    source = shard(tmp_path / "source", x, subject=subjects, pose=poses)
    for name in ("a", "b"):
        explain_model(str(tiny_models.per_sample), source, str(tmp_path / name))
    for file in (tmp_path / "a").iterdir():
        if file.suffix in (".csv", ".json"):
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_what_cannot_be_explained_is_refused_before_anything_is_written(
    tiny_models, people, make_checkpoint, tmp_path: Path
) -> None:
    x, subjects, _ = people
    out = str(tmp_path / "out")
    with pytest.raises(SettingsError, match=r"--model .*absent: there is no such file"):
        explain_model(str(tmp_path / "absent"), None, out)
    with pytest.raises(SettingsError, match=r"a per_sample model weights each embedding by itself; pass --source"):
        explain_model(str(tiny_models.per_sample), None, out)
    (tmp_path / "noise").write_bytes(b"x" * 100)
    with pytest.raises(BadModelError):
        explain_model(str(tmp_path / "noise"), None, out)
    other = make_checkpoint(tmp_path / "other.safetensors", dim=16)
    source = shard(tmp_path / "labelled", x, subject=subjects)
    with pytest.raises(SettingsError, match=r"--source .*labelled: embeddings have 32 numbers, the model wants 16"):
        explain_model(str(other), source, out)
    with pytest.raises(TrainingError, match="no row with a usable embedding"):
        explain_model(str(tiny_models.per_sample), shard(tmp_path / "nothing", 0 * x), out)
    assert not Path(out).exists()


def test_a_batch_statistic_that_was_never_gathered_needs_rows(tiny_models, people, tmp_path: Path) -> None:
    checkpoint = load(tiny_models.batch_stat.read_bytes())
    for name, buffer in checkpoint.model.named_buffers():
        if "frozen" in name or "gathered" in name:
            buffer.zero_()
    bare = tmp_path / "bare.safetensors"
    save(checkpoint.card, checkpoint.model, bare, Seen(np.zeros(0, np.int64)))
    with pytest.raises(SettingsError, match="pass --source"):
        explain_model(str(bare), None, str(tmp_path / "out"))


def test_ablation_says_whether_the_weights_matter(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    centre = np.repeat(random.standard_normal((FEWEST, DIM)), 6, axis=0)
    noise = random.standard_normal(centre.shape)
    noise[:, : DIM // 2] *= 3  # half of the channels say little of who it is
    x, subjects = centre + noise, [f"person-{row // 6}" for row in range(len(centre))]
    source = shard(tmp_path / "source", x, subject=subjects, pose=["frontal", "profile"] * (len(x) // 2))
    useful = SEBlock(DIM, 1, use_batch_stat=True)
    useful.frozen_rows += 1
    with torch.no_grad():
        useful.frozen_mean += 1.0
        useful.fc[0].weight.fill_(1 / DIM)
        useful.fc[2].weight.copy_(torch.where(torch.arange(DIM) < DIM // 2, -0.3, 0.3)[:, None].expand(DIM, DIM))
    card = ModelCard(
        architecture="se", arguments={"channels": DIM, "reduction": 1, "use_batch_stat": True}, mode="batch_stat",
        embedding_dim=DIM, split=SplitRule(salt="s"), seen_key="0" * 32,
    )  # fmt: skip
    save(card, useful, tmp_path / "m.safetensors", Seen.of(["somebody else"], [x[:1] * 0 + 1], card.seen_key))
    found = explain_model(str(tmp_path / "m.safetensors"), source, str(tmp_path / "out")).ablation
    assert (found.cell, found.subjects) == ("frontal-profile", FEWEST)
    assert found.changes[AS_TRAINED]["eer"].high < 0
    assert found.changes[ONE_WEIGHT]["eer"].value == pytest.approx(0, abs=0.01), "one number leaves directions alone"
    assert found.against[SHUFFLED]["eer"].low > 0
    assert "The SE weights help" in found.text
    assert json.loads((tmp_path / "out/explanation.json").read_text())["ablation of the weights"]["text"] == found.text
    with torch.no_grad():
        useful.fc[2].weight.fill_(0.1)
    save(card, useful, tmp_path / "m.safetensors", Seen.of(["somebody else"], [x[:1] * 0 + 1], card.seen_key))
    found = explain_model(str(tmp_path / "m.safetensors"), source, str(tmp_path / "out")).ablation
    assert "not shown to help" in found.text
    save(card, useful, tmp_path / "m.safetensors", Seen.of(subjects, [x], card.seen_key))
    assert explain_model(str(tmp_path / "m.safetensors"), source, str(tmp_path / "out")).ablation is None
