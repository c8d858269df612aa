"""Settings: what is misspelt, out of range or contradictory is refused by name; paths go with their file."""

from pathlib import Path

import pytest

from schemas.errors import SettingsError
from schemas.settings import ColumnNames, TrainingSettings, checked, load_pipeline, pipeline

LEAST = {"source": "shards", "store": "store", "models": {"per_sample": "per_sample.safetensors"}}

TOML = """
source = "shards"
store = "s3://bucket/store"
wait = 30

[models]
per_sample = "models/per_sample.safetensors"
batch_stat = "/models/batch_stat.safetensors"

[columns]
id = "photo"
keep = ["camera"]

[evaluation]
pairs = "pairs.parquet"
fmrs = ["1e-2", "1e-3"]

[gate]
metric = "fnmr@1e-3"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    file = tmp_path / "pipeline.toml"
    file.write_text(TOML)
    return file


def test_relative_paths_are_relative_to_the_file(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load_pipeline("../pipeline.toml")
    assert found.source == f"{tmp_path}/shards"
    assert found.store == "s3://bucket/store"
    assert found.models["per_sample"] == f"{tmp_path}/models/per_sample.safetensors"
    assert found.models["batch_stat"] == "/models/batch_stat.safetensors"
    assert found.evaluation.pairs == f"{tmp_path}/pairs.parquet"
    assert (found.columns.id, found.columns.keep, found.wait) == ("photo", ("camera",), 30)


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    file = tmp_path / "pipeline.toml"
    file.write_text(
        "source = '~/shards'\nstore = '~'\n[models]\nper_sample = '~/m'\n[evaluation]\npairs = '~nobody-here/p'\n"
    )
    found = load_pipeline(str(file))
    assert (found.source, found.store) == ("/home/ada/shards", "/home/ada")
    assert found.models["per_sample"] == "/home/ada/m"
    assert found.evaluation.pairs == f"{tmp_path}/~nobody-here/p"


def test_what_is_typed_wins_and_stays_as_typed(toml: Path) -> None:
    found = load_pipeline(str(toml), source="here", wait=0.0, store=None)
    assert (found.source, found.wait, found.store) == ("here", 0.0, "s3://bucket/store")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sourc": "x"}, "sourc: Extra inputs are not permitted (found 'x')"),
        ({"columns": {"ident": "x"}}, "columns.ident: Extra inputs are not permitted (found 'x')"),
        ({"index": {"kind": "flat"}}, "index.kind: Extra inputs"),
        ({"source": None}, "source: Input should be a valid string (found None)"),
        ({"models": {}}, "models: models: name at least one"),
        ({"models": {"batch": "x"}}, "models.batch.[key]: Input should be 'per_sample' or 'batch_stat'"),
        ({"wait": -1}, "wait: Input should be greater than or equal to 0 (found -1)"),
        ({"wait": "soon"}, "wait: Input should be a valid number"),
        ({"reweight": {"batch_size": 0}}, "reweight.batch_size: Input should be greater than or equal to 1 (found 0)"),
        ({"columns": {"keep": ["camera", "camera"]}}, "columns.keep: 'camera' is written already"),
        ({"columns": {"keep": ["front"]}}, "columns.keep: 'front' is written already; leave it out"),
        ({"columns": {"keep": ["Front"]}}, "columns.keep: 'Front' is written already; leave it out"),
        ({"columns": {"keep": ["Camera", "cameRA"]}}, "columns.keep: 'cameRA' is written already"),
        ({"evaluation": {"fmrs": ["1e-3", "never"]}}, "'never' is no rate between 0 and 1"),
        ({"evaluation": {"fmrs": ["1"]}}, "'1' is no rate between 0 and 1"),
        ({"evaluation": {"fmrs": ["nan"]}}, "'nan' is no rate between 0 and 1"),
        ({"evaluation": {"frontal_yaw": 40}}, "frontal_yaw 40.0 must be below profile_yaw 35.0"),
        ({"evaluation": {"profile_yaw": 15}}, "frontal_yaw 15.0 must be below profile_yaw 15.0"),
        ({"gate": {"metric": "auc"}}, "gate.metric: 'auc' is unknown; use 'eer', 'fnmr@<fmr>' or 'fnmr_global@<fmr>'"),
        ({"gate": {"metric": "fnmr@1e-9"}}, "gate.metric 'fnmr@1e-9': '1e-9' is not among evaluation.fmrs"),
        ({"gate": {"metric": "fnmr@eer"}}, "gate.metric: 'fnmr@eer': 'eer' is no rate between 0 and 1"),
        ({"gate": {"metric": "fnmr_global@1e-9"}}, "gate.metric 'fnmr_global@1e-9': '1e-9' is not among"),
        (
            {"gate": {"cell": "frontal-proffile"}},
            "gate.cell: 'frontal-proffile' is no cell; use 'all' or two of frontal,",
        ),
        ({"gate": {"cell": "frontal"}}, "gate.cell: 'frontal' is no cell"),
        ({"gate": {"guards": [{"cell": "profil-profile"}]}}, "gate.guards.0.cell: 'profil-profile' is no cell"),
        (
            {"gate": {"guards": [{"cell": "all", "metric": "fnmr@1e-9"}]}},
            "gate.metric 'fnmr@1e-9': '1e-9' is not among",
        ),
        ({"gate": {"unmeasured": "yes"}}, "gate.unmeasured: Input should be 'keep' or 'promote'"),
        ({"gate": {"tolerance": 2}}, "gate.tolerance: Input should be less than or equal to 1 (found 2)"),
        ({"runner": {"kind": "spark"}}, "runner.kind: Input should be 'threads' or 'dask' (found 'spark')"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        pipeline(**{**LEAST, **values})
    assert message in str(refused.value)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"store: Field required; models: Field required; wait: .*\(found -5\)"):
        pipeline(source="x", wait=-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"source = ", "is no TOML"),
        (b"source = '\xff'", "is no TOML"),
        (b"source = 'a'\nsource = 'b'", "is no TOML"),
        (b"source = 7\nstore = 'x'\nmodels = 3", "source: .*found 7.*models: .*found 3"),
        (b"source = 'a'\nstore = 'b'\nevaluation = 'all'\n[models]\nper_sample = 'x'", "evaluation: .*found 'all'"),
    ],
)
def test_a_file_that_is_no_pipeline_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        load_pipeline(str(file))


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot be read \(.*\); pass --config FILE"):
        load_pipeline(str(tmp_path / name))


def test_cells_are_named_in_either_order() -> None:
    gate = pipeline(**LEAST, gate={"cell": "profile-frontal", "guards": [{"cell": "unknown-half"}]}).gate
    assert [guard.cell for guard in gate.guarded] == ["frontal-profile", "half-unknown"]


def test_settings_go_through_json_unchanged() -> None:
    found = pipeline(**LEAST, columns={"keep": ["camera"]}, index={"nprobe": 4}, gate={"metric": "fnmr@1e-3"})
    assert type(found).model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("name", sorted({"mode", "shard", *ColumnNames.model_fields} - {"keep", "embedding"}))
def test_names_that_features_use_cannot_be_kept(name: str) -> None:
    with pytest.raises(SettingsError, match=f"'{name}' is written already"):
        checked(ColumnNames, {"keep": [name]})


def test_a_split_must_leave_somebody_to_train_on() -> None:
    least = {"sources": ["a"], "out": "model.safetensors"}
    with pytest.raises(SettingsError, match=r"validation 0\.5 \+ test 0\.5 leave nobody to train on"):
        checked(TrainingSettings, {**least, "validation": 0.5, "test": 0.5})
    assert checked(TrainingSettings, {**least, "validation": 0.5, "test": 0.4}).test == 0.4
    with pytest.raises(SettingsError, match="sources: "):
        checked(TrainingSettings, {**least, "sources": []})
