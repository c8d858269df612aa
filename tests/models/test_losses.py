import sys

import numpy as np
import pytest
import torch

from models.losses import LOSSES, make_loss
from schemas.errors import SettingsError


def angles(*degrees: float) -> torch.Tensor:
    radians = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def cosine(degrees: float) -> float:
    return float(np.cos(np.deg2rad(degrees)))


def test_triplet_takes_each_rows_hardest_positive_and_hardest_negative():
    # Subject 0 at 0°, 40°, subject 1 at 60°, 70°. Hardest positive, hardest negative of each row:
    pairs = [(40, 60), (40, 20), (10, 20), (10, 30)]
    margin = 0.5
    losses = [max(0.0, cosine(negative) - cosine(positive) + margin) for positive, negative in pairs]
    loss = make_loss("triplet", margin=margin)(angles(0, 40, 60, 70), torch.tensor([0, 0, 1, 1]))
    assert loss.item() == pytest.approx(np.mean([value for value in losses if value > 0]), abs=1e-6)


def test_supervised_contrastive_follows_its_formula():
    temperature = 0.1
    places, labels = [0.0, 30.0, 50.0, 90.0, 100.0], [0, 0, 0, 1, 1]
    terms = []
    for i, place in enumerate(places):
        others = {j: np.exp(cosine(place - places[j]) / temperature) for j in range(5) if j != i}
        positives = [j for j in others if labels[j] == labels[i]]
        terms.append(-np.mean([np.log(others[j] / sum(others.values())) for j in positives]))
    loss = make_loss("supcon", temperature=temperature)(angles(*places), torch.tensor(labels))
    assert loss.item() == pytest.approx(np.mean(terms), abs=1e-5)


def test_shared_bar_follows_its_formula():
    temperature, fmr = 0.1, 0.02
    places, labels = [0.0, 30.0, 50.0, 90.0, 100.0], [0, 0, 0, 1, 1]
    pairs = [(i, j) for i in range(5) for j in range(i)]
    genuine = [cosine(places[i] - places[j]) for i, j in pairs if labels[i] == labels[j]]
    impostor = [cosine(places[i] - places[j]) for i, j in pairs if labels[i] != labels[j]]
    assert (len(genuine), len(impostor)) == (4, 6)
    threshold = np.log(sum(np.exp(s / temperature) for s in impostor)) - np.log(fmr * len(impostor))
    expected = np.mean([np.log1p(np.exp(threshold - s / temperature)) for s in genuine])
    loss = make_loss("global_threshold", temperature=temperature, fmr=fmr)(angles(*places), torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_shared_bar_needs_impostors_too():
    assert make_loss("global_threshold")(angles(0, 10, 20), torch.zeros(3, dtype=torch.int64)).item() == 0


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_ignores_the_length_of_features_and_falls_by_gradient_descent(name):
    torch.manual_seed(0)
    features, labels = torch.randn(24, 8, requires_grad=True), torch.arange(24) % 6
    loss = make_loss(name)
    first = loss(features, labels)
    assert loss(features * 7, labels).item() == pytest.approx(first.item(), rel=1e-4)
    optimiser = torch.optim.SGD([features], lr=0.5)
    for _ in range(40):
        optimiser.zero_grad()
        loss(features, labels).backward()
        optimiser.step()
    assert loss(features, labels).item() < 0.7 * first.item()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_batch_without_a_genuine_pair_has_no_loss_but_a_gradient(name):
    features = torch.randn(4, 8, requires_grad=True)
    loss = make_loss(name)(features, torch.arange(4))
    loss.backward()
    assert loss.item() == 0
    assert features.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("arcface", {}, "'arcface' is unknown; known are global_threshold, supcon, triplet"),
        ("triplet", {"temperature": 1}, "temperature"),
        ("triplet", {"margin": 0}, "margin is 0"),
        ("supcon", {"temperature": 0}, "temperature is 0"),
        ("global_threshold", {"temperature": -1}, "temperature is -1"),
        ("global_threshold", {"fmr": 1}, "fmr is 1"),
        ("supcon", {"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_unknown_names_and_values_are_refused(name, options, named):
    with pytest.raises(SettingsError, match=named):
        make_loss(name, **options)


@pytest.mark.parametrize("name", ["supcon", "triplet"])
def test_without_the_extra_the_error_names_it_and_the_default_loss_works(monkeypatch, name):
    for module in ("distances", "losses", "miners"):
        monkeypatch.setitem(sys.modules, f"pytorch_metric_learning.{module}", None)
    with pytest.raises(SettingsError, match="install the extra 'losses'"):
        make_loss(name)
    assert make_loss("global_threshold") is not None
