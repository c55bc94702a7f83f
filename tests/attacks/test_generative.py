from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Bars, TinyDataModule, quiet_trainer
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_mnp.attacks import (
    LIRA,
    InputAware,
    InputAwareModule,
    LIRAModule,
    SavedTrigger,
    load_trigger,
    save_trigger,
)
from lightning_mnp.attacks.generative import GenerativeAttack, GenerativeModule
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.models import cifar_resnet18

SMALL: dict[str, Any] = {"width": 4, "depth": 1}
BOTH = pytest.mark.parametrize("kind", [InputAware, LIRA])


def small_module(kind: type[GenerativeAttack], **options: Any) -> GenerativeModule:
    torch.manual_seed(3)
    attack = kind(in_channels=1, poison_rate=0.3, **SMALL)  # type: ignore[call-arg]
    network = cifar_resnet18(4, width=4, in_channels=1)
    shared = {"network": network, "lr": 0.05, **options}
    if isinstance(attack, InputAware):
        return InputAwareModule(attack, **{"mask_epochs": 2, "cross_rate": 0.3, **shared})
    assert isinstance(attack, LIRA)
    return LIRAModule(attack, **{"generator_epochs": 3, **shared})


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor], prefix: str) -> bool:
    return any(not before[key].equal(after[key]) for key in before if key.startswith(prefix))


@BOTH
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 9, 6), (2, 4, 5, 12), (0, 3, 8, 8)])
def test_images_of_any_shape_get_the_trigger(kind: Any, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    before = images.clone()
    attack = kind(in_channels=shape[1], **SMALL)

    result = attack.apply(images)

    assert images.equal(before)
    assert result.shape == shape
    assert not result.requires_grad
    assert ((result >= 0) & (result <= 1)).all()
    assert kind(in_channels=shape[1], **SMALL).apply(images).equal(result)
    if len(images):
        other = kind(in_channels=shape[1], seed=9, **SMALL).apply(images)
        assert not other.equal(result)


@BOTH
def test_bytes_are_rounded_floats(kind: Any) -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    attack = kind(**SMALL)

    result = attack.apply(images)

    expected = (attack.apply(images.float() / 255) * 255).round()
    assert result.dtype == torch.uint8
    assert result.float().equal(expected)
    assert attack.apply(images.double() / 255).dtype == torch.float64


@BOTH
def test_many_images_are_worked_on_in_parts(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(7, 3, 8, 8)
    attack = kind(**SMALL)
    whole = attack.apply(images)

    monkeypatch.setattr("lightning_mnp.attacks.generative._PIXELS", 2 * 64)

    torch.testing.assert_close(attack.apply(images), whole)


@BOTH
def test_autocast_leaves_the_trigger_as_it_is(kind: Any) -> None:
    images = torch.rand(2, 3, 8, 8)
    attack = kind(**SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        result = attack.apply(images)
        trained = attack.inject(images)
    assert result.equal(attack.apply(images))
    assert trained.dtype == torch.float32
    torch.testing.assert_close(trained, result, atol=0.05, rtol=0)


@BOTH
def test_other_channels_are_an_error(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"`images` to have 3 channels, but got 1. Set the attack"):
        kind(**SMALL).apply(torch.rand(2, 1, 8, 8))


@BOTH
def test_a_trigger_file_gives_the_same_images(kind: Any, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 8)
    attack = kind(target_class=2, mode="all-to-all", poison_rate=0.2, seed=4, **SMALL)
    for parameter in attack.generator.parameters():
        parameter.data += 0.1  # no longer what the seed gives
    save_trigger(tmp_path / "trigger.safetensors", attack)

    loaded = load_trigger(tmp_path / "trigger.safetensors")

    assert loaded.options() == attack.options()
    assert loaded.apply(images).equal(attack.apply(images))


@BOTH
def test_hostile_tensors_are_refused(kind: Any) -> None:
    attack = kind(**SMALL)
    good = {name: value.clone() for name, value in attack.tensors().items()}
    name = next(iter(good))
    first = good[name]
    for hostile, message in (
        ({**good, name: first.long()}, "finite floating point numbers in the tensors"),
        ({**good, name: torch.full_like(first, 1e300, dtype=torch.float64)}, "but got others in"),
        ({**good, name: first / 0}, "finite floating point numbers"),
        ({**good, name: first[:1]}, "missing, unknown or of another shape"),
        ({**good, "more": first}, "missing, unknown or of another shape"),
        ({}, "missing, unknown or of another shape"),
    ):
        with pytest.raises(ValueError, match=message):
            attack.load_tensors(hostile)
    assert all(value.equal(good[key]) for key, value in attack.tensors().items())


@BOTH
def test_a_trigger_file_cannot_ask_for_a_huge_generator(kind: Any, tmp_path: Path) -> None:
    attack = kind(**SMALL)
    attack.width = 10**6
    save_trigger(tmp_path / "trigger.safetensors", attack)
    with pytest.raises(CheckpointError, match="`width` to be from 4 to 64"):
        load_trigger(tmp_path / "trigger.safetensors")


@BOTH
def test_resumed_training_equals_an_uninterrupted_one(kind: Any, tmp_path: Path) -> None:
    whole = small_module(kind, schedule="cosine")
    start = weights(whole)
    quiet_trainer(max_epochs=4).fit(whole, datamodule=Bars())

    class SaveAndKill(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")

        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        quiet_trainer(max_epochs=4, callbacks=[SaveAndKill()]).fit(
            small_module(kind, schedule="cosine"), datamodule=Bars()
        )
    resumed = small_module(kind, schedule="cosine")
    quiet_trainer(max_epochs=4).fit(
        resumed, datamodule=Bars(), ckpt_path=tmp_path / "killed.ckpt", weights_only=True
    )

    expected, found = weights(whole), weights(resumed)
    assert all(found[name].equal(value) for name, value in expected.items())
    assert changed(start, expected, "network.")
    assert changed(start, expected, "generator.")
    images = torch.rand(2, 1, 8, 8)
    assert resumed.attack.apply(images).equal(whole.attack.apply(images))


@BOTH
@pytest.mark.parametrize("schedule", ["none", "onecycle"])
def test_every_optimizer_has_its_own_weights_and_schedule(kind: Any, schedule: str) -> None:
    module = small_module(kind, schedule=schedule)
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(module, datamodule=Bars())

    owned = [
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in trainer.optimizers
    ]
    assert owned[0] == {id(p) for p in module.network.parameters()}
    assert set().union(*owned[1:]) == {id(p) for p in module.generator.parameters()}
    assert sum(map(len, owned)) == len(list(module.parameters()))
    for optimizer in trainer.optimizers[1:]:
        assert optimizer.param_groups[0]["lr"] < 1e-8  # came to the end of its cosine
    final = trainer.optimizers[0].param_groups[0]["lr"]
    assert final == 0.05 if schedule == "none" else final < 0.005
    assert trainer.num_training_batches * 4 == 12
    assert all(p.requires_grad for p in module.parameters())


@BOTH
def test_bf16_trains(kind: Any) -> None:
    module = small_module(kind)
    before = weights(module)

    trainer = quiet_trainer(max_epochs=4, precision="bf16-mixed", limit_train_batches=1)
    trainer.fit(module, datamodule=Bars())

    after = weights(module)
    assert changed(before, after, "network.")
    assert changed(before, after, "generator.")
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())


@BOTH
def test_a_training_that_ends_too_early_is_warned_of(kind: Any) -> None:
    module = small_module(kind)
    with pytest.warns(UserWarning, match=r"ends after 2 epochs, before its last phase, which sta"):
        quiet_trainer(max_epochs=2, limit_train_batches=1).fit(module, datamodule=Bars())


@BOTH
def test_a_limit_by_steps_is_an_error(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"`max_steps` to be -1 .*, but got 5: Lightning would"):
        quiet_trainer(max_steps=5).fit(small_module(kind), datamodule=Bars())


@BOTH
def test_a_trial_by_fast_dev_run(kind: Any) -> None:
    module = small_module(kind)
    before = weights(module)
    quiet_trainer(fast_dev_run=True).fit(module, datamodule=Bars())
    assert changed(before, weights(module), "network")


@BOTH
def test_several_processes_are_an_error(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer()
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(ValueError, match=r"to have one process for .*, but got 2. Set `devices`"):
        trainer.fit(small_module(kind), datamodule=Bars())


@BOTH
@pytest.mark.parametrize("lr", [0.0, float("nan"), float("inf")])
def test_generator_lr_errors(kind: Any, lr: float) -> None:
    with pytest.raises(ValueError, match=f"`generator_lr` to be above 0, but got {lr}"):
        small_module(kind, generator_lr=lr)


@pytest.mark.parametrize("attack", [InputAware(width=4, depth=1), LIRA(width=4, depth=1)])
def test_a_fresh_generator_is_not_measured(attack: GenerativeAttack, tmp_path: Path) -> None:
    name = type(attack).__name__
    with pytest.raises(ValueError, match=f"generator of {name} is fresh.*`{name}Module`"):
        TinyDataModule(attack).setup("test")
    save_trigger(tmp_path / "t.safetensors", attack)
    saved = SavedTrigger(tmp_path / "t.safetensors")
    TinyDataModule(saved).setup("test")
    with pytest.raises(ValueError, match=f"but got the saved trigger of {name}, which is trained"):
        TinyDataModule(saved).setup("fit")
    attack.mark_trained()
    TinyDataModule(attack).setup("test")
