"""Evaluation of published features: independent metrics, leakage, samples, duplicates, pairs, the served release."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from models.checkpoint import load, save
from models.seen import Seen, name_hashes
from schemas.index import IndexSettings
from schemas.metrics import ALL, HELD_OUT, RAW
from schemas.releases import Release
from schemas.reports import DataQuality, Evaluation, GateDecision
from schemas.settings import EvaluationSettings, PipelineSettings, pipeline
from storage.location import Location
from storage.tables import Snapshot
from tasks import evaluate as evaluate_module
from tasks.evaluate import evaluate
from tasks.evaluation import verification
from tasks.index import Previous
from tasks.plan import make_plan, prepare_models
from tasks.publish import publish
from tasks.reweight import ReweightSpec, reweight_group

FEW = EvaluationSettings(resamples=50)


def publish_all(settings: PipelineSettings) -> Snapshot:
    """Run plan, reweight and publish, and return the features."""
    models = prepare_models(settings)
    plan = make_plan(settings, models)
    spec = ReweightSpec.of(settings, models, plan.schema)
    results = [result for group in plan.groups for result in reweight_group(group, spec)]
    return publish(settings, plan, results).features


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_source, tiny_models) -> PipelineSettings:
    store = tmp_path_factory.mktemp("evaluate") / "store"
    return pipeline(source=str(tiny_source), store=str(store), models=tiny_models.by_mode)


@pytest.fixture(scope="module")
def features(settings) -> Snapshot:
    return publish_all(settings)


def as_served(settings: PipelineSettings, features: Snapshot) -> Previous:
    """Return the features as those of a release that is served."""
    release = Release(
        release="r00001-test",
        number=1,
        created=datetime.now(UTC),
        content="",
        source=settings.source,
        features_version=features.version,
        quarantine_version=None,
        models=prepare_models(settings),
        indexes={},
        data=DataQuality(shards=3, rows_read=280, rows_features=280, quarantined={}),
        gate=GateDecision(promoted=True, reason=""),
        gated={},
        gated_name="",
        report=None,
        serving=True,
    )
    return Previous(release, features)


@pytest.fixture(scope="module")
def evaluation(settings, features) -> Evaluation:
    return measure(settings, features)


def measure(
    settings: PipelineSettings, features: Snapshot, evaluation: EvaluationSettings = FEW, served=None, anchor=None
) -> Evaluation:
    models = prepare_models(settings)
    store = Location(settings.store)
    return evaluate(store, "r00001-test", features, models, evaluation, IndexSettings(), served, anchor)


def scores_of(source: Path, poses: set[frozenset[str]] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Score all pairs of the source with NumPy alone: labels and cosines."""
    rows = pl.read_parquet(source / "*.parquet")
    x = rows["embedding"].to_numpy().astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    first, second = np.array(list(combinations(range(len(x)), 2))).T
    if poses is not None:
        pose = rows["pose"].to_numpy()
        keep = [frozenset((pose[a], pose[b])) in poses for a, b in zip(first, second, strict=True)]
        first, second = first[keep], second[keep]
    subject = rows["subject"].to_numpy()
    return subject[first] == subject[second], np.einsum("ij,ij->i", x[first], x[second])


@pytest.mark.parametrize(
    ("cell", "poses"),
    [
        (ALL, None),
        ("frontal-frontal", {frozenset(["frontal"])}),
        ("frontal-profile", {frozenset(["frontal", "profile"])}),
        ("profile-profile", {frozenset(["profile"])}),
    ],
)
def test_raw_over_all_subjects_agrees_with_scikit_learn(evaluation, tiny_source, cell, poses) -> None:
    found = evaluation.populations[ALL].modes[RAW].cells[cell]
    same, scores = scores_of(tiny_source, poses)
    assert (found.n_genuine, found.n_impostor) == (same.sum(), (~same).sum())
    assert found.auc.value == pytest.approx(roc_auc_score(same, scores), abs=1e-6)
    fmr, tpr, _ = roc_curve(same, scores, drop_intermediate=False)
    for point in ("1e-1", "1e-2"):
        expected = 1 - tpr[fmr <= float(point)].max()
        assert found.fnmr[point].value == pytest.approx(expected, abs=1e-6)
    nearest = np.argmin(np.abs(fmr - (1 - tpr)))
    assert found.eer.value == pytest.approx((fmr[nearest] + 1 - tpr[nearest]) / 2, abs=0.01)
    assert found.eer.low <= found.eer.value <= found.eer.high


def test_seen_subjects_are_left_out_where_modes_are_compared(evaluation) -> None:
    everybody, held_out = evaluation.populations[ALL], evaluation.populations[HELD_OUT]
    assert list(everybody.modes) == [RAW]
    assert list(held_out.modes) == [RAW, "per_sample", "batch_stat"]
    assert everybody.n_subjects == 20
    assert held_out.left_out_subjects > 0
    assert held_out.n_subjects + held_out.left_out_subjects == 20
    assert held_out.n_rows + held_out.left_out_rows == everybody.n_rows == 280
    assert all(one.cells[ALL].n_genuine == held_out.modes[RAW].cells[ALL].n_genuine for one in held_out.modes.values())
    paired = held_out.modes["per_sample"].difference[ALL]["eer"]
    expected = held_out.modes["per_sample"].cells[ALL].eer.value - held_out.modes[RAW].cells[ALL].eer.value
    assert paired.value == pytest.approx(expected, abs=1e-12)


def test_names_in_capitals_and_renamed_subjects_give_the_same_held_out_subjects(
    tmp_path, tiny_source, make_checkpoint
) -> None:
    made = load(make_checkpoint(tmp_path / "made.safetensors"))
    rows = pl.read_parquet(tiny_source / "*.parquet")
    seen = made.has_seen(rows["subject"].to_list())
    x = rows["embedding"].to_numpy()[seen]
    model = tmp_path / "model.safetensors"
    save(made.card, made.model, model, Seen.of(rows["subject"].filter(seen).unique(), [x], made.card.seen_key))
    expected = None
    for number, rename in enumerate((None, str.upper, lambda name: f"{int(name[-6:]) + 7:d}")):
        source = table_with(tmp_path / str(number), tiny_source, lambda table, rename=rename: _renamed(table, rename))
        chosen = pipeline(source=str(source), store=str(source.parent / "store"), models={"per_sample": str(model)})
        evaluation = measure(chosen, publish_all(chosen), EvaluationSettings(resamples=0))
        found = evaluation.populations[HELD_OUT]
        expected = expected or found
        assert found.left_out_subjects == 13
        assert found.modes["per_sample"].cells == expected.modes["per_sample"].cells
        warned = any(
            note.startswith("warning: mode per_sample: 13 subjects were left out") for note in evaluation.notes
        )
        assert warned == (rename not in (None, str.upper))


def _renamed(table: pa.Table, rename) -> pa.Table:
    names = [rename(name) if rename else name for name in table["subject"].to_pylist()]
    return table.set_column(table.schema.get_field_index("subject"), "subject", pa.array(names, pa.string()))


def test_model_that_has_seen_everybody_is_reported(tmp_path, tiny_source, make_checkpoint) -> None:
    model = make_checkpoint(tmp_path / "leaky.safetensors")
    checkpoint = load(model)
    names = pl.read_parquet(tiny_source / "*.parquet")["subject"].unique()
    keys = name_hashes(names, checkpoint.card.seen_key)
    save(checkpoint.card, checkpoint.model, model, Seen(keys, np.zeros(0, np.int64)))
    leaky = pipeline(source=str(tiny_source), store=str(tmp_path / "store"), models={"per_sample": str(model)})
    evaluation = measure(leaky, publish_all(leaky))
    assert list(evaluation.populations) == [ALL]
    assert any("fewer than two labelled subjects are held out" in note for note in evaluation.notes)


def test_model_without_recorded_subjects_is_noted_and_equal_populations_are_measured_once(
    tmp_path, tiny_source, make_checkpoint, monkeypatch
) -> None:
    model = make_checkpoint(tmp_path / "silent.safetensors")
    checkpoint = load(model)
    save(checkpoint.card, checkpoint.model, model, None)
    silent = pipeline(source=str(tiny_source), store=str(tmp_path / "store"), models={"per_sample": str(model)})
    features = publish_all(silent)
    calls = []
    true, search = verification.all_pairs, evaluate_module.identify_mode
    monkeypatch.setattr(verification, "all_pairs", lambda *rows, **more: calls.append("pairs") or true(*rows, **more))
    monkeypatch.setattr(evaluate_module, "identify_mode", lambda *rows: calls.append("search") or search(*rows))
    evaluation = measure(silent, features, EvaluationSettings(resamples=0), served=as_served(silent, features))
    assert any("leakage cannot be excluded" in note for note in evaluation.notes)
    assert sorted(calls) == ["pairs", "pairs", "search", "search"]  # raw and per_sample
    everybody, held_out = evaluation.populations[ALL], evaluation.populations[HELD_OUT]
    assert everybody.n_rows == held_out.n_rows == 280
    assert everybody.modes[RAW] == held_out.modes[RAW]


def test_limit_on_rows_samples_whole_subjects(settings, features) -> None:
    limited = measure(settings, features, EvaluationSettings(resamples=0, max_rows=100)).populations[ALL]
    assert limited.n_rows == 98
    assert limited.n_subjects == 7
    assert limited.sampled_from_subjects == 20
    again = measure(settings, features, EvaluationSettings(resamples=0, max_rows=100)).populations[ALL]
    assert again == limited


def test_no_resamples_give_no_intervals(settings, features) -> None:
    result = measure(settings, features, EvaluationSettings(resamples=0)).populations[HELD_OUT].modes["per_sample"]
    assert result.cells[ALL].eer.value is not None
    assert result.cells[ALL].eer.low is None
    difference = result.difference[ALL]["eer"]
    assert difference.value is not None
    assert (difference.low, difference.high) == (None, None)


def test_against_the_served_release(settings, features, tmp_path, make_checkpoint) -> None:
    same = measure(settings, features, served=as_served(settings, features)).populations[HELD_OUT].modes["per_sample"]
    assert same.versus_served[ALL]["eer"].value == 0
    assert same.versus_served[ALL]["eer"].low == same.versus_served[ALL]["eer"].high == 0
    ruined = make_checkpoint(tmp_path / "ruined.safetensors", strength=1.0)
    other = settings.model_copy(update={"models": {**settings.models, "per_sample": str(ruined)}})
    store = tmp_path / "store"
    shutil.copytree(settings.store, store)
    other = other.model_copy(update={"store": str(store)})
    before = as_served(settings, features)
    snapshot = publish_all(other)
    modes = measure(other, snapshot, served=before, anchor=before.release).populations[HELD_OUT].modes
    worse = modes["per_sample"].versus_served[ALL]["eer"]
    assert worse.value > 0
    assert worse.low > 0
    # What the models of the anchor make of the same rows is what was published with them.
    assert modes["per_sample"].versus_anchor == modes["per_sample"].versus_served
    assert modes["batch_stat"].versus_anchor == {}  # the same model
    eer = modes["per_sample"].cells[ALL].eer.value
    relative = modes["per_sample"].relative_to_anchor[ALL]["eer"]
    assert relative.value == pytest.approx(worse.value / (eer - worse.value))
    assert 0 < relative.low < relative.value < relative.high

    # Nobody is compared whom the model of the anchor was trained on, and a lost model is a note.
    leaky = load(Path(settings.models["per_sample"]))
    names = pl.read_parquet(Path(settings.source) / "*.parquet")["subject"].unique()
    seen = Seen(name_hashes(names, leaky.card.seen_key), np.zeros(0, np.int64))
    digest = save(leaky.card, leaky.model, store / "models" / "leaky.safetensors", seen)
    for path, why in (("leaky", None), ("lost", "the model is missing; restore it")):
        model = before.release.models["per_sample"].replaced(path=f"models/{path}.safetensors", digest=digest)
        anchor = before.release.replaced(models={"per_sample": model})
        found = measure(other, snapshot, EvaluationSettings(resamples=0), anchor=anchor)
        assert found.populations[HELD_OUT].modes["per_sample"].versus_anchor == {}
        assert (found.anchor_unread or "").find(why or "") >= 0
        assert bool(found.anchor_unread) == bool(why)
        assert any("not compared with the anchor: " in note for note in found.notes) == bool(why)


def table_with(tmp_path: Path, source: Path, change) -> Path:
    folder = tmp_path / "changed"
    folder.mkdir(parents=True)
    table = pa.concat_tables(pq.read_table(file, use_threads=False) for file in sorted(source.glob("*.parquet")))
    pq.write_table(change(table), folder / "all.parquet")
    return folder


def test_byte_identical_embeddings_never_form_a_pair(tmp_path, tiny_source, tiny_models) -> None:
    def repeat_first_row_under_another_id(table: pa.Table) -> pa.Table:
        copy = table.slice(0, 1).set_column(0, "id", pa.array(["copy"]))
        return pa.concat_tables([table, copy])

    source = table_with(tmp_path, tiny_source, repeat_first_row_under_another_id)
    doubled = pipeline(source=str(source), store=str(tmp_path / "store"), models=tiny_models.by_mode)
    evaluation = measure(doubled, publish_all(doubled))
    cell = evaluation.populations[ALL].modes[RAW].cells[ALL]
    assert evaluation.duplicate_rows == 1
    same, _ = scores_of(tiny_source)
    # The copy pairs with the 13 other rows of its subject and the 266 rows of others, but not with its original.
    assert cell.n_genuine == same.sum() + 13
    assert cell.n_impostor == (~same).sum() + 266


def test_unlabelled_rows_are_counted_not_measured(tmp_path, tiny_source, tiny_models) -> None:
    def forget_some_subjects(table: pa.Table) -> pa.Table:
        names = [None if row < 14 else name for row, name in enumerate(table["subject"].to_pylist())]
        return table.set_column(table.schema.get_field_index("subject"), "subject", pa.array(names, pa.string()))

    source = table_with(tmp_path, tiny_source, forget_some_subjects)
    partly = pipeline(source=str(source), store=str(tmp_path / "store"), models=tiny_models.by_mode)
    evaluation = measure(partly, publish_all(partly))
    assert evaluation.unlabelled_rows == 14
    assert evaluation.populations[ALL].n_subjects == 19


def test_pairs_of_rows_without_a_subject_are_left_out_not_missing(tmp_path, tiny_source, tiny_models) -> None:
    def forget_some_subjects(table: pa.Table) -> pa.Table:
        names = [None if row < 14 else name for row, name in enumerate(table["subject"].to_pylist())]
        return table.set_column(table.schema.get_field_index("subject"), "subject", pa.array(names, pa.string()))

    source = table_with(tmp_path, tiny_source, forget_some_subjects)
    ids = pl.read_parquet(source / "*.parquet")["id"].to_list()
    pairs = tmp_path / "pairs.parquet"
    pl.DataFrame(
        {"id_a": [ids[0], f" {ids[20]}\t", "nobody"], "id_b": [ids[1], ids[21], ids[0]], "same": [True, True, False]}
    ).write_parquet(pairs)
    partly = pipeline(source=str(source), store=str(tmp_path / "store"), models=tiny_models.by_mode)
    evaluation = measure(partly, publish_all(partly), EvaluationSettings(resamples=0, pairs=str(pairs)))
    (found,) = evaluation.populations[ALL].modes[RAW].pairs
    assert (found.n_pairs, found.left_out, found.missing) == (1, 1, 1)


def test_no_labels_at_all_measure_nothing(tmp_path, tiny_source, tiny_models) -> None:
    source = table_with(tmp_path, tiny_source, lambda table: table.drop_columns(["subject"]))
    nameless = pipeline(source=str(source), store=str(tmp_path / "store"), models=tiny_models.by_mode)
    evaluation = measure(nameless, publish_all(nameless))
    assert evaluation.populations == {}
    assert evaluation.unlabelled_rows == 280


def test_training_subjects_of_the_served_model_are_not_compared(settings, features, tmp_path, make_checkpoint) -> None:
    before = as_served(settings, features)
    checkpoint = load(make_checkpoint(tmp_path / "served.safetensors"))
    names = pl.read_parquet(Path(settings.source) / "*.parquet")["subject"].unique().sort()
    keys = name_hashes(names, checkpoint.card.seen_key)
    path = Path(settings.store) / "models" / "served.safetensors"
    save(checkpoint.card, checkpoint.model, path, Seen(keys, np.zeros(0, np.int64)))
    model = before.release.models["per_sample"].model_copy(update={"path": "models/served.safetensors"})
    leaky = replace(before, release=before.release.model_copy(update={"models": {"per_sample": model}}))
    result = measure(settings, features, served=leaky).populations[HELD_OUT].modes["per_sample"]
    assert result.versus_served == {}
    assert result.difference[ALL]["eer"].value is not None


def test_model_without_recorded_subjects_is_marked_and_no_reference(
    settings, features, tmp_path, make_checkpoint
) -> None:
    checkpoint = load(make_checkpoint(tmp_path / "silent.safetensors"))
    save(checkpoint.card, checkpoint.model, Path(settings.store) / "models" / "silent.safetensors")
    models = prepare_models(settings)
    silent = {**models, "per_sample": models["per_sample"].model_copy(update={"path": "models/silent.safetensors"})}
    found = evaluate(Location(settings.store), "r00001-test", features, silent, FEW, IndexSettings())
    modes = found.populations[HELD_OUT].modes
    assert [mode for mode, result in modes.items() if not result.training_subjects_known] == ["per_sample"]
    assert any("mode per_sample: the checkpoint does not record" in note for note in found.notes)
    before = as_served(settings, features)
    leaky = replace(before, release=before.release.model_copy(update={"models": silent}))
    compared = measure(settings, features, served=leaky).populations[HELD_OUT].modes
    assert compared["per_sample"].versus_served == {}
    assert compared["batch_stat"].versus_served[ALL]["eer"].value == 0
