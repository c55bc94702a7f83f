from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Bars, quiet_trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_mnp.attacks import DFST, DFSTModule, load_trigger, save_trigger
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.models import cifar_resnet18


def small_module(poison_rate: float = 0.3, **options: Any) -> DFSTModule:
    """Phases: epoch 0 style, epoch 1 poisoning, epochs 2 and 3 rounds of three batches each."""
    torch.manual_seed(3)
    attack = DFST(in_channels=1, width=4, blocks=1, poison_rate=poison_rate)
    network = cifar_resnet18(4, width=4, in_channels=1)
    shared: dict[str, Any] = {
        "network": network,
        "lr": 0.05,
        "detox_rate": 0.3,
        "rounds": 2,
        "style_epochs": 1,
        "detox_epoch": 2,
        "round_epochs": 1,
        "injector_steps": 1,
        "augment": False,
    }
    return DFSTModule(attack, **{**shared, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    state = {name: value for name, value in module.state_dict().items() if "extra" not in name}
    return {name: value.clone() for name, value in state.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor], prefix: str) -> bool:
    return any(not before[key].equal(after[key]) for key in before if key.startswith(prefix))


def restyled(**options: Any) -> DFST:
    """An attack whose stylizer does something."""
    attack = DFST(**{"width": 4, "blocks": 1, **options})
    nn.init.normal_(attack.generator.leave.weight)
    return attack


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 9, 14), (2, 4, 64, 48), (0, 3, 8, 8)])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_trigger_by_its_formula(shape: tuple[int, ...], strength: float) -> None:
    images = torch.rand(shape)
    before = images.clone()
    attack = restyled(in_channels=shape[1], strength=strength)

    result = attack.apply(images)

    assert images.equal(before)
    assert not result.requires_grad
    assert ((result >= 0) & (result <= 1)).all()
    stylized = attack.generator(images).detach() if len(images) else images
    torch.testing.assert_close(result, (1 - strength) * images + strength * stylized)


def test_bytes_are_rounded_floats() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    attack = restyled()

    result = attack.apply(images)

    assert result.dtype == torch.uint8
    assert result.float().equal((attack.apply(images.float() / 255) * 255).round())
    assert attack.apply(images.double() / 255).dtype == torch.float64
    assert attack.apply(images.half() / 255).dtype == torch.float16


def test_the_same_seed_gives_the_same_trigger() -> None:
    images = torch.rand(2, 3, 8, 8)
    first, second, other = (restyled(seed=seed) for seed in (1, 1, 2))
    for attack in (first, second, other):
        nn.init.constant_(attack.generator.leave.weight, 0.3)

    assert first.apply(images).equal(second.apply(images))
    assert not first.apply(images).equal(other.apply(images))


def test_a_trigger_file_gives_the_same_images(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 8)
    attack = restyled(strength=0.4, target_class=2, mode="all-to-all", poison_rate=0.2, seed=4)
    save_trigger(tmp_path / "trigger.safetensors", attack)

    loaded = load_trigger(tmp_path / "trigger.safetensors")

    assert loaded.options() == attack.options()
    assert loaded.apply(images).equal(attack.apply(images))


def test_hostile_tensors_are_refused() -> None:
    attack = restyled()
    good = {name: value.clone() for name, value in attack.tensors().items()}
    first = good["enter.weight"]
    for hostile, message in (
        ({**good, "enter.weight": first.long()}, "finite floating point numbers"),
        ({**good, "enter.weight": first / 0}, "finite floating point numbers"),
        ({**good, "enter.weight": first[:1]}, "missing, unknown or of another shape"),
        ({**good, "more": first}, "missing, unknown or of another shape"),
        ({}, "missing, unknown or of another shape"),
    ):
        with pytest.raises(ValueError, match=message):
            attack.load_tensors(hostile)
    assert all(value.equal(good[key]) for key, value in attack.tensors().items())


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [("width", 10**6, "4 to 64"), ("blocks", 10**6, "1 to 8"), ("in_channels", 10**6, "1 to 16")],
)
def test_a_trigger_file_cannot_ask_for_a_huge_stylizer(
    name: str, value: int, bounds: str, tmp_path: Path
) -> None:
    attack = restyled()
    setattr(attack, name, value)
    save_trigger(tmp_path / "trigger.safetensors", attack)
    with pytest.raises(CheckpointError, match=f"`{name}` to be from {bounds}, but got {value}"):
        load_trigger(tmp_path / "trigger.safetensors")


def test_image_errors() -> None:
    with pytest.raises(ValueError, match="`images` to have 3 channels, but got 1"):
        DFST(width=4).apply(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match="`images` to have at least 8 x 8 pixels, but got 7 x 9"):
        DFST(width=4).apply(torch.rand(2, 3, 7, 9))


def test_each_phase_trains_its_own_part() -> None:
    module = small_module()
    states = [weights(module)]
    module.on_train_epoch_end = lambda: states.append(weights(module))  # type: ignore[method-assign]

    quiet_trainer(max_epochs=4).fit(module, datamodule=Bars())

    first, second = "detoxifier.injectors.0.", "detoxifier.injectors.1."
    for epoch, trained in enumerate(
        [{"network.", "generator."}, {"network."}, {"network.", first}, {"network.", second}]
    ):
        found = {
            prefix
            for prefix in ("network.", "generator.", first, second)
            if changed(states[epoch], states[epoch + 1], prefix)
        }
        assert found == trained, epoch
    assert module.detoxifier.found.shape[0] == 3
    assert module.detoxifier.found[0].sum() > 0
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_network_stays_while_an_injector_is_trained() -> None:
    module = small_module(injector_steps=100)  # cut to half of the round: one batch of three
    seen: list[tuple[int, int, bool, bool]] = []
    last = [weights(module)]

    def after(outputs: Any, batch: Any, batch_idx: int) -> None:
        state = weights(module)
        network = changed(last[0], state, "network.")
        injectors = changed(last[0], state, "detoxifier.")
        seen.append((module.current_epoch, batch_idx, network, injectors))
        last[0] = state

    module.on_train_batch_end = after  # type: ignore[method-assign]
    quiet_trainer(max_epochs=4).fit(module, datamodule=Bars())

    still = {(epoch, batch) for epoch, batch, network, _ in seen if not network}
    learned = {(epoch, batch) for epoch, batch, _, injectors in seen if injectors}
    assert still == learned == {(2, 0), (3, 0)}
    assert module.network.training


def test_batches_are_made_by_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_module(poison_rate=0.25, detox_rate=0.25)
    quiet_trainer(max_epochs=4).fit(module, datamodule=Bars())
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 4
    generator = torch.Generator().manual_seed(0)
    for injector in module.detoxifier.injectors:
        nn.init.normal_(injector.leave.weight)

    for epoch, rounds in ((1, 0), (2, 1), (3, 2), (9, 2)):
        monkeypatch.setattr(DFSTModule, "current_epoch", epoch)
        batch, targets = module.poison_batch(images, labels, generator)
        assert batch[:4].equal((module.attack.apply(images[:4]) * 255).round() / 255)
        assert batch[4:12].equal(images[4:12])
        assert targets.equal(torch.cat([torch.zeros(4).long(), labels[4:]]))
        expected = images[12:]
        if rounds:
            expected = (module.detoxifier.detoxicants(images[12:], rounds) * 255).round() / 255
        assert batch[12:].equal(expected)
        assert rounds == 0 or not batch[12:].equal(images[12:])


def test_no_poisoned_image_becomes_a_detoxicant(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_module(poison_rate=0.5, detox_rate=0.5)
    quiet_trainer(max_epochs=4).fit(module, datamodule=Bars())
    for injector in module.detoxifier.injectors:
        nn.init.normal_(injector.leave.weight)
    monkeypatch.setattr(DFSTModule, "current_epoch", 9)
    # Three and a half of seven: rounded, both shares would be four.
    monkeypatch.setattr(module, "poison_count", lambda size, generator: 4)
    images, labels = torch.rand(7, 1, 8, 8), torch.tensor([1, 2, 3, 1, 2, 3, 1])

    batch, targets = module.poison_batch(images, labels, torch.Generator())

    assert batch[:4].equal((module.attack.apply(images[:4]) * 255).round() / 255)
    assert not (batch[4:] == images[4:]).all()
    assert targets.tolist() == [0, 0, 0, 0, 2, 3, 1]


def test_rates_as_published() -> None:
    module = DFSTModule(width=4)
    assert module.attack.poison_rate == module.detox_rate == 0.05
    assert DFSTModule(DFST(poison_rate=0.2), width=4).detox_rate == 0.2
    assert DFSTModule(DFST(poison_rate=0.8), width=4).detox_rate == pytest.approx(0.2)
    assert DFSTModule(DFST(poison_rate=0.2), detox_rate=0.1, width=4).detox_rate == 0.1


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, [32, 32, 32, 32, 32]),
        (["layer3.0.conv?"], [16, 16]),
        (["*"], [4] * 5 + [8] * 5 + [16] * 5 + [32] * 5),
    ],
)
def test_compromised_neurons_are_looked_for_in_these_layers(
    layers: list[str] | None, expected: list[int]
) -> None:
    """The slow way: hooks on the norm layers, means over images of the rectified maps."""
    module = small_module(neuron_rate=0.1, **({} if layers is None else {"layers": layers}))
    nn.init.normal_(module.attack.generator.leave.weight)
    images = torch.rand(6, 1, 8, 8)
    module.mean, module.std = (0.5,), (0.5,)

    module._survey(images)

    chosen, means, _ = module.detoxifier.found
    assert len(chosen) == sum(expected)
    names = [n for n, m in module.network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    places = {"*": "", "layer3.0.conv?": "layer3.0.bn", None: "layer4."}
    prefix = places[None if layers is None else layers[0]]
    names = [name for name in names if name.startswith(prefix)]
    assert len(names) == len(expected)
    maps: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _, __, output: maps.update({name: output.detach().relu()})

    for name in names:
        module.network.get_submodule(name).register_forward_hook(hook(name))
    module.network.eval()
    rises = {}
    for kind, given in (("clean", images), ("triggered", module.attack.apply(images))):
        module.network((given - 0.5) / 0.5)
        for name in names:
            rises[kind, name] = maps[name].mean((2, 3))
    start = 0
    for name in names:
        clean, triggered = rises["clean", name], rises["triggered", name]
        stop = start + clean.shape[1]
        torch.testing.assert_close(means[start:stop], clean.mean(0))
        rise = (triggered.mean(0) - clean.mean(0)) / clean.std(0).clamp_min(1e-3)
        count = -(-clean.shape[1] // 10)
        best = rise.sort(descending=True).indices[:count].tolist()
        found = chosen[start:stop].nonzero().flatten().tolist()
        assert sorted(index for index in best if rise[index] > 0) == found
        start = stop


def test_layers_errors() -> None:
    with pytest.raises(ValueError, match=r"`layers` .* 'layer5' matches none of \['conv1', 'layer"):
        small_module(layers=["layer4.*", "layer5"])
    with pytest.raises(ValueError, match="`layers` to have at least one name pattern, but got no"):
        small_module(layers=[])
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ValueError, match=r"'layer4.\*' matches none of \['0'\]. Name others, or"):
        small_module(network=network)
    assert small_module(network=network, rounds=0).rounds == 0


def test_rates_of_zero_are_plain_training() -> None:
    module = small_module(poison_rate=0.0, detox_rate=0.0, rounds=0)
    quiet_trainer(max_epochs=2).fit(module, datamodule=Bars())
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)

    batch, targets = module.poison_batch(images, labels, torch.Generator())

    assert batch.equal(images)
    assert targets.equal(labels)


def test_large_images_are_styled_by_pieces() -> None:
    module = small_module()
    sizes: list[torch.Size] = []
    module.style.register_forward_pre_hook(lambda style, args: sizes.append(args[0].shape))
    for shape in ((2, 1, 100, 40), (2, 1, 8, 9), (2, 1, 224, 224)):
        loss = module.style_loss(torch.rand(shape), torch.Generator().manual_seed(0))
        assert loss.isfinite()
    assert sizes == [(2, 1, 64, 40), (2, 1, 8, 9), (2, 1, 64, 64)]


def test_the_style_loss_by_its_parts() -> None:
    module = small_module(content_weight=0.0)
    images = torch.rand(4, 1, 12, 12)
    expected = module.style(module.generator(images))

    torch.testing.assert_close(module.style_loss(images, torch.Generator()), expected)
    module.content_weight = 2.0
    assert module.style_loss(images, torch.Generator()) > expected


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_training_equals_an_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "cosine", "augment": True, "round_epochs": 2}
    whole = small_module(**options)
    quiet_trainer(max_epochs=5).fit(whole, datamodule=Bars())

    class Kill(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == stop:
                raise RuntimeError("killed")

    keep = ModelCheckpoint(tmp_path / "checkpoints", "killed", save_on_train_epoch_end=True)
    with pytest.raises(RuntimeError, match="killed"):
        quiet_trainer(max_epochs=5, callbacks=[Kill(), keep], enable_checkpointing=True).fit(
            small_module(**options), datamodule=Bars()
        )
    (tmp_path / "checkpoints" / "killed.ckpt").rename(tmp_path / "kept.ckpt")
    resumed = small_module(**options)
    quiet_trainer(max_epochs=5, callbacks=[keep], enable_checkpointing=True).fit(
        resumed, datamodule=Bars(), ckpt_path=tmp_path / "kept.ckpt", weights_only=True
    )

    expected, found = whole.state_dict(), resumed.state_dict()
    assert all(found[name].equal(value) for name, value in expected.items())
    assert resumed.detoxifier.found.equal(whole.detoxifier.found)


def test_bf16_trains() -> None:
    module = small_module()
    quiet_trainer(max_epochs=4, precision="bf16-mixed").fit(module, datamodule=Bars())

    values = [value for value in weights(module).values() if value.is_floating_point()]
    assert all(value.isfinite().all() for value in values)
    assert module.detoxifier.found.dtype == torch.float32


def test_a_backdoor_is_learned() -> None:
    module = small_module(rounds=1, detox_epoch=12)
    nn.init.constant_(module.attack.generator.leave.bias, 3.0)  # a style that is soon learned
    trainer = quiet_trainer(max_epochs=15)

    trainer.fit(module, datamodule=Bars())

    assert trainer.callback_metrics["val/CA"] > 0.9
    assert trainer.callback_metrics["val/ASR"] > 0.9


def test_too_short_a_training_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="DFSTModule ends after 3 epochs, before its last phase"):
        quiet_trainer(max_epochs=3, limit_train_batches=1).fit(small_module(), datamodule=Bars())


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, float("nan")])
def test_strength_errors(strength: float) -> None:
    expected = f"`strength` to be above 0 and at most 1, but got {strength}"
    with pytest.raises(ValueError, match=expected):
        DFST(strength)


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("in_channels", 0, "1 to 16"),
        ("in_channels", 17, "1 to 16"),
        ("width", 3, "4 to 64"),
        ("width", 65, "4 to 64"),
        ("blocks", 0, "1 to 8"),
        ("blocks", 9, "1 to 8"),
    ],
)
def test_stylizer_errors(name: str, value: int, bounds: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` to be from {bounds}, but got {value}"):
        DFST(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detox_rate": 0.8}, "`detox_rate` to be from 0 to 0.7, .* but got 0.8"),
        ({"detox_rate": -0.1}, "`detox_rate` to be from 0 to 0.7, .* but got -0.1"),
        ({"rounds": -1}, "`rounds` to be at least 0, but got -1"),
        ({"style_epochs": 0}, "`style_epochs` to be at least 1, but got 0"),
        ({"detox_epoch": 0}, "`detox_epoch` to be at least 1, but got 0"),
        ({"round_epochs": 0}, "`round_epochs` to be at least 1, but got 0"),
        ({"injector_steps": 0}, "`injector_steps` to be at least 1, but got 0"),
        ({"style_batch": 0}, "`style_batch` to be at least 1, but got 0"),
        ({"neuron_rate": 0.0}, "`neuron_rate` to be above 0 and at most 1, but got 0.0"),
        ({"bound": 1.5}, "`bound` to be above 0 and at most 1, but got 1.5"),
        ({"content_weight": -1.0}, "`content_weight` to be at least 0, but got -1.0"),
        ({"similarity_weight": float("inf")}, "`similarity_weight` to be at least 0, but got inf"),
        ({"others_weight": -1.0}, "`others_weight` to be at least 0, but got -1.0"),
        ({"generator_lr": 0.0}, "`generator_lr` to be above 0, but got 0.0"),
    ],
)
def test_module_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_module(**options)
