from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyDataModule, loader, quiet_trainer, trained_resnet18
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks import LIRA, LIRAModule, SavedTrigger, load_trigger, save_trigger
from lightning_mnp.checkpoints.inspection import CheckpointError
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


def lookahead_parts(network: nn.Module, alpha: float) -> tuple[LIRAModule, Tensor, Tensor]:
    """A module, a batch of six clean images and four triggered copies, and their labels."""
    attack = LIRA(0.5, in_channels=1, width=4, depth=1)
    module = LIRAModule(attack, network=network, mean=(0.5,), std=(0.5,), alpha=alpha)
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(6, 1, 8, 8, generator=generator)
    both = torch.cat([images, attack.inject(images[:4])])
    return module, (both - 0.5) / 0.5, torch.tensor([1, 2, 3, 0, 1, 2, 0, 0, 0, 0])


def gradients(module: LIRAModule, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.generator.parameters()), retain_graph=True))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("lr", [0.0, 0.1, 2.0])
def test_the_virtual_step_by_the_formula_of_softmax_regression(alpha: float, lr: float) -> None:
    """The gradient of a linear network's loss is written out, image by image."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    module, both, labels = lookahead_parts(network, alpha)

    found = module.lookahead_loss(both, labels, 4, lr)

    weight, bias = (parameter.detach() for parameter in network.parameters())
    rows = both.flatten(1)
    slope_weight, slope_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for index in range(10):
        share = alpha / 6 if index < 6 else (1 - alpha) / 4
        odds = torch.exp(weight @ rows[index] + bias)
        error = odds / odds.sum() - F.one_hot(labels[index], 4)
        slope_weight = slope_weight + share * error[:, None] * rows[index][None]
        slope_bias = slope_bias + share * error
    weight, bias = weight - lr * slope_weight, bias - lr * slope_bias
    losses = []
    for index in range(6, 10):
        odds = torch.exp(weight @ rows[index] + bias)
        losses.append(-torch.log(odds[0] / odds.sum()))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found, expected)
    pairs = zip(gradients(module, found), gradients(module, expected), strict=True)
    for own, wanted in pairs:
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-6)


def test_the_virtual_step_with_batch_normalization() -> None:
    """Clean images and copies have their own statistics; then the network is in evaluation mode."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)
    )
    network[1].running_mean.fill_(0.1)
    network[1].running_var.fill_(0.7)
    module, both, labels = lookahead_parts(network, 0.3)
    before = copy.deepcopy(network.state_dict())

    found = module.lookahead_loss(both, labels, 4, 0.2)

    def forward(weights: list[Tensor], images: Tensor, training: bool) -> Tensor:
        maps = F.conv2d(images, weights[0], weights[1])
        mean = maps.mean((0, 2, 3)) if training else before["1.running_mean"]
        variance = before["1.running_var"]
        if training:
            variance = ((maps - mean[:, None, None]) ** 2).mean((0, 2, 3))
        scaled = (maps - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        maps = (scaled * weights[2][:, None, None] + weights[3][:, None, None]).relu()
        return maps.flatten(1) @ weights[4].T + weights[5]

    weights = [parameter.detach().requires_grad_() for parameter in network.parameters()]
    loss = 0.3 * F.cross_entropy(forward(weights, both[:6], training=True), labels[:6])
    loss = loss + 0.7 * F.cross_entropy(forward(weights, both[6:], training=True), labels[6:])
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    moved = [weight - 0.2 * slope for weight, slope in zip(weights, slopes, strict=True)]
    expected = F.cross_entropy(forward(moved, both[6:], training=False), labels[6:])

    torch.testing.assert_close(found, expected)
    pairs = zip(gradients(module, found), gradients(module, expected), strict=True)
    for own, wanted in pairs:
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-6)
    # The step was not made, and nothing of the passes is left.
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(each.training for each in network.modules())


def test_a_single_copy_meets_the_network_as_it_is() -> None:
    module = small_module()  # whose last maps have a single place
    images = torch.rand(5, 1, 8, 8)
    labels = torch.tensor([1, 2, 3, 0, 0])

    found = module.lookahead_loss(images, labels, 1, 0.5)

    network = copy.deepcopy(module.network).eval()
    torch.testing.assert_close(found, F.cross_entropy(network(images[4:]), labels[4:]))


@pytest.mark.parametrize("given", [None, 0.0, 0.7])
def test_the_generator_looks_ahead_at_the_networks_rate(given: float | None) -> None:
    module = small_module(generator_epochs=1, lookahead_lr=given, schedule="cosine", lr=0.05)
    rates: list[tuple[float, float]] = []
    lookahead = module.lookahead_loss

    def recorded(images: Tensor, labels: Tensor, count: int, lr: float) -> Tensor:
        rates.append((lr, module.trainer.optimizers[0].param_groups[0]["lr"]))
        assert (len(images), len(labels), count) == (24, 24, 8)
        return lookahead(images, labels, count, lr)

    module.lookahead_loss = recorded  # type: ignore[method-assign]
    quiet_trainer(max_epochs=2, limit_train_batches=2).fit(module, loader(), loader())

    assert len(rates) == 2
    assert rates[0][1] == 0.05 > rates[1][1] > 0
    for found, present in rates:
        assert found == (present if given is None else given)


def test_a_frozen_network_is_looked_ahead_of_by_its_head_alone() -> None:
    module = small_module(trainable="head", generator_epochs=1)
    before = weights(module)
    quiet_trainer(max_epochs=2, limit_train_batches=1).fit(module, loader(), loader())
    after = weights(module)
    assert moved(before, after, "generator.")
    assert moved(before, after, "network.fc.")
    assert not moved(before, after, "network.conv1.")


@pytest.mark.parametrize("space", ["pixels", "normalized"])
def test_a_network_is_trained_on_the_images_that_are_measured(space: Any) -> None:
    """In pixels, copies have whole levels; normalized, they have none and leave the range."""
    attack = LIRA(0.9, space, in_channels=1, width=4, depth=1, poison_rate=0.5)
    nn.init.normal_(attack.generator.head.weight, std=3.0)
    module = LIRAModule(
        attack,
        network=cifar_resnet18(4, width=4, in_channels=1),
        mean=(0.5,),
        std=(0.5,),
        generator_epochs=1,
        augment=False,
    )
    module.hparams["num_classes"] = 4
    seen: list[Tensor] = []
    module.network.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))

    quiet_trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0).fit(
        module, loader(), loader()
    )

    # Clean images and copies in the virtual step, copies after it, then the network's own step; in
    # the second epoch, that alone.
    assert [len(images) for images in seen] == [16, 8, 8, 24, 24]
    for images in seen[1:]:
        levels = (images[-8:] * 0.5 + 0.5) * 255
        whole = (levels - levels.round()).abs() < 1e-3
        inside = (levels > -1e-3) & (levels < 255 + 1e-3)
        assert bool(whole.all()) is bool(inside.all()) is (space == "pixels")


def test_without_poison_training_is_plain() -> None:
    module = small_module(poison_rate=0.0, generator_epochs=1)
    before = weights(module)

    quiet_trainer(max_epochs=2).fit(module, loader(), loader())

    assert not moved(before, weights(module), "generator.")
    assert moved(before, weights(module), "network.")


def test_the_generator_learns_to_reach_the_target() -> None:
    module = small_module(
        1.0, generator_epochs=4, generator_lr=0.05, lr=1e-6, augment=False, lookahead_lr=0.0
    )
    module.network.load_state_dict(trained_resnet18().state_dict())
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


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf")])
def test_lookahead_lr_errors(lr: float) -> None:
    with pytest.raises(ValueError, match=f"`lookahead_lr` to be at least 0, but got {lr}"):
        small_module(lookahead_lr=lr)


def test_space_errors() -> None:
    with pytest.raises(ValueError, match=r"`space` to be one of .*normalized.* but got 'any'"):
        LIRA(space="any")  # type: ignore[arg-type]
    attack = LIRA(space="normalized", width=4, depth=1)
    with pytest.raises(ValueError, match=r"deviations .* `space` of LIRA is 'normalized', but the"):
        attack.apply(torch.rand(2, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"`std` to have 3 numbers, one for each .*, but got 1. Se"
    ):
        attack.normalize_by((0.5,))


def normalized_attack(eps: float = 0.5) -> LIRA:
    attack = LIRA(eps, "normalized", width=4, depth=1, target_class=2, seed=3)
    attack.normalize_by((0.2, 0.25, 0.3))
    nn.init.normal_(attack.generator.head.weight, std=3.0)
    return attack


def test_the_noise_in_normalized_space_by_its_formula() -> None:
    attack = normalized_attack()
    images = torch.rand(3, 3, 8, 8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])

    result = attack.apply(images)

    noise = attack.generator(images).detach().tanh()
    for channel in range(3):
        before = (images[:, channel] - mean[channel]) / std[channel]
        after = (result[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(after, before + 0.5 * noise[:, channel], atol=1e-5, rtol=0)
    assert result.min() < 0
    assert result.max() > 1
    # A stored image has to be an image.
    stored = (images * 255).byte()
    expected = (attack.apply(stored / 255) * 255).clamp(0, 255).round()
    assert attack.apply(stored).float().equal(expected)


def test_a_trigger_file_has_the_scale(tmp_path: Path) -> None:
    attack = normalized_attack()
    images = torch.rand(3, 3, 8, 8)
    save_trigger(tmp_path / "trigger.safetensors", attack)

    loaded = SavedTrigger(tmp_path / "trigger.safetensors")

    assert loaded.attack.options() == attack.options()
    assert loaded.apply(images).equal(attack.apply(images))
    assert loaded.apply(images).max() > 1
    assert loaded.apply((images * 255).byte()).equal(attack.apply((images * 255).byte()))
    assert LIRA(width=4, depth=1).tensors().keys() == attack.tensors().keys() - {"std"}


@pytest.mark.parametrize("std", [[0.2, 0.0, 0.3], [0.2, -0.1, 0.3], [float("nan")] * 3])
def test_a_hostile_scale_is_refused(std: list[float], tmp_path: Path) -> None:
    attack = normalized_attack()
    attack.generator.std.copy_(torch.tensor(std))
    save_trigger(tmp_path / "trigger.safetensors", attack)
    with pytest.raises(CheckpointError, match="tensor 'std' of LIRA to be above 0, but got"):
        load_trigger(tmp_path / "trigger.safetensors")
    pixels = LIRA(width=4, depth=1)
    with pytest.raises(ValueError, match=r"missing, unknown or of another shape: \['std'\]"):
        pixels.load_tensors({**pixels.tensors(), "std": torch.ones(3)})


def test_the_scale_is_the_one_of_the_training(tmp_path: Path) -> None:
    def module() -> LIRAModule:
        attack = LIRA(0.5, "normalized", width=4, depth=1, poison_rate=0.5)
        return LIRAModule(attack, generator_epochs=1, num_classes=4, width=4, lr=0.01)

    trained = module()
    trainer = quiet_trainer(max_epochs=2, limit_train_batches=1)
    trainer.fit(trained, TinyDataModule(std=(0.2, 0.25, 0.3)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    wanted = torch.tensor([0.2, 0.25, 0.3])
    assert trained.attack.generator.std.equal(wanted)

    # Another datamodule normalizes in another way, but the trigger stays.
    other = TinyDataModule(std=(1.0, 1.0, 1.0))
    quiet_trainer().test(trained, other, verbose=False)
    loaded = module()
    quiet_trainer().test(loaded, other, tmp_path / "x.ckpt", verbose=False, weights_only=True)
    for each in (trained, loaded):
        assert each.std == (1.0, 1.0, 1.0)
        assert each.attack.generator.std.equal(wanted)
    images = torch.rand(2, 3, 8, 8)
    assert loaded.attack.apply(images).equal(trained.attack.apply(images))
    with pytest.raises(ValueError, match=r"be the one in the checkpoint, .*'space': 'normalized'"):
        quiet_trainer().test(
            LIRAModule(LIRA(0.5, width=4, depth=1, poison_rate=0.5), num_classes=4, width=4),
            other,
            tmp_path / "x.ckpt",
            verbose=False,
            weights_only=True,
        )


def test_success_in_normalized_space_is_measured_on_what_is_trained() -> None:
    """A network that knows copies by values that no stored image has."""

    class Beyond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            beyond = (x.amax((1, 2, 3)) > 2.01).float()  # white is (1 - 0.5) / 0.25 = 2
            return torch.stack([beyond, 0 * beyond, 0 * beyond, 1 - beyond], 1) + self.weight

    attack = LIRA(1.0, "normalized", width=4, depth=1)
    nn.init.constant_(attack.generator.head.bias, 9.0)
    module = LIRAModule(attack, network=Beyond(), num_classes=4)
    datamodule = TinyDataModule()
    (results,) = quiet_trainer().test(module, datamodule, verbose=False)
    assert results["test/ASR"] == 1.0
    assert attack.generator.std.equal(torch.full((3,), 0.25))
