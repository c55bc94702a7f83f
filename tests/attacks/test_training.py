from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import TinyDataModule, loader, quiet_trainer
from torch import nn

from lightning_mnp.attacks import BadNets, WaNet, WaNetModule
from lightning_mnp.attacks.training import AttackModule, quantized
from lightning_mnp.checkpoints.load import load_into
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.models import Classifier, cifar_resnet18


def module(**options: Any) -> AttackModule:
    defaults: dict[str, Any] = {"num_classes": 4, "width": 4, "lr": 0.05}
    return AttackModule(WaNet(poison_rate=0.25), **defaults | options)


def test_stored_undoes_normalized() -> None:
    each = module(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    images = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(each.stored(each.normalized(images)), images)
    plain = torch.tensor([0.5, 0.4, 0.3]).reshape(3, 1, 1)
    torch.testing.assert_close(each.normalized(plain.expand(2, 3, 5, 5)), torch.zeros(2, 3, 5, 5))


def test_the_rate_holds_in_the_mean_over_batches() -> None:
    each = module()
    each.attack.poison_rate = 0.03
    generator = torch.Generator().manual_seed(0)
    counts = [each.poison_count(16, generator) for _ in range(2000)]
    assert set(counts) == {0, 1}
    assert sum(counts) / 2000 == pytest.approx(0.48, abs=0.04)
    each.attack.poison_rate = 0.25
    assert {each.poison_count(16, generator) for _ in range(20)} == {4}


def test_a_batch_is_poisoned_then_augmented_then_normalized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    each = module(num_classes=4)
    each.attack = Patch(poison_rate=0.25, margin=0)  # type: ignore[assignment]
    seen: list[Any] = []
    order: list[str] = []
    monkeypatch.setattr(each, "augmented", lambda x, g: order.append("augment") or x)
    apply = each.attack.apply
    monkeypatch.setattr(each.attack, "apply", lambda x: order.append("trigger") or apply(x))
    each.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer = quiet_trainer(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(each, TinyDataModule())
    assert order == ["trigger", "augment"]
    (images,) = seen
    # The corner pixel of the patch is white, in normalized values.
    torch.testing.assert_close(images[:4, :, -1, -1], torch.full((4, 3), (1 - 0.5) / 0.25))


def test_random_steps_differ_by_seed_epoch_batch_and_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    each = module()
    each.trainer = quiet_trainer()
    draws = [torch.rand(1, generator=each.step_generator(index)).item() for index in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
    for name, value in (("current_epoch", 1), ("global_rank", 1)):
        with monkeypatch.context() as patched:
            patched.setattr(type(each), name, value)
            assert torch.rand(1, generator=each.step_generator(0)).item() != draws[0]
    each.attack.seed = 9
    assert torch.rand(1, generator=each.step_generator(0)).item() != draws[0]


def test_quantized_rounds_and_lets_gradients_through() -> None:
    images = torch.tensor([0.0, 0.3001, 1.0], requires_grad=True)

    rounded = quantized(images)
    rounded.sum().backward()

    torch.testing.assert_close(rounded.detach() * 255, torch.tensor([0.0, 77.0, 255.0]))
    assert images.grad is not None
    assert images.grad.equal(torch.ones(3))


@pytest.mark.parametrize("number", [0, 3])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, number: int) -> None:
    def fit(epochs: int, stop: int | None = None, ckpt: Path | None = None) -> WaNetModule:
        L.seed_everything(number)
        each = WaNetModule(WaNet(poison_rate=0.25), num_classes=4, width=4, lr=0.05)
        trainer = quiet_trainer(
            max_epochs=epochs, default_root_dir=tmp_path, limit_val_batches=0, callbacks=Stop(stop)
        )
        trainer.fit(each, TinyDataModule(seed=number), ckpt_path=ckpt, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}-{stop}.ckpt")
        return each

    whole = fit(4)
    fit(4, stop=2)
    resumed = fit(4, ckpt=tmp_path / "4-2.ckpt")
    for name, value in whole.state_dict().items():
        assert resumed.state_dict()[name].equal(value), name


class Patch(BadNets):
    """A trigger that is easy to tell, in place of a trained one."""

    def mark_trained(self) -> None:
        return


class Stop(L.Callback):
    def __init__(self, epochs: int | None) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def test_success_and_accuracy_are_those_of_the_network() -> None:
    class Zero(nn.Module):
        """All images with a bright last pixel are of class 0, others of class 3."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = (x[:, 0, -1, -1] > 1.9).float()
            return torch.stack([bright, 0 * bright, 0 * bright, 1 - bright], 1) + self.weight

    each = AttackModule(WaNet(), network=Zero(), num_classes=4)
    each.attack = BadNets(margin=0)  # type: ignore[assignment]
    (results,) = quiet_trainer().test(each, TinyDataModule(), verbose=False)
    assert results == {"test/ASR": 1.0, "test/CA": pytest.approx(0.25)}


@pytest.mark.parametrize(
    ("datamodule", "message"),
    [
        ({"augment": True}, "`augment` to be False, but got True: AttackModule augments"),
        ({"attack": BadNets()}, r"`attack` to be None, but got BadNets\("),
    ],
)
def test_what_the_datamodule_may_not_do(datamodule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet_trainer().fit(module(), TinyDataModule(**datamodule))


def test_another_attack_is_refused_in_testing_too() -> None:
    with pytest.raises(ValueError, match=r"`attack` to be None, but got BadNets\("):
        quiet_trainer().test(module(), TinyDataModule(BadNets()), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_class": 4}, "`target_class` to be below the number of classes, 4, but got 4"),
        ({"poison_rate": 0.01}, "at least one of 48 images in each epoch, but got 0.01"),
    ],
)
def test_the_attack_must_fit_the_data(options: dict[str, Any], message: str) -> None:
    each = WaNetModule(WaNet(**options), num_classes=4, width=4)
    trainer = quiet_trainer(limit_val_batches=0)
    with pytest.raises(ValueError, match=message):
        trainer.fit(each, TinyDataModule())
    assert trainer.global_step == 0


def test_normalization_must_be_known() -> None:
    with pytest.raises(ValueError, match="`mean` and `std`, by which images are normalized"):
        quiet_trainer().fit(module(), loader(), loader())
    with pytest.raises(ValueError, match="to be given together"):
        module(mean=(0.5,))
    with pytest.raises(ValueError, match=r"`std` to be above 0, but got \(0.0,\)"):
        module(mean=(0.5,), std=(0.0,))


def test_any_loader_will_do_with_mean_and_std() -> None:
    each = AttackModule(
        WaNet(), mean=(0.5,), std=(1.0,), num_classes=4, width=4, in_channels=1, lr=0.01
    )
    trainer = quiet_trainer()
    trainer.fit(each, loader(), loader())
    assert 0 <= trainer.callback_metrics["val/ASR"] <= 1
    assert trainer.global_step == 3


def test_its_checkpoint_serves_a_plain_classifier(tmp_path: Path) -> None:
    each = WaNetModule(num_classes=4, width=4)
    trainer = quiet_trainer(limit_train_batches=1, default_root_dir=tmp_path)
    trainer.fit(each, TinyDataModule())
    trainer.save_checkpoint(tmp_path / "x.ckpt")

    plain = Classifier(num_classes=4, width=4)
    quiet_trainer().validate(
        plain, TinyDataModule(), ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False
    )
    network = cifar_resnet18(4, 4)
    load_into(network, read_state_dict(tmp_path / "x.ckpt"))
    for name, value in each.network.state_dict().items():
        assert plain.network.state_dict()[name].equal(value)
        assert network.state_dict()[name].equal(value)


def test_images_are_mirrored_where_the_datamodule_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for mirrored in (True, False):
        monkeypatch.setattr(TinyDataModule, "flip", mirrored)
        each = module()
        quiet_trainer(limit_train_batches=1, limit_val_batches=0).fit(each, TinyDataModule())
        assert each.flip is mirrored
    each = module(flip=True)
    quiet_trainer(limit_train_batches=1, limit_val_batches=0).fit(each, TinyDataModule())
    assert each.flip is True


def test_a_checkpoint_without_the_attack_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(Classifier(num_classes=4, width=4, lr=0.01), TinyDataModule())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"that AttackModule has written, .* network alone"):
        quiet_trainer().test(
            module(), TinyDataModule(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True
        )


def test_a_checkpoint_of_another_attack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    options: dict[str, Any] = {"num_classes": 4, "width": 4, "lr": 0.05}
    trainer = quiet_trainer(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(WaNetModule(WaNet(target_class=3, strength=2.0), **options), TinyDataModule())
    trainer.save_checkpoint(path)
    for attack in (WaNet(target_class=3), WaNet(target_class=2, strength=2.0), WaNet()):
        with pytest.raises(ValueError, match=r"be the one in the checkpoint, .*'target_class': 3"):
            quiet_trainer().test(
                WaNetModule(attack, **options), TinyDataModule(), ckpt_path=path, weights_only=True
            )
    right = WaNetModule(WaNet(target_class=3, strength=2.0), **options)
    quiet_trainer().test(right, TinyDataModule(), path, verbose=False, weights_only=True)
    # An earlier version told nothing of the attack.
    content = torch.load(path, weights_only=True)
    del content["attack_options"]
    torch.save(content, path)
    other = WaNetModule(WaNet(), **options)
    quiet_trainer().test(other, TinyDataModule(), path, verbose=False, weights_only=True)


def test_another_datamodule_is_asked_again() -> None:
    each = module()
    quiet_trainer().validate(each, TinyDataModule(), verbose=False)
    assert each.mean == (0.5,) * 3
    other = TinyDataModule(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    other.flip = False  # type: ignore[misc]
    quiet_trainer().test(each, other, verbose=False)
    assert (each.mean, each.std, each.flip) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), False)
