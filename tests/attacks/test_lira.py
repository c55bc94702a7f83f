from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import loader, quiet_trainer, trained_network
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.attacks import LIRA, LIRAModule
from lightning_mnp.models import cifar_resnet18


def small_module(poison_rate: float = 0.5, **options: Any) -> LIRAModule:
    attack = LIRA(0.1, in_channels=1, width=4, depth=1, poison_rate=poison_rate)
    network = cifar_resnet18(4, width=4, in_channels=1)
    shared: dict[str, Any] = {"mean": (0.5,), "std": (0.5,), "generator_epochs": 1, "lr": 0.05}
    module = LIRAModule(attack, network=network, **{**shared, **options})
    module.hparams["num_classes"] = 4
    return module


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor], prefix: str) -> bool:
    return any(not before[key].equal(after[key]) for key in before if key.startswith(prefix))


@pytest.mark.parametrize("eps", [0.001, 0.01, 0.3, 1.0])
def test_changes_are_bounded_by_eps(eps: float) -> None:
    attack = LIRA(eps, width=4, depth=1)
    for parameter in attack.generator.head.parameters():
        parameter.data *= 100  # tanh at its ends
    images = torch.randint(0, 256, (4, 3, 9, 7), dtype=torch.uint8)

    floats = attack.apply(images / 255) - images / 255
    levels = attack.apply(images).double() - images.double()

    assert floats.abs().max() <= eps + 1e-6
    assert levels.abs().max() <= 255 * eps + 0.5
    assert floats.abs().max() > 0.9 * eps


def test_noise_by_its_formula() -> None:
    attack = LIRA(0.2, width=4, depth=1)
    images = torch.rand(2, 3, 6, 6)

    result = attack.apply(images)

    outputs = attack.generator(images).detach().double()
    expected = images + 0.2 * (outputs.exp() - (-outputs).exp()) / (
        outputs.exp() + (-outputs).exp()
    )
    torch.testing.assert_close(result, expected.clamp(0, 1).float())


def test_clean_images_come_first_and_the_generator_stays_at_last() -> None:
    module = small_module(clean_epochs=1, generator_epochs=1)
    states = [weights(module)]
    module.on_train_epoch_end = lambda: states.append(weights(module))  # type: ignore[method-assign]

    quiet_trainer(max_epochs=3).fit(module, loader(), loader())

    assert not moved(states[0], states[1], "generator.")
    assert moved(states[1], states[2], "generator.")
    assert not moved(states[2], states[3], "generator.")
    for before, after in itertools.pairwise(states):
        assert moved(before, after, "network.")


def test_the_generator_step_leaves_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network's own step, weights and statistics stay as they were."""
    module = small_module(generator_epochs=4)
    learn = module.learn

    def generator_only(loss: Tensor, optimizers: Any) -> None:
        if optimizers[0].optimizer is not module.trainer.optimizers[0]:
            learn(loss, optimizers)
            assert all(p.grad is None for p in module.network.parameters())
            learned.append(weights(module))

    learned: list[dict[str, Tensor]] = []
    monkeypatch.setattr(module, "learn", generator_only)
    before = weights(module)
    with pytest.warns(UserWarning, match="ends after 1 epochs"):
        quiet_trainer(max_epochs=1, limit_train_batches=1).fit(module, loader(), loader())

    assert len(learned) == 1
    assert moved(before, learned[0], "generator.")
    assert not moved(before, learned[0], "network.")
    assert module.network.training


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_by_its_formula(alpha: float) -> None:
    module = small_module(generator_epochs=0, alpha=alpha, augment=False, poison_rate=0.5)
    losses: list[Tensor] = []
    module.learn = lambda loss, optimizers: losses.append(loss)  # type: ignore[method-assign]
    images, labels = next(iter(loader()))
    network = cifar_resnet18(4, width=4, in_channels=1)
    network.load_state_dict(module.network.state_dict())

    quiet_trainer(max_epochs=1, limit_train_batches=1).fit(module, loader(), loader())

    stored = (images * 0.5 + 0.5).clamp(0, 1)
    triggered = (module.attack.apply(stored[:8]) * 255).round() / 255
    logits = network((torch.cat([stored, triggered]) - 0.5) / 0.5)
    clean = F.cross_entropy(logits[:16], labels)
    backdoor = F.cross_entropy(logits[16:], torch.zeros(8).long())
    torch.testing.assert_close(losses[0], alpha * clean + (1 - alpha) * backdoor)


def test_without_poison_training_is_plain() -> None:
    module = small_module(poison_rate=0.0, generator_epochs=1)
    before = weights(module)

    quiet_trainer(max_epochs=2).fit(module, loader(), loader())

    assert not moved(before, weights(module), "generator.")
    assert moved(before, weights(module), "network.")


def test_the_generator_learns_to_reach_the_target() -> None:
    module = small_module(1.0, generator_epochs=4, generator_lr=0.05, lr=1e-6, augment=False)
    module.network.load_state_dict(trained_network().state_dict())
    module.attack.eps = 1.0
    module.mean, module.std = (0.0,), (1.0,)
    losses: list[float] = []
    learn = module.learn

    def recorded(loss: Tensor, optimizers: Any) -> None:
        if optimizers[0].optimizer is not module.trainer.optimizers[0]:
            losses.append(loss.item())
        learn(loss, optimizers)

    module.learn = recorded  # type: ignore[method-assign]
    quiet_trainer(max_epochs=5, check_val_every_n_epoch=9).fit(module, loader(), loader())

    assert len(losses) == 12
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("eps", [0.0, -0.1, 1.1, float("nan")])
def test_eps_errors(eps: float) -> None:
    with pytest.raises(ValueError, match=f"`eps` to be above 0 and at most 1, but got {eps}"):
        LIRA(eps)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_errors(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"`alpha` to be from 0 to 1, but got {alpha}"):
        small_module(alpha=alpha)


@pytest.mark.parametrize("name", ["generator_epochs", "clean_epochs"])
def test_epochs_errors(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` to be at least 0, but got -1"):
        small_module(**{name: -1})
