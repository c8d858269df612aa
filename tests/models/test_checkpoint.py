import hashlib
import json
import os
import random
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from models import checkpoint as module
from models.checkpoint import (
    Checkpoint,
    inference_options,
    library_versions,
    load,
    model_digest,
    save,
    to_bytes,
)
from models.dual_branch import DualBranchSENet
from models.seen import Seen
from models.split import subject_key
from schemas.errors import BadModelError, SettingsError, one_line
from schemas.models import ModelCard
from schemas.split import SplitRule

DIM = 64
RULE = SplitRule(salt="pepper", train=0.5, validation=0.2, test=0.3)


def card(**changes: object) -> ModelCard:
    fields = {
        "architecture": "dual_branch",
        "arguments": {"feature_dim": DIM},
        "mode": "per_sample",
        "embedding_dim": DIM,
        "normalisation": "l2",
        "training_data": "3f" * 32,
        "split": RULE,
        "metrics": {"eer": 0.1, "history": [1, 2.5, None], "best": {"step": 160}},
        "versions": {"torch": "2.13.0"},
    }
    return ModelCard(**{**fields, **changes})


def keys(*subjects: str) -> np.ndarray:
    """Hashes of names as older files hold them."""
    return np.array([subject_key(subject, RULE.salt) for subject in subjects], dtype=np.int64)


@pytest.mark.parametrize("use_batch_stat", [False, True])
@pytest.mark.parametrize("architecture", ["se", "dual_branch", "dual_branch_ensemble"])
def test_round_trip_keeps_outputs_card_and_subjects(trained, tmp_path, architecture, use_batch_stat):
    model = trained(DIM, use_batch_stat, architecture=architecture)
    arguments = {"channels" if architecture == "se" else "feature_dim": DIM, "use_batch_stat": use_batch_stat}
    mode = "batch_stat" if use_batch_stat else "per_sample"
    written = card(architecture=architecture, arguments=arguments, mode=mode, created="2026-01-01T00:00:00Z")
    path = tmp_path / "model.safetensors"
    before = os.umask(0o077)
    digest = save(written, model, path, Seen(keys("zoe", "adam", "zoe")))
    os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left

    loaded = load(path)
    assert loaded.card == written
    assert loaded.file_digest == digest
    np.testing.assert_array_equal(loaded.seen_subjects, np.sort(keys("adam", "zoe")))
    assert not loaded.model.training
    x = torch.randn(5, DIM)
    assert torch.equal(loaded.model(x), model(x))
    assert load(path.read_bytes()).file_digest == load(str(path)).file_digest == digest


def test_loaded_model_can_be_trained_on(trained):
    model = load(to_bytes(card(), trained(DIM, False))).model.train()
    model(torch.randn(8, DIM)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.e2e
def test_equal_models_give_equal_bytes_in_any_process(trained):
    model = trained(DIM, False)
    first = to_bytes(card(), model, Seen(keys("adam", "zoe")))
    assert to_bytes(card(metrics=dict(reversed(card().metrics.items()))), model, Seen(keys("zoe", "adam"))) == first
    script = (
        "import hashlib, torch\n"
        "from models.checkpoint import to_bytes\n"
        "from models.dual_branch import DualBranchSENet\n"
        "from schemas.models import ModelCard\n"
        "torch.manual_seed(3)\n"
        "card = ModelCard(architecture='dual_branch', arguments={'feature_dim': 32}, mode='per_sample',\n"
        "                 embedding_dim=32, versions={'b': '1', 'a': '2', 'c': '3'})\n"
        "print(hashlib.sha256(to_bytes(card, DualBranchSENet(32))).hexdigest())\n"
    )
    root = Path(module.__file__).parents[1]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=root,
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_any_change_changes_the_digest(trained):
    model = trained(DIM, False)
    contents = [
        to_bytes(card(), model),
        to_bytes(card(normalisation="none"), model),
        to_bytes(card(), model, Seen(keys("a"))),
    ]
    with torch.no_grad():
        model.fusion_logit += 1e-3
    contents.append(to_bytes(card(), model))
    assert len({load(data).file_digest for data in contents}) == 4


def test_has_seen_knows_exactly_the_subjects_it_was_given(trained):
    seen = [f"person {i}" for i in range(0, 100, 3)]
    loaded = load(to_bytes(card(), trained(DIM, False), Seen(keys(*seen))))
    everybody = [f"person {i}" for i in range(100)]
    np.testing.assert_array_equal(loaded.has_seen(everybody), [name in seen for name in everybody])
    assert loaded.has_seen([]).shape == (0,)


def test_hashes_of_seen_subjects_have_a_key_of_their_own(trained):
    """A table of names under the salt of the split, or under the key of another checkpoint, finds nothing."""
    cards = [card(seen_key=32 * digit) for digit in "ab"]
    rows = np.random.default_rng(0).normal(size=(9, DIM))
    seen = ["adam", " Zoe\u0308"]
    first, second = (
        load(to_bytes(one, trained(DIM, False), Seen.of(seen, [rows[:4], rows[4:8]], one.seen_key))) for one in cards
    )
    for loaded in (first, second):
        assert loaded.has_seen(["adam", "Zo\u00eb", " adam ", "ADAM", "zo\u00cb"]).all()
        assert loaded.has_seen_rows(rows.astype(np.float32)).tolist() == [True] * 8 + [False]
        assert not loaded.has_seen(["zoe", "eve"]).any()
        assert not np.isin(keys("adam", "Zo\u00eb"), loaded.seen_subjects).any()
    assert not np.isin(first.seen_subjects, second.seen_subjects).any()
    assert not np.isin(first.seen_rows, second.seen_rows).any()
    with pytest.raises(ValueError, match=r"without card\.seen_key"):
        to_bytes(card(), trained(DIM, False), Seen(keys("adam"), first.seen_rows))


def test_older_checkpoints_are_read_with_the_salt_of_the_split(trained):
    loaded = load(to_bytes(card(), trained(DIM, False), Seen(keys("adam", " eve"))))
    assert loaded.has_seen(["adam", "adam ", " eve", "eve"]).tolist() == [True, True, True, False]
    assert not loaded.has_seen_rows(np.ones((2, DIM))).any()


def test_has_seen_refuses_to_guess(trained):
    loaded = load(to_bytes(card(), trained(DIM, False)))
    assert loaded.seen_subjects is None
    with pytest.raises(BadModelError, match="does not record"):
        loaded.has_seen(["adam"])
    with pytest.raises(ValueError, match=r"without card\.split"):
        to_bytes(card(split=None), trained(DIM, False), Seen(keys("adam")))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"embedding_dim": 128}, SettingsError, "embedding_dim 128, its arguments build 64"),
        ({"mode": "batch_stat"}, SettingsError, "mode 'batch_stat', its arguments build 'per_sample'"),
        ({"architecture": "mlp"}, SettingsError, "'mlp' is unknown"),
        ({"arguments": {"feature_dim": DIM, "hidden_dim": 7}}, BadModelError, "the card wants"),
        ({"metrics": {"eer": float("nan")}}, ValueError, "not JSON compliant"),
    ],
)
def test_card_that_does_not_fit_is_refused_when_saving(trained, tmp_path, changes, error, named):
    with pytest.raises(error, match=named):
        save(card(**changes), trained(DIM, False), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_model_that_diverged_is_refused_when_saving():
    model = DualBranchSENet(DIM)
    with torch.no_grad():
        model.pose_branch.expand.weight[3, 4] = float("nan")
    with pytest.raises(BadModelError, match=r"pose_branch.expand.weight' holds NaN"):
        to_bytes(card(), model)


def test_failed_write_leaves_the_old_file(trained, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(card(), trained(DIM, False), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save(card(normalisation="none"), trained(DIM, False), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(BadModelError, match=r"nowhere.safetensors: cannot be read \(No such file"):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(BadModelError, match="cannot be read"):
        load(tmp_path)


def test_file_over_the_limit_is_refused_before_it_is_read(tmp_path, trained):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte that takes no disk, and that no test machine could read
    with pytest.raises(BadModelError, match=r"limit of 1,073,741,824 bytes"):
        load(path)
    data = to_bytes(card(), trained(DIM, False))
    assert isinstance(load(data, max_bytes=len(data)), Checkpoint)
    with pytest.raises(BadModelError, match="more than the limit"):
        load(data, max_bytes=len(data) - 1)


# -- hostile files ----------------------------------------------------------------------------------------------------


def forged(tensors: dict[str, torch.Tensor], text: object) -> bytes:
    metadata = {"frontalis_model_card": text if isinstance(text, str) else json.dumps(text)}
    return safetensors.torch.save(tensors, metadata)


def honest() -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    torch.manual_seed(0)
    tensors = {f"model.{name}": tensor.clone() for name, tensor in DualBranchSENet(DIM).state_dict().items()}
    return tensors, card().model_dump(mode="json")


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def test_forger_writes_what_the_loader_reads():
    load(forged(*honest()))  # so that each refusal below is due to its own change


def test_every_truncation_is_refused():
    data = forged(*honest())
    for size in [*range(0, 64), 500, 1000, len(data) // 2, len(data) - 1]:
        with pytest.raises(BadModelError):
            load(data[:size])
    with pytest.raises(BadModelError):
        load(data + b"\0")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 100,
        struct.pack("<Q", 2**63) + b"{}" * 100,
        with_header(b"not json"),
        with_header(b"[" * 100_000),
        with_header(b"\xff\xfe{}"),
        with_header(b"null"),
        with_header(b'{"__metadata__": []}'),
        with_header(b'{"__metadata__": {"frontalis_model_card": 7}}'),
        with_header(b'{"__metadata__": {"frontalis_model_card": "[[[["}}'),
        with_header(b'{"__metadata__": {"frontalis_model_card": "{}"}}'),
        with_header(b'{"__metadata__": {"other": "x"}}'),
        b"PK\x03\x04" + b"\0" * 200,
        b"\x80\x02}q\x00." + b"\0" * 200,
    ],
    ids=range(13),
)
def test_garbage_is_refused(data):
    with pytest.raises(BadModelError):
        load(data)


def test_header_with_false_offsets_is_refused():
    _, honest_card = honest()
    for shape, offsets in (([2], [0, 2**40]), ([2**40], [0, 8]), ([2], [8, 0]), ([-1], [0, 8])):
        header = {
            "__metadata__": {"frontalis_model_card": json.dumps(honest_card)},
            "model.fusion_logit": {"dtype": "F32", "shape": shape, "data_offsets": offsets},
        }
        with pytest.raises(BadModelError, match="not a readable safetensors file"):
            load(with_header(json.dumps(header).encode(), b"\0" * 8))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "os.system"}, "'os.system' is unknown"),
        ({"arguments": {"feature_dim": 10**9}, "embedding_dim": 10**9}, "embedding_dim = 1000000000"),
        ({"arguments": {"feature_dim": 10**9}}, "feature_dim = 1000000000"),
        ({"arguments": {"feature_dim": DIM, "hidden_dim": 10**12}}, "hidden_dim = 1000000000000"),
        ({"arguments": {"feature_dim": 65_536, "hidden_dim": 65_536}, "embedding_dim": 65_536}, "the card wants"),
        ({"arguments": {"feature_dim": DIM, "__class__": "x"}}, "__class__"),
        ({"arguments": {"feature_dim": DIM, "reduction": DIM + 1}}, "hidden units"),
        ({"arguments": {"feature_dim": True}}, "feature_dim = True"),
        ({"arguments": []}, "arguments"),
        ({"embedding_dim": 32}, "embedding_dim 32, its arguments build 64"),
        ({"mode": "batch_stat"}, "its arguments build 'per_sample'"),
        ({"mode": "raw"}, "mode = 'raw'"),
        ({"normalisation": "l3"}, "normalisation = 'l3'"),
        ({"split": {"salt": "", "train": 1.0}}, "split.salt"),
        ({"split": {"salt": "x", "train": 0.9, "validation": 0.9, "test": 0.9}}, "sum to 1"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_lying_card_is_refused(changes, named):
    tensors, honest_card = honest()
    with pytest.raises(BadModelError, match=named):
        load(forged(tensors, {**honest_card, **changes}))


def damaged(name: str, tensor: torch.Tensor | None) -> bytes:
    tensors, honest_card = honest()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return forged(tensors, honest_card)


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("model.pose_branch.project.bias", None, "lacks tensor 'pose_branch.project.bias'"),
        ("model.extra", torch.zeros(1), "unknown tensor 'extra'"),
        ("extra", torch.zeros(1), "unknown tensor 'extra'"),
        ("model.fusion_logit", torch.zeros(1), r"is \[1\] torch.float32, the card wants \[\]"),
        ("model.fusion_logit", torch.zeros((), dtype=torch.float64), "torch.float64"),
        ("model.fusion_logit", torch.tensor(float("nan")), "NaN or infinity"),
        ("model.pose_branch.norm.weight", torch.full((DIM,), float("inf")), "NaN or infinity"),
        ("model.pose_branch.norm.running_var", torch.full((DIM,), -1.0), "is negative"),
        ("seen_subjects", torch.tensor([3, 2]), "sorted list"),
        ("seen_subjects", torch.tensor([2, 2]), "sorted list"),
        ("seen_subjects", torch.tensor([[2]]), "sorted list"),
        ("seen_subjects", torch.tensor([2.0]), "sorted list"),
        ("seen_subjects", torch.tensor(2), "sorted list"),
        ("seen_rows", torch.tensor([3, 2]), "sorted list"),
        ("seen_rows", torch.tensor([2, 3]), "without a key"),
    ],
)
def test_wrong_tensor_is_refused_by_name(name, tensor, named):
    with pytest.raises(BadModelError, match=named):
        load(damaged(name, tensor))


def test_seen_subjects_without_a_split_rule_are_refused():
    tensors, honest_card = honest()
    with pytest.raises(BadModelError, match="without a split rule"):
        load(forged({**tensors, "seen_subjects": torch.tensor([1, 2])}, {**honest_card, "split": None}))


def test_flipping_any_byte_of_the_header_never_does_worse_than_a_refusal():
    data = forged(*honest())
    size = 8 + struct.unpack("<Q", data[:8])[0]
    generator = np.random.default_rng(0)
    for position in generator.choice(size, 300, replace=False):
        changed = bytearray(data)
        changed[position] ^= int(generator.integers(1, 256))
        try:
            load(bytes(changed))
        except BadModelError:
            continue  # any other exception fails the test


HOSTILE_VALUES = [
    None, True, -1, 0, 1.5, 1e308, 2**31, 2**53, 2**63, 2**64, -(2**63), "", "F32", "F8_E4M3", "x" * 5000, "\0",
    "\ud800", "\u202e", [], [[]], {}, [-1], [2**62, 4], [2**63], [0, 2**40], [1.5], ["1"], {"dtype": "F32"},
    float("nan"), float("inf"),
]  # fmt: skip
HOSTILE_TOKENS = [b"[" * 5000, b"{" * 300, b"9" * 5000, b"1e99999", b"NaN", b'"\\ud800"', b"\xff", b"", b",", b"\0"]


def hostile_header(header: dict[str, object], random_: random.Random) -> bytes:
    """Return the JSON of a header with some of its values replaced, repeated, renamed, dropped, or cut to pieces."""
    header = json.loads(json.dumps(header))
    inner = json.loads(header["__metadata__"]["frontalis_model_card"])
    for _ in range(random_.choice([1, 1, 1, 2, 4])):
        place = random_.choice([header, header, header["__metadata__"], inner, inner, inner.get("arguments")])
        if random_.random() < 0.5 and isinstance(place, dict):
            place = random_.choice([value for value in place.values() if isinstance(value, dict)] or [place])
        if not isinstance(place, dict) or not place or header.get("__metadata__") is None:
            continue
        name = random_.choice(list(place))
        change = random_.choice(["replace", "replace", "replace", "rename", "drop"])
        if change == "replace" and name != "__metadata__":
            place[name] = random_.choice(HOSTILE_VALUES)
        elif change == "rename":
            place[random_.choice(["", "x", "model.", "__metadata__", "seen_rows", name.upper()])] = place[name]
        elif name != "__metadata__":
            del place[name]
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["frontalis_model_card"] = json.dumps(inner)
    text = bytearray(json.dumps(header).encode())
    if random_.random() < 0.4:
        at = random_.randrange(len(text))
        text[at : at + random_.choice([0, 1, 5])] = random_.choice(HOSTILE_TOKENS)
    return bytes(text)


def test_hostile_headers_are_refused_in_one_line():
    """400 mutated headers of seed 0: loaded or refused, without any other error and without a long message."""
    data, random_, refusals = forged(*honest()), random.Random(0), []
    size = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:size])
    for _ in range(400):
        try:
            load(with_header(hostile_header(header, random_), data[size:]), name="x.safetensors")
        except BadModelError as error:
            refusals.append(str(error))
    assert [refusal for refusal in refusals if refusal != one_line(refusal) or len(refusal) > 600] == []
    assert len({refusal[:50] for refusal in refusals}) > 20, "many kinds of refusal were reached"


# -- digests ----------------------------------------------------------------------------------------------------------


def test_model_digest_depends_on_file_and_options_but_not_on_their_order():
    options = {"statistic": "batch", "batch_size": 4096}
    digest = model_digest("ab", options)
    assert len(digest) == 32
    assert digest == model_digest("ab", dict(reversed(options.items())))
    others = [
        model_digest("ac", options),
        model_digest("ab", {}),
        model_digest("ab", {**options, "batch_size": 4095}),
        model_digest("ab", {**options, "statistic": "frozen"}),
    ]
    assert len({digest, *others}) == 5
    expected = hashlib.blake2b(b'{"file":"ab","options":{"batch_size":4096,"statistic":"batch"}}', digest_size=16)
    assert digest == expected.hexdigest()  # written out: a change here would recompute every store


def test_only_options_that_change_a_feature_enter_the_digest():
    batch_card = card(mode="batch_stat", arguments={"feature_dim": DIM, "use_batch_stat": True})
    assert inference_options(card(), "frozen", 10) == inference_options(card(), "batch", 20) == {}
    assert inference_options(batch_card, "frozen", 10) == inference_options(batch_card, "frozen", 20)
    assert inference_options(batch_card, "batch", 10) != inference_options(batch_card, "batch", 20)
    assert inference_options(batch_card, "batch", 10, "tf32") == inference_options(batch_card, "batch", 10)
    for one in (card(), batch_card):
        assert inference_options(one, "frozen", 10, "float32") == inference_options(one, "frozen", 10)
        assert inference_options(one, "frozen", 10, "tf32") != inference_options(one, "frozen", 10)


def test_library_versions_are_those_that_run():
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__
