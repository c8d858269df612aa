"""A trained network as one `.safetensors` file: weights, the card to rebuild it, and hashes of what it was trained on.

Nothing in a file is executed, and everything in it is checked before use. Equal cards and weights give equal bytes.
Fetching a file from an object store is left to the caller, who passes the bytes.
"""

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from models.architectures import build, check_arguments, describe, mode_of
from models.seen import Hashes, Seen, name_hashes, rows_in
from models.split import subject_key
from schemas.errors import BadModelError, SettingsError, clipped, first_line
from schemas.files import read_regular
from schemas.identity import normal_text
from schemas.models import ModelCard, Precision, Statistic, uses_batch

MAX_BYTES = 2**30
_MAX_HEADER_BYTES = 16 * 2**20
_CARD = "frontalis_model_card"  # the only metadata key: safetensors writes several in random order
_WEIGHTS = "model."
_SEEN, _SEEN_ROWS = "seen_subjects", "seen_rows"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model in `eval()` on the CPU, its card, the SHA-256 of its file, and the subjects it has seen.

    `seen_subjects` holds the sorted hashes (int64, see `models.seen`) of the subjects it was trained or selected on,
    and `seen_rows` those of their rows; None where the file does not record them.
    """

    model: nn.Module
    card: ModelCard
    file_digest: str
    seen_subjects: Hashes | None
    seen_rows: Hashes | None = None

    def has_seen(self, subjects: Sequence[str]) -> NDArray[np.bool_]:
        """Return, for each subject, whether the model was trained or selected on one of this name.

        Such subjects stay out of its evaluation. Names compare as `models.seen` says. Raises `BadModelError` when the
        file does not record them.
        """
        if self.seen_subjects is None or self.card.split is None:
            raise BadModelError("the checkpoint does not record its training subjects; train it again with a split")
        names, key = list(subjects), self.card.seen_key or self.card.split.salt
        seen = np.isin(name_hashes(names, key), self.seen_subjects)
        if self.seen_rows is None:  # older files hash names with their case, and before that as they are
            seen |= np.isin(_keys(map(normal_text, names), key), self.seen_subjects)
            seen |= np.isin(_keys(names, key), self.seen_subjects)
        return seen

    def has_seen_rows(self, x: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Return, for each embedding of `[N, D]`, whether the model was trained or selected on it or on a copy of it.

        Nowhere, where the file does not record rows.
        """
        if self.seen_rows is None or self.card.seen_key is None:
            return np.zeros(len(x), bool)
        return rows_in(x, self.seen_rows, self.card.seen_key)


def _keys(names: Iterable[str], key: str) -> NDArray[np.int64]:
    return np.array([subject_key(name, key) for name in names], dtype=np.int64)


def save(card: ModelCard, model: nn.Module, path: str | os.PathLike[str], seen: Seen | None = None) -> str:
    """Write the checkpoint and return its SHA-256. The file appears whole or not at all; see `to_bytes`.

    Its permissions are those that the umask of the process leaves.
    """
    data = to_bytes(card, model, seen)
    target = Path(path)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return hashlib.sha256(data).hexdigest()


def to_bytes(card: ModelCard, model: nn.Module, seen: Seen | None = None) -> bytes:
    """Return the checkpoint as bytes, equal for an equal card, weights and hashes in any order.

    The hashes take 8 bytes a subject and 8 bytes a row. For a card without `seen_key`, those of subjects are
    `subject_key`s under the salt of `card.split`, and there are none of rows. Raises `BadModelError` when the model is
    not the one that the card describes or holds a weight that is not finite, `ValueError` when there are hashes without
    a key to look them up, or a metric is not finite (JSON has no NaN; write null).
    """
    if seen is not None and card.split is None:
        raise ValueError("seen subjects without card.split: a subject cannot be looked up without the salt")
    if seen is not None and seen.rows is not None and card.seen_key is None:
        raise ValueError("seen rows without card.seen_key: a row cannot be looked up without the key")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _check_weights(weights, _skeleton(card), "the model to save")
    tensors = {_WEIGHTS + name: tensor for name, tensor in weights.items()}
    if seen is not None:
        tensors[_SEEN] = _sorted(seen.subjects)
        if seen.rows is not None:
            tensors[_SEEN_ROWS] = _sorted(seen.rows)
    text = json.dumps(card.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return safetensors.torch.save(tensors, {_CARD: text})


def _sorted(hashes: Hashes) -> Tensor:
    return torch.from_numpy(np.unique(hashes.astype(np.int64, casting="safe")))


def load(source: bytes | str | os.PathLike[str], *, name: str | None = None, max_bytes: int = MAX_BYTES) -> Checkpoint:
    """Return the checkpoint in a file or in bytes, safely even for a hostile file.

    Checked in this order: the size, before anything is read; the safetensors header; the card and its arguments; the
    names, shapes and types of all tensors, against a network that has shapes but no memory; that every weight is
    finite. Whatever fails raises `BadModelError`, which says what and names the way out. A missing file raises it too.
    Messages call the checkpoint `name`, by default its path.
    """
    data = source if isinstance(source, bytes) else _read(os.fspath(source), max_bytes)
    name = name or ("the given bytes" if isinstance(source, bytes) else os.fspath(source))
    if len(data) > max_bytes:
        raise BadModelError(f"{name}: {len(data):,} bytes, more than the limit of {max_bytes:,}; raise max_bytes")
    card = _read_card(data, name)
    skeleton = _skeleton_of_file(card, name)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise BadModelError(f"{name}: not a readable safetensors file ({first_line(error)}); copy it again") from error
    seen = _read_seen(tensors, _SEEN, card.split is not None, name)
    rows = _read_seen(tensors, _SEEN_ROWS, card.seen_key is not None, name)
    unknown = [key for key in tensors if not key.startswith(_WEIGHTS)]
    if unknown:
        raise BadModelError(f"{name}: unknown tensor {clipped(min(unknown))}; write checkpoints with `frontalis train`")
    weights = {key.removeprefix(_WEIGHTS): tensor for key, tensor in tensors.items()}
    _check_weights(weights, skeleton, name)
    skeleton.load_state_dict(weights, assign=True)
    return Checkpoint(skeleton.eval(), card, hashlib.sha256(data).hexdigest(), seen, rows)


def inference_options(
    card: ModelCard, statistic: Statistic, batch_size: int, precision: Precision = "float32"
) -> dict[str, str | int]:
    """Return the options that change a feature of this model, and no others: what `model_digest` is to be given."""
    if uses_batch(card.mode, statistic):
        return {"statistic": statistic, "batch_size": batch_size}
    options: dict[str, str | int] = {"statistic": statistic} if card.mode == "batch_stat" else {}
    return options if precision == "float32" else {**options, "precision": precision}


def model_digest(file_digest: str, options: Mapping[str, Any]) -> str:
    """Return 32 hex digits that stand for a model file together with the options it is run with.

    Options are hashed as canonical JSON, so their order does not matter. Raises `ValueError` or `TypeError` for an
    option that JSON cannot hold.
    """
    content = {"file": file_digest, "options": dict(options)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions that can change what training gives: Python and the libraries it runs on."""
    names = ("torch", "numpy", "pytorch-metric-learning", "safetensors")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def _skeleton(card: ModelCard) -> nn.Module:
    """Return the card's network: shapes, no memory. Raises `SettingsError` when the card contradicts itself."""
    arguments = check_arguments(card.architecture, card.arguments)
    if arguments.dim != card.embedding_dim:
        raise SettingsError(f"the card says embedding_dim {card.embedding_dim}, its arguments build {arguments.dim}")
    if mode_of(arguments) != card.mode:
        raise SettingsError(f"the card says mode {card.mode!r}, its arguments build {mode_of(arguments)!r}")
    with torch.device("meta"):
        return build(card.architecture, card.arguments)


def _check_weights(weights: Mapping[str, Tensor], skeleton: nn.Module, name: str) -> None:
    wanted = skeleton.state_dict()
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or unknown:
        what = f"lacks tensor {missing[0]!r}" if missing else f"has an unknown tensor {clipped(unknown[0])}"
        raise BadModelError(f"{name}: {what}; card and weights must be of the same model")
    for key, tensor in weights.items():
        found, expected = (list(tensor.shape), tensor.dtype), (list(wanted[key].shape), wanted[key].dtype)
        if found != expected:
            raise BadModelError(
                f"{name}: tensor {key!r} is {found[0]} {found[1]}, the card wants {expected[0]} {expected[1]}; "
                f"card and weights must be of the same model"
            )
        if not tensor.isfinite().all():
            raise BadModelError(f"{name}: tensor {key!r} holds NaN or infinity; train the model again, more gently")
        if key.endswith(("running_var", "num_batches_tracked", "frozen_rows")) and (tensor < 0).any():
            raise BadModelError(f"{name}: tensor {key!r} is negative, which no training gives; fetch the file again")


def _read(name: str, max_bytes: int) -> bytes:
    try:
        return read_regular(name, max_bytes)
    except OSError as error:
        raise BadModelError(f"{name}: cannot be read ({error.strerror}); give the path of a model file") from error


def _read_card(data: bytes, name: str) -> ModelCard:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise BadModelError(f"{name}: not a safetensors file, or cut short; copy it again")
    try:
        text = json.loads(data[8 : 8 + size])["__metadata__"][_CARD]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise BadModelError(f"{name}: carries no model card; write checkpoints with `frontalis train`") from error
    try:
        return ModelCard.model_validate_json(text)
    except ValidationError as error:
        raise BadModelError(f"{name}: the model card is wrong: {describe(error)}") from error


def _skeleton_of_file(card: ModelCard, name: str) -> nn.Module:
    try:
        return _skeleton(card)
    except SettingsError as error:
        raise BadModelError(f"{name}: the model card is wrong: {error}") from error


def _read_seen(tensors: dict[str, Tensor], key: str, has_key: bool, name: str) -> Hashes | None:
    tensor = tensors.pop(key, None)
    if tensor is None:
        return None
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or not (tensor[1:] > tensor[:-1]).all():
        raise BadModelError(f"{name}: {key} is not a sorted list of int64; train the model again")
    if not has_key:
        what = "split rule" if key == _SEEN else "key"
        raise BadModelError(f"{name}: {key} without a {what} cannot be looked up; train the model again")
    return tensor.numpy()
