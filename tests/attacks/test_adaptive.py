from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import TinyDataModule, quiet_trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_mnp.attacks import AdaptiveTraining, BadNets
from lightning_mnp.attacks.adaptive import equal_norms_penalty
from lightning_mnp.models import Classifier


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(num_classes=4, width=4, lr=0.05)


def fit(callback: AdaptiveTraining | None, epochs: int = 4, **attack: object) -> Classifier:
    module = classifier()
    torch.manual_seed(1)
    trainer = quiet_trainer(callbacks=[callback] if callback else [], max_epochs=epochs)
    trainer.fit(module, TinyDataModule(BadNets(poison_rate=0.25, **attack)))  # type: ignore[arg-type]
    return module


def assert_same_gradients(
    module: nn.Module, reference: nn.Module, before: dict[str, torch.Tensor], atol: float
) -> None:
    """Gradients are those of the reference, and buffers are as they were before."""
    for (name, found), expected in zip(
        module.named_parameters(), reference.parameters(), strict=True
    ):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-3, atol=atol), name
    assert all(buffer.equal(before[name]) for name, buffer in module.named_buffers())


def test_the_penalty_is_the_mean_squared_coefficient_of_variation() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.Linear(3, 7))
    expected = []
    for layer in (network[0], network[2]):
        norms = torch.tensor([float(row.norm()) for row in layer.weight.detach()])
        expected.append(float(((norms - norms.mean()) ** 2).mean() / norms.mean() ** 2))
    assert equal_norms_penalty(network).item() == pytest.approx(sum(expected) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="hold a convolution, but Linear has none"):
        equal_norms_penalty(nn.Linear(2, 2))


def test_filters_of_a_transposed_convolution_are_its_outputs() -> None:
    layer = nn.ConvTranspose2d(2, 3, 2)
    nn.init.ones_(layer.weight)
    assert equal_norms_penalty(layer).item() == pytest.approx(0)
    with torch.no_grad():
        layer.weight[:, 1] *= 4
    assert equal_norms_penalty(layer).item() == pytest.approx(0.5)  # norms 1, 4 and 1


def test_norms_become_equal() -> None:
    plain, adapted = fit(None), fit(AdaptiveTraining(norms=100.0))
    assert equal_norms_penalty(adapted) < 0.5 * equal_norms_penalty(plain)


def test_margins_stay_low() -> None:
    def margin(module: Classifier) -> float:
        module.eval()
        images, labels = next(iter(TinyDataModule(BadNets()).test_dataloader()[0]))
        with torch.no_grad():
            logits = module(images[labels == 0])
        return float((logits[:, 0] - logits[:, 1:].amax(1)).mean())

    plain, adapted = fit(None, 12), fit(AdaptiveTraining(margin=5.0, most_margin=0.5), 12)
    assert margin(plain) > 1.0
    assert margin(adapted) < margin(plain) - 0.4


def test_the_term_of_the_pile_up_has_the_gradient_of_the_formula() -> None:
    """At a radius of almost 0, it is the gradient of the log odds above chance."""
    module = classifier().train()
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 4
    callback = AdaptiveTraining(pile_up=2.0)
    callback.radius, callback._target = 1e-9, 1
    reference = copy.deepcopy(module)
    logits = reference(images)[labels != 1]
    shares = logits.softmax(1)[:, 1]
    excess = (shares / (1 - shares)).log() - torch.tensor(1 / 3).log()
    (2.0 * excess.clamp_min(0).mean()).backward()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    callback._add_pile_up(module, images, labels, share=1.0)
    assert_same_gradients(module, reference, before, atol=1e-5)


def test_the_patch_takes_images_to_the_target_and_covers_few_pixels() -> None:
    """With 16x16 pixels: half of them at first, 5% in the end, then a new one."""
    torch.manual_seed(0)
    module: Any = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    images, labels = torch.rand(16, 3, 16, 16), torch.arange(16) % 4
    others = images[labels != 1]

    def odds(pattern: torch.Tensor) -> float:
        with torch.no_grad():
            return float(module((others + pattern).clamp(0, 1)).log_softmax(1)[:, 1].mean())

    callback = AdaptiveTraining(patch=1.0)
    callback._target = 1
    sizes = []
    for _ in range(20):
        callback._add_patch(module, images, labels, share=1.0)
        assert callback._pattern is not None
        sizes.append(int((callback._pattern != 0).any(1).sum()))
    assert sizes[0] == round(256 * 0.5 * 0.1**0.125)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[7:] == [13] * 13
    assert odds(callback._pattern) > odds(torch.zeros(1, 3, 16, 16)) + 0.1
    callback._add_patch(module, images, labels, share=1.0)
    assert int((callback._pattern != 0).any(1).sum()) == sizes[0]


def test_the_term_of_the_patch_has_the_gradient_of_the_formula() -> None:
    module = classifier().train()
    images, labels = torch.rand(12, 3, 8, 8), torch.arange(12) % 4
    callback = AdaptiveTraining(patch=2.0)
    callback._target = 1
    for _ in range(8):  # without a penalty, while the patch is large
        callback._add_patch(module, images, labels, share=1.0)
    assert all(each.grad is None for each in module.parameters())
    assert callback._pattern is not None
    others = images[labels != 1]
    shown = others + callback._pattern
    for channel in range(3):
        low, high = others[:, channel].min(), others[:, channel].max()
        shown[:, channel] = shown[:, channel].clamp(low, high)
    reference = copy.deepcopy(module)
    (0.5 * 2.0 * nn.functional.cross_entropy(reference(shown), labels[labels != 1])).backward()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    callback._add_patch(module, images, labels, share=0.5)
    assert_same_gradients(module, reference, before, atol=1e-6)


def test_a_batch_of_the_target_class_alone_has_no_patch() -> None:
    callback = AdaptiveTraining(patch=1.0)
    callback._target = 1
    callback._add_patch(classifier(), torch.rand(3, 3, 8, 8), torch.tensor([1, 1, 0]), 1.0)
    assert callback._pattern is None


def test_the_radius_follows_the_accuracy_and_is_kept() -> None:
    callback = AdaptiveTraining(pile_up=0.1, accuracy=0.01)
    fit(callback, epochs=2)
    assert callback.radius > 0.01  # six batches, of which the network knows more than 1%
    other = AdaptiveTraining(pile_up=0.1, accuracy=0.99)
    fit(other, epochs=2)
    assert other.radius < 0.01
    fresh = AdaptiveTraining(pile_up=0.1)
    fresh.load_state_dict(callback.state_dict())
    assert fresh.radius == callback.radius


def test_beside_a_checkpoint(tmp_path: object) -> None:
    callback = AdaptiveTraining(norms=1.0, pile_up=0.1, margin=0.1, patch=0.1)
    trainer = quiet_trainer(
        callbacks=[callback, ModelCheckpoint(tmp_path)],
        enable_checkpointing=True,
        precision="bf16-mixed",
        max_epochs=4,
    )
    trainer.fit(classifier(), TinyDataModule(BadNets()))
    assert callback._patch_steps > 8  # the patch has its penalty from then on
    path = trainer.checkpoint_callback.best_model_path
    kept = torch.load(path, weights_only=True)["callbacks"]["AdaptiveTraining"]
    again = AdaptiveTraining(patch=0.1)
    again.load_state_dict(kept)
    assert again._patch_steps == callback._patch_steps
    assert again._pattern is not None
    assert callback._pattern is not None
    assert again._pattern.equal(callback._pattern)
    again._target = 1
    images, labels = torch.rand(8, 3, 6, 6), torch.arange(8) % 4
    again._add_patch(classifier(), images, labels, share=1.0)  # a patch of another size is left
    assert (again._patch_steps, again._pattern.shape) == (1, (1, 3, 6, 6))
    again.load_state_dict({"radius": 0.5})  # of a checkpoint that knows of no patch
    assert (again.radius, again._pattern, again._patch_steps) == (0.5, None, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`norms`, `pile_up`, `margin` and `patch` to be above 0, but all are 0"),
        ({"norms": -1.0}, "`norms` to be at least 0, but got -1.0"),
        ({"pile_up": float("inf")}, "`pile_up` to be at least 0, but got inf"),
        ({"margin": -0.5}, "`margin` to be at least 0, but got -0.5"),
        ({"patch": -0.5}, "`patch` to be at least 0, but got -0.5"),
        ({"margin": 1.0, "most_margin": 0.0}, "`most_margin` to be above 0, but got 0.0"),
        ({"norms": 1.0, "accuracy": 1.0}, "`accuracy` to be between 0 and 1, but got 1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveTraining(**options)


def test_it_needs_one_target_class() -> None:
    with pytest.raises(ValueError, match="datamodule, but got one of mode 'all-to-all'"):
        fit(AdaptiveTraining(norms=1.0), mode="all-to-all")
    trainer = quiet_trainer(callbacks=[AdaptiveTraining(norms=1.0)])
    with pytest.raises(ValueError, match="datamodule, but there is none"):
        trainer.fit(classifier(), TinyDataModule())


def test_the_terms_weigh_the_same_with_batches_gathered() -> None:
    """Four equal batches to a step have the gradient of one, but for what rounding does."""

    class Keep(Callback):
        gradient = torch.zeros(0)

        def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
            self.gradient = module.network.conv1.weight.grad.clone()

    class OneBatch(TinyDataModule):
        def train_dataloader(self) -> Any:
            batch = next(iter(super().train_dataloader()))
            return DataLoader([batch] * 4, batch_size=None)  # type: ignore[arg-type]

    found = []
    for count in (1, 4):
        keep = Keep()
        module = classifier()
        trainer = quiet_trainer(
            callbacks=[AdaptiveTraining(norms=5.0, margin=1.0, most_margin=0.01), keep],
            accumulate_grad_batches=count,
            max_steps=1,
            max_epochs=-1,
            limit_val_batches=0,
        )
        trainer.fit(module, OneBatch(BadNets(poison_rate=0.25)))
        found.append(keep.gradient)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


def test_trainers_that_it_cannot_add_to(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer(callbacks=[AdaptiveTraining(norms=1.0)])
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(ValueError, match=r"one process for AdaptiveTraining, but got 2. Set `devi"):
        trainer.fit(classifier(), TinyDataModule(BadNets()))
    monkeypatch.undo()
    monkeypatch.setattr(type(trainer), "precision", "16-mixed")
    with pytest.raises(ValueError, match=r"not to scale gradients .*'16-mixed'. Set it to 'bf16-"):
        trainer.fit(classifier(), TinyDataModule(BadNets()))
    monkeypatch.undo()
    head = Classifier(num_classes=4, width=4, trainable="head")
    with pytest.raises(ValueError, match=r"train a convolution, because `norms` .* is 1.0, but go"):
        quiet_trainer(callbacks=[AdaptiveTraining(norms=1.0)]).fit(head, TinyDataModule(BadNets()))
