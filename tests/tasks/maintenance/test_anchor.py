"""The anchor stays where it is until it is moved, and its models stay with it."""

import shutil
from pathlib import Path

import pytest

from schemas.errors import SettingsError, StoreError
from schemas.releases import anchor_of
from storage.location import Location
from storage.releases import Releases
from tasks.maintenance.anchor import move_anchor
from tasks.maintenance.vacuum import clean
from tasks.maintenance.verify import check


@pytest.fixture(scope="module")
def three_releases(serve_stages, pipeline_of, plain_source, make_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for number in range(3):
        model = make_checkpoint(folder / f"{number}.safetensors", seed=number)
        serve_stages(pipeline_of(plain_source, folder / "store", models={"per_sample": str(model)}))
    return folder / "store"


@pytest.fixture
def store(three_releases: Path, tmp_path: Path) -> Path:
    shutil.copytree(three_releases, tmp_path / "store")
    return tmp_path / "store"


def anchor(store: Path) -> str:
    found = anchor_of(Releases(Location(str(store))).all())
    assert found is not None
    return found.release


def models(store: Path) -> set[Path]:
    return set((store / "models").iterdir())


def test_vacuum_keeps_the_models_of_the_anchor_and_nothing_else_of_it(store: Path) -> None:
    assert anchor(store) == "r1"
    assert clean(str(store), keep=1).removed_releases == ["r1", "r2"]
    first = Releases(Location(str(store))).all()[0]
    assert {store / model.path for model in first.models.values()} < models(store)
    assert len(models(store)) == 2
    checked = check(str(store))
    assert [one.thing for one in checked.problems if "report" not in one.what] == []
    assert checked.leftovers == []
    assert move_anchor(str(store), "r1").release == "r1"  # vacuumed, and complete as an anchor
    assert move_anchor(str(store), "r3").anchor
    assert anchor(store) == "r3"
    gone = [name for name in clean(str(store), keep=1).files if name.startswith("models/")]
    assert gone == [model.path for model in first.models.values()]
    with pytest.raises(StoreError, match="the model is missing"):
        move_anchor(str(store), "r1")
    assert anchor(store) == "r3"


def test_a_lost_model_of_the_anchor_is_a_problem(store: Path) -> None:
    clean(str(store), keep=1)
    first = Releases(Location(str(store))).all()[0]
    (store / first.models["per_sample"].path).unlink()
    (problem,) = [one for one in check(str(store)).problems if "report" not in one.what]
    assert problem.thing == "r1, the anchor"
    assert "is missing" in problem.what


def test_an_unknown_release_is_refused(store: Path) -> None:
    with pytest.raises(SettingsError, match="'r9' is not in"):
        move_anchor(str(store), "r9")
