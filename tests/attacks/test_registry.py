from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import TinyDataModule, quiet_trainer
from torch import Tensor, nn

from lightning_mnp import attacks
from lightning_mnp.attacks import (
    Attack,
    BadNets,
    SavedTrigger,
    TrainingAttack,
    TriggerCheckpoint,
    load_trigger,
    register,
    registered_attacks,
)
from lightning_mnp.attacks.registry import declared_options
from lightning_mnp.attacks.training import AttackModule
from lightning_mnp.attacks.trigger import read_poisoned_indices
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.models import Classifier


@register
class Stripe(Attack):
    """From outside of the package: a bright row, as bright as its options say."""

    def __init__(
        self,
        row: int = 2,
        brightness: float = 0.9,
        note: Path | None = None,
        target_class: int = 0,
        poison_rate: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__(target_class, "all-to-one", poison_rate, seed)
        self.row = row
        self.brightness = brightness
        self.note = note

    def _trigger(self, images: Tensor) -> Tensor:
        images = images.clone()
        images[:, :, self.row] = self.brightness
        return images


@register
class Tint(TrainingAttack):
    """From outside of the package: a color, kept as a weight."""

    def __init__(self, target_class: int = 0, poison_rate: float = 0.25, seed: int = 0) -> None:
        super().__init__(target_class, "all-to-one", poison_rate, seed)
        self.generator = nn.Conv2d(3, 3, 1)

    def _trigger(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            tinted: Tensor = images + 0.2 * self.generator(images).tanh()
            return tinted


def test_an_attack_from_outside_poisons_and_its_file_is_read(tmp_path: Path) -> None:
    attack = Stripe(row=5, brightness=0.8, target_class=1, seed=3)
    datamodule = TinyDataModule(attack)
    path = tmp_path / "trigger.safetensors"
    trainer = quiet_trainer(callbacks=[TriggerCheckpoint(path)], limit_train_batches=1)
    trainer.fit(Classifier(num_classes=4, width=4), datamodule)

    saved = SavedTrigger(path)

    assert type(saved.attack) is Stripe
    assert saved.attack.options() == attack.options()
    assert saved.target_class == 1
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    assert saved.apply(images).equal(attack.apply(images))
    assert saved.apply(images)[:, :, 5].eq(204).all()
    assert read_poisoned_indices(path).equal(datamodule.poisoned_indices)
    assert len(read_poisoned_indices(path)) == 12
    results = quiet_trainer().test(trainer.model, TinyDataModule(saved), verbose=False)
    assert {name for each in results for name in each} == {"test/CA", "test/ASR"}


def test_a_training_attack_from_outside_is_trained_and_read(tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    module = AttackModule(Tint(seed=4), num_classes=4, width=4)
    trainer = quiet_trainer(callbacks=[TriggerCheckpoint(path)], limit_train_batches=1)
    trainer.fit(module, TinyDataModule())

    saved = SavedTrigger(path)

    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    assert saved.apply(images).equal(module.attack.apply(images))
    assert not saved.apply(images).equal(images)


def hostile(path: Path, **options: Any) -> Path:
    metadata = {
        "format": "lightning-mnp trigger 1",
        "attack": "Stripe",
        "options": json.dumps(options),
    }
    safetensors.torch.save_file({"poisoned_indices": torch.zeros(0).long()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"note": "/etc/passwd"}, r"may not set: \['note'\]"),
        ({"mode": "all-to-all"}, r"may not set: \['mode'\]"),
        ({"row": "2"}, "`row` to be <class 'int'>, but got '2'"),
        ({"brightness": [1.0]}, "`brightness` to be <class 'float'>"),
        ({"args": 1}, r"may not set: \['args'\]"),
        ({"__class__": "x"}, r"may not set: \['__class__'\]"),
    ],
)
def test_a_file_sets_what_the_constructor_declares(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_trigger(hostile(tmp_path / "t.safetensors", **options))
    good = load_trigger(hostile(tmp_path / "good.safetensors", row=1, brightness=1, note=None))
    assert isinstance(good, Stripe)
    assert (good.row, good.brightness) == (1, 1.0)


def test_the_package_registers_its_ten_attacks() -> None:
    own = {
        name
        for name, attack in registered_attacks().items()
        if attack.__module__.startswith("lightning_mnp.attacks.") and name in attacks.__all__
    }
    assert own == {
        "BadNets", "Blend", "CL", "DFST", "FeatureCollision", "InputAware", "LIRA", "SIG",
        "Trojan", "WaNet",
    }  # fmt: skip
    for name in own:
        assert registered_attacks()[name] is getattr(attacks, name)


def test_nobody_writes_into_the_registry() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        registered_attacks()["BadNets"] = Stripe  # type: ignore[index]


def test_the_same_class_may_be_defined_again() -> None:
    def define(row: int) -> type[Attack]:
        class Twice(Attack):
            place = row

            def _trigger(self, images: Tensor) -> Tensor:
                return images

        return register(Twice)

    define(1)
    second = define(2)
    assert registered_attacks()["Twice"] is second


class Abstract(Attack):
    pass


class Variadic(Stripe):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


class Bare(Stripe):
    def __init__(self, row=2) -> None:  # type: ignore[no-untyped-def]
        super().__init__(row)


class NeedsPath(Stripe):
    def __init__(self, note: Path) -> None:
        super().__init__(note=note)


def another() -> Any:
    return type("BadNets", (Stripe,), {})


@pytest.mark.parametrize(
    ("attack", "error", "message"),
    [
        ("BadNets", TypeError, "to be a subclass of Attack, but got BadNets"),
        (nn.Module, TypeError, "to be a subclass of Attack, but got .*Module"),
        (BadNets(), TypeError, r"to be a subclass of Attack, but got BadNets\(patch_size=3"),
        (Abstract, TypeError, r"but Abstract lacks the methods \['_trigger'\]"),
        (Variadic, ValueError, r"annotation for each argument, but got \*\*options.* of Variadic"),
        (Bare, ValueError, "annotation for each argument, but got row=2 of Bare. Name and annot"),
        (NeedsPath, ValueError, "a default for each .* but got note: .*Path.* of NeedsPath"),
        (another(), ValueError, "'BadNets' is taken by lightning_mnp.attacks.badnets.BadNets. Ren"),
        (SavedTrigger, ValueError, "a default for each argument .* of SavedTrigger. A trigger"),
    ],
)
def test_what_cannot_be_registered(attack: Any, error: type[Exception], message: str) -> None:
    before = dict(registered_attacks())
    with pytest.raises(error, match=message):
        register(attack)
    assert registered_attacks() == before


def test_declared_options_are_the_arguments_of_the_constructor() -> None:
    assert declared_options(Stripe) == {
        "row": int,
        "brightness": float,
        "note": Path | None,
        "target_class": int,
        "poison_rate": float,
        "seed": int,
    }
