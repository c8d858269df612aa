"""Evaluation of published features: independent figures, leaks, samples, duplicates, pairs, the served release."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from schemas.errors import SettingsError
from schemas.index import IndexSettings
from schemas.reports import ALL, RAW, Evaluation
from schemas.settings import EvaluationSettings, PipelineSettings, pipeline
from storage.tables import Snapshot
from tasks.evaluate import HELD_OUT, evaluate, read_pairs
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


@pytest.fixture(scope="module")
def evaluation(settings, features) -> Evaluation:
    return measure(settings, features)


def measure(settings: PipelineSettings, features: Snapshot, evaluation: EvaluationSettings = FEW, served=None):
    return evaluate(
        settings.store, "r00001-test", features, prepare_models(settings), evaluation, IndexSettings(), served
    )


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
def test_raw_over_everybody_agrees_with_scikit_learn(evaluation, tiny_source, cell, poses) -> None:
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


def test_model_that_has_seen_everybody_is_reported(tmp_path, tiny_source, make_checkpoint) -> None:
    from models.checkpoint import load, save
    from schemas.split import subject_key

    model = make_checkpoint(tmp_path / "leaky.safetensors")
    checkpoint = load(model)
    names = pl.read_parquet(tiny_source / "*.parquet")["subject"].unique()
    keys = np.array([subject_key(name, checkpoint.card.split.salt) for name in names])
    save(checkpoint.card, checkpoint.model, model, keys)
    leaky = pipeline(source=str(tiny_source), store=str(tmp_path / "store"), models={"per_sample": str(model)})
    evaluation = measure(leaky, publish_all(leaky))
    assert list(evaluation.populations) == [ALL]
    assert any("no model has seen" in note for note in evaluation.notes)


def test_model_that_does_not_tell_is_noted(tmp_path, tiny_source, make_checkpoint) -> None:
    from models.checkpoint import load, save

    model = make_checkpoint(tmp_path / "silent.safetensors")
    checkpoint = load(model)
    save(checkpoint.card, checkpoint.model, model, None)
    silent = pipeline(source=str(tiny_source), store=str(tmp_path / "store"), models={"per_sample": str(model)})
    evaluation = measure(silent, publish_all(silent))
    assert any("flattered by leaks" in note for note in evaluation.notes)


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
    assert result.difference == {}


def test_against_the_served_release(settings, features, tmp_path, make_checkpoint) -> None:
    same = measure(settings, features, served=features).populations[HELD_OUT].modes["per_sample"]
    assert same.versus_served[ALL]["eer"].value == 0
    assert same.versus_served[ALL]["eer"].low == same.versus_served[ALL]["eer"].high == 0
    ruined = make_checkpoint(tmp_path / "ruined.safetensors", strength=1.0)
    other = settings.model_copy(update={"models": {**settings.models, "per_sample": str(ruined)}})
    store = tmp_path / "store"
    shutil.copytree(settings.store, store)
    other = other.model_copy(update={"store": str(store)})
    evaluation = measure(other, publish_all(other), served=features)
    worse = evaluation.populations[HELD_OUT].modes["per_sample"].versus_served[ALL]["eer"]
    assert worse.value > 0
    assert worse.low > 0


def table_with(tmp_path: Path, source: Path, change) -> Path:
    folder = tmp_path / "changed"
    folder.mkdir()
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


def test_no_labels_at_all_measure_nothing(tmp_path, tiny_source, tiny_models) -> None:
    source = table_with(tmp_path, tiny_source, lambda table: table.drop_columns(["subject"]))
    nameless = pipeline(source=str(source), store=str(tmp_path / "store"), models=tiny_models.by_mode)
    evaluation = measure(nameless, publish_all(nameless))
    assert evaluation.populations == {}
    assert evaluation.unlabelled_rows == 280


def write_pairs(path: Path, source: Path, folds: int = 4) -> pl.DataFrame:
    rows = pl.read_parquet(source / "*.parquet").sort("id")
    names, subjects = rows["id"].to_list(), rows["subject"].to_list()
    random = np.random.default_rng(0)
    genuine = [(a, b) for a, b in combinations(range(len(names)), 2) if subjects[a] == subjects[b]]
    impostor = [(a, b) for a, b in combinations(range(len(names)), 2) if subjects[a] != subjects[b]]
    picked = [genuine[at] for at in random.permutation(len(genuine))[:80]]
    picked += [impostor[at] for at in random.permutation(len(impostor))[:80]]
    pairs = pl.DataFrame(
        {
            "protocol": ["P"] * 160,
            "fold": [at % folds for at in range(160)],
            "id_a": [names[a] for a, _ in picked],
            "id_b": [names[b] for _, b in picked],
            "same": [True] * 80 + [False] * 80,
        }
    )
    pairs.write_parquet(path)
    return pairs


def test_pairs_file_gives_accuracy_with_the_threshold_of_the_other_folds(
    tmp_path, settings, features, tiny_source
) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", tiny_source)
    result = measure(settings, features, EvaluationSettings(resamples=0, pairs=str(tmp_path / "pairs.parquet")))
    (found,) = result.populations[ALL].modes[RAW].pairs
    assert (found.n_pairs, found.missing, found.n_folds) == (160, 0, 4)
    rows = pl.read_parquet(tiny_source / "*.parquet")
    x = dict(zip(rows["id"], rows["embedding"].to_numpy().astype(np.float64), strict=True))
    cosine = np.array(
        [x[a] @ x[b] / np.linalg.norm(x[a]) / np.linalg.norm(x[b]) for a, b in pairs.select("id_a", "id_b").rows()]
    )
    same, folds = pairs["same"].to_numpy(), pairs["fold"].to_numpy()
    lowest, highest = [], []
    for fold in range(4):
        others = folds != fold
        accuracy = {t: np.mean((cosine[others] >= t) == same[others]) for t in cosine}
        best = [t for t, value in accuracy.items() if value == max(accuracy.values())]
        here = [np.mean((cosine[~others] >= t) == same[~others]) for t in best]
        lowest.append(min(here))
        highest.append(max(here))
    # Several thresholds may tie; any of them is admissible here, the tie rule itself is tested with the metric.
    assert np.mean(lowest) - 1e-9 <= found.accuracy_mean <= np.mean(highest) + 0.02


def test_pairs_that_name_unknown_ids_are_counted(tmp_path, settings, features, tiny_source) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", tiny_source)
    changed = pairs.with_columns(
        id_a=pl.when(pl.int_range(pl.len()) < 5).then(pl.lit("nobody")).otherwise(pl.col("id_a"))
    )
    changed.write_parquet(tmp_path / "pairs.parquet")
    result = measure(settings, features, EvaluationSettings(resamples=0, pairs=str(tmp_path / "pairs.parquet")))
    (found,) = result.populations[ALL].modes[RAW].pairs
    assert (found.n_pairs, found.missing) == (155, 5)


def test_single_fold_is_not_estimable(tmp_path, settings, features, tiny_source) -> None:
    write_pairs(tmp_path / "pairs.parquet", tiny_source, folds=1)
    result = measure(settings, features, EvaluationSettings(resamples=0, pairs=str(tmp_path / "pairs.parquet")))
    (found,) = result.populations[ALL].modes[RAW].pairs
    assert found.accuracy_mean is None
    assert "two folds" in found.reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"no parquet", "cannot be read as Parquet"),
        (pl.DataFrame({"id_a": ["x"], "id_b": ["y"]}), "column 'same' is missing"),
        (pl.DataFrame({"id_a": ["x"], "id_b": ["y"], "same": ["perhaps"]}), "boolean 'same'"),
    ],
)
def test_unusable_pairs_files_are_refused(tmp_path, content, message) -> None:
    path = tmp_path / "pairs.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        content.write_parquet(path)
    with pytest.raises(SettingsError, match=message):
        read_pairs(str(path))
