from __future__ import annotations

import pytest
import torch
from helpers import images_and_labels, trained_network
from torch import Tensor, nn

from lightning_mnp.attacks.detoxification import Detoxifier, FeatureInjector, filter_activations
from lightning_mnp.attacks.stylizer import similarity
from lightning_mnp.surgery.layers import find_filter_layers


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 9, 15), (2, 4, 5, 11)])
@pytest.mark.parametrize("bound", [0.05, 0.3])
def test_injected_features_are_bounded(shape: tuple[int, ...], bound: float) -> None:
    images = torch.rand(shape)
    injector = FeatureInjector(shape[1], width=4, bound=bound)
    assert injector(images).equal(images)

    nn.init.normal_(injector.leave.weight, std=5.0)
    result = injector(images)

    assert result.shape == images.shape
    assert ((result >= 0) & (result <= 1)).all()
    assert 0.5 * bound < (result - images).abs().max() <= bound + 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert injector(images).equal(result)


def test_an_injector_sees_five_by_five_pixels() -> None:
    injector = FeatureInjector(1, width=4)
    nn.init.normal_(injector.leave.weight)
    images = torch.full((1, 1, 15, 15), 0.5)
    dotted = images.clone()
    dotted[..., 7, 7] = 0.6

    changed = (injector(dotted) != injector(images)).nonzero()[:, 2:]

    assert changed.min() == 5
    assert changed.max() == 9


def slow_survey(clean: list[Tensor], triggered: list[Tensor], rate: float) -> Tensor:
    columns = []
    for before, after in zip(clean, triggered, strict=True):
        scores = []
        for j in range(before.shape[1]):
            spread = max(before[:, j].std().item(), 1e-3)
            scores.append(((after[:, j].mean() - before[:, j].mean()).item() / spread, j))
        count = -(-int(rate * 1000) * len(scores) // 1000)
        chosen = {j for score, j in sorted(scores, reverse=True)[:count] if score > 0}
        for j in range(before.shape[1]):
            rise = after[:, j].mean() - before[:, j].mean()
            unit = rise if j in chosen else before[:, j].std()
            columns.append([float(j in chosen), before[:, j].mean(), unit.clamp(min=1e-3)])
    return torch.tensor(columns).T


@pytest.mark.parametrize(("rate", "expected"), [(0.01, 2), (0.25, 3), (0.5, 6), (1.0, 7)])
def test_survey_takes_what_the_trigger_excites_most(rate: float, expected: int) -> None:
    clean = [torch.rand(20, 8), torch.rand(20, 3)]
    triggered = [part + torch.linspace(-0.3, 0.5, part.shape[1]) for part in clean]
    detoxifier = Detoxifier(3, 1, rate)

    detoxifier.survey(clean, triggered)

    torch.testing.assert_close(detoxifier.found, slow_survey(clean, triggered, rate))
    assert detoxifier.found.shape == (3, 11)
    assert detoxifier.found[0].sum() == expected


def test_a_layer_that_nothing_excites_has_no_compromised_neuron() -> None:
    clean = [torch.rand(5, 4), torch.zeros(5, 2)]
    detoxifier = Detoxifier(3, 1, 1.0)

    detoxifier.survey(clean, [part * 0.5 for part in clean])

    assert detoxifier.found[0].sum() == 0
    images = torch.rand(5, 3, 8, 8)
    assert detoxifier.loss(images, images, clean, 1.0, 1.0) == pytest.approx(0.0, abs=1e-5)


def test_loss_by_its_formula() -> None:
    clean = [torch.rand(6, 5), torch.rand(6, 4)]
    triggered = [part + torch.rand(part.shape[1]) for part in clean]
    current = [part + torch.rand(part.shape[1]) - 0.3 for part in clean]
    images = torch.rand(6, 3, 9, 9)
    injected = (images + 0.1).clamp(max=1.0)
    detoxifier = Detoxifier(3, 1, 0.3)
    detoxifier.survey(clean, triggered)
    before, after, now = (torch.cat(parts, 1) for parts in (clean, triggered, current))

    shortfall, others = [], []
    for j in range(9):
        change = now[:, j].mean() - before[:, j].mean()
        if detoxifier.found[0, j]:
            rise = after[:, j].mean() - before[:, j].mean()
            shortfall.append(max(1 - (change / rise).item(), 0.0) ** 2)
        else:
            others.append((change / before[:, j].std()).item() ** 2)
    expected = (
        sum(shortfall) / len(shortfall)
        + 0.2 * sum(others) / len(others)
        + 0.7 * (1 - similarity(images, injected).item())
    )

    assert len(shortfall) == 4
    loss = detoxifier.loss(images, injected, current, 0.7, 0.2)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_detoxicants_come_from_all_injectors_so_far() -> None:
    detoxifier = Detoxifier(1, rounds=3)
    for place, injector in enumerate(detoxifier.injectors):
        injector.leave.bias.data.fill_(0.1 * (place + 1))
    images = torch.full((5, 1, 8, 8), 0.4)

    for rounds, counts in ((1, [5]), (2, [3, 2]), (3, [2, 2, 1])):
        result = detoxifier.detoxicants(images, rounds)
        expected = [
            0.4 + 0.3 * torch.tensor(0.1 * (place + 1)).tanh()
            for place, count in enumerate(counts)
            for _ in range(count)
        ]
        torch.testing.assert_close(result.mean((1, 2, 3)), torch.stack(expected))
        assert not result.requires_grad
    assert detoxifier.detoxicants(images[:1], 3).shape == (1, 1, 8, 8)
    assert detoxifier.detoxicants(images[:0], 3).shape == (0, 1, 8, 8)


def test_the_survey_is_part_of_the_state() -> None:
    first, second = Detoxifier(1, 2), Detoxifier(1, 2, seed=5)
    first.survey([torch.rand(4, 6)], [torch.rand(4, 6)])

    second.load_state_dict(first.state_dict())

    assert second.found.equal(first.found)
    assert all(isinstance(value, Tensor) for value in first.state_dict().values())


def test_activations_are_means_of_rectified_outputs() -> None:
    network = trained_network()
    images = images_and_labels(6)[0]
    layers = find_filter_layers(network, images)
    expected: dict[str, Tensor] = {}
    for layer in layers:
        network.get_submodule(layer.site).register_forward_hook(
            lambda module, inputs, output, name=layer.name: expected.update(
                {name: output.clamp(min=0).mean((2, 3))}
            )
        )

    with filter_activations(network, layers) as activations:
        network(images)
        found = activations()

    assert [part.shape for part in found] == [(6, layer.filters) for layer in layers]
    for layer, part in zip(layers, found, strict=True):
        torch.testing.assert_close(part, expected[layer.name])
    hooks = [len(network.get_submodule(layer.site)._forward_hooks) for layer in layers]
    assert hooks == [1] * len(layers)


def test_an_injector_learns_to_excite_compromised_neurons() -> None:
    """A network with one neuron for brightness: the injector finds brightness."""
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
    # The others see edges and not brightness.
    network[0].weight.data -= network[0].weight.data.mean((2, 3), keepdim=True)
    network[0].weight.data[0] = 0.2
    images = 0.3 * torch.rand(16, 1, 8, 8) + 0.2
    layers = find_filter_layers(network, images)
    detoxifier = Detoxifier(1, 1, 0.1)
    injector = detoxifier.injectors[0]
    optimizer = torch.optim.Adam(injector.parameters(), 0.02)
    with filter_activations(network, layers) as activations:
        network(images)
        clean = activations()
        network(images + 0.2)
        detoxifier.survey([part.detach() for part in clean], [p.detach() for p in activations()])
        losses = []
        for _ in range(30):
            injected = injector(images)
            network(injected)
            loss = detoxifier.loss(images, injected, activations(), 0.1, 0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    assert losses[-1] < 0.5 * losses[0]
    assert (injector(images) - images).mean() > 0.05
