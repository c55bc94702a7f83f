from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_mnp.attacks import BadNets
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.write import write_state_dict
from lightning_mnp.data import DigitsDataModule
from lightning_mnp.models import CifarResNet, Classifier, build_network
from lightning_mnp.models.classifier import _counted
from lightning_mnp.models.memory_format import fastest_format


class Linear(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x.flatten(1))


def trainer(folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return Trainer(**defaults | options)


@pytest.mark.parametrize("attack", [BadNets(margin=0), None])
def test_validation_and_test_log_what_the_formula_gives(
    tmp_path: Path, attack: BadNets | None
) -> None:
    classifier = Classifier(Linear())
    datamodule = DigitsDataModule(attack)
    run = trainer(tmp_path)

    logged = {}
    for evaluate in (run.validate, run.test):
        for metrics in evaluate(classifier, datamodule, verbose=False):
            logged.update(metrics)

    clean = [classifier(x).argmax(1) == y for x, y in datamodule.val_dataloader()[0]]
    wanted = {"CA": float(torch.cat(clean).float().mean())}
    if attack is not None:
        triggered = [
            classifier(x).argmax(1) == target for x, target, _ in datamodule.val_dataloader()[1]
        ]
        wanted["ASR"] = float(torch.cat(triggered).float().mean())
    assert logged == {
        f"{stage}/{name}": pytest.approx(value)
        for stage in ("val", "test")
        for name, value in wanted.items()
    }


def test_a_backdoor_is_learned(tmp_path: Path) -> None:
    classifier = Classifier(Linear(), lr=0.2, schedule="onecycle", weight_decay=0.0)
    datamodule = DigitsDataModule(BadNets(patch_size=2, margin=0), augment=False)

    run = trainer(tmp_path, max_epochs=6)
    run.fit(classifier, datamodule)
    assert run.callback_metrics["train/loss"] < 1.0

    metrics = run.validate(classifier, datamodule, verbose=False)
    assert metrics[0]["val/CA"] > 0.85
    assert metrics[1]["val/ASR"] > 0.9


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "none"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_learning_rate_follows_the_schedule(
    tmp_path: Path, schedule: Any, momentum: float
) -> None:
    classifier = Classifier(Linear(), lr=0.1, schedule=schedule, momentum=momentum)
    rates: list[float] = []

    def record(*_: Any) -> None:
        rates.append(classifier.optimizers().param_groups[0]["lr"])

    classifier.on_train_batch_start = record  # type: ignore[method-assign, assignment]
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(
        classifier, DigitsDataModule(batch_size=300)
    )

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1, momentum)
    scheduler: Any = None
    if schedule == "cosine":
        scheduler = CosineAnnealingLR(optimizer, 10)
    elif schedule == "onecycle":
        scheduler = OneCycleLR(optimizer, 0.1, 10, cycle_momentum=momentum > 0)
    wanted = []
    for _ in range(10):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    assert rates == pytest.approx(wanted)


def test_a_schedule_needs_an_end(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match="`schedule` to be 'none' where training has no end"):
        run.fit(Classifier(Linear()), DigitsDataModule())


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_one_step_is_enough(tmp_path: Path, schedule: Any) -> None:
    classifier = Classifier(Linear(), schedule=schedule)
    run = trainer(tmp_path, fast_dev_run=True)
    run.fit(classifier, DigitsDataModule(BadNets()))
    assert run.global_step == 1


def test_a_checkpoint_holds_primitives_and_the_prefix(tmp_path: Path) -> None:
    classifier = Classifier(width=2, in_channels=1, lr=0.05)
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(classifier, DigitsDataModule(BadNets(), batch_size=8))
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)

    stored = torch.load(path, weights_only=True)

    weights = {
        name.removeprefix("network."): value
        for name, value in stored["state_dict"].items()
        if name.startswith("network.")
    }
    assert len(weights) == len(stored["state_dict"])
    build_network("cifar_resnet18", width=2, in_channels=1).load_state_dict(weights)
    assert stored["hyper_parameters"] == {
        "channels_last": True,
        "trainable": "all",
        "architecture": "cifar_resnet18",
        "num_classes": 10,
        "width": 2,
        "in_channels": 1,
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "cosine",
    }
    stored = torch.load(path, weights_only=True)
    again = Classifier(**stored["hyper_parameters"])
    again.load_state_dict(stored["state_dict"])
    images = torch.rand(2, 1, 8, 8)
    assert again.eval()(images).equal(classifier.eval()(images))


@pytest.mark.parametrize(
    ("cifar", "asked", "found"),
    [(True, None, True), (True, False, False), (False, None, False), (False, True, True)],
)
def test_training_chooses_the_memory_format(
    tmp_path: Path, cifar: bool, asked: bool | None, found: bool
) -> None:
    network: Any = CifarResNet([1] * 4, width=2, in_channels=1)
    if not cifar:
        network = nn.Sequential(network)
    weights = next(each for each in network.parameters() if each.shape == (2, 2, 3, 3))
    classifier = Classifier(network, channels_last=asked)
    run = trainer(tmp_path, limit_train_batches=1, limit_test_batches=1, limit_val_batches=0)
    datamodule = DigitsDataModule(batch_size=8)

    run.test(classifier, datamodule, verbose=False)
    assert classifier.channels_last is asked  # only training chooses
    run.fit(classifier, datamodule)

    assert classifier.channels_last is found
    safe = fastest_format(network) == torch.channels_last
    assert weights.is_contiguous(memory_format=torch.channels_last) is (found and safe)


def test_the_command_line_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = f"""
seed_everything: 1
trainer:
  fast_dev_run: true
  logger: false
  accelerator: cpu
  enable_progress_bar: false
  default_root_dir: {tmp_path}
model:
  class_path: lightning_mnp.models.Classifier
  init_args: {{width: 2, in_channels: 1, lr: 0.01, schedule: onecycle}}
data:
  class_path: lightning_mnp.data.DigitsDataModule
  init_args:
    batch_size: 8
    attack:
      class_path: lightning_mnp.attacks.BadNets
      init_args: {{patch_size: 2, target_class: 3}}
"""
    (tmp_path / "config.yaml").write_text(config)

    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])
    # LightningCLI 2.6 itself calls what jsonargparse 4.53 deprecates.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

    cli = LightningCLI(
        args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None
    )

    assert isinstance(cli.model, Classifier)
    assert isinstance(cli.model.network, CifarResNet)
    assert cli.model.hparams["lr"] == 0.01
    assert "_instantiator" not in cli.model.hparams
    assert "_instantiator" not in cli.datamodule.hparams
    assert cli.datamodule.attack.target_class == 3
    assert all(isinstance(value, str | int | float) for value in cli.model.hparams.values())


def test_predict_gives_classes(tmp_path: Path) -> None:
    classifier = Classifier(Linear())
    datamodule = DigitsDataModule()
    predicted = trainer(tmp_path).predict(classifier, datamodule.defense_dataloader())
    images = torch.cat([batch[0] for batch in datamodule.defense_dataloader()])
    assert torch.cat(predicted).equal(classifier(images).argmax(1))
    assert classifier.predict_step(images, 0).equal(torch.cat(predicted))


def test_networks_by_name() -> None:
    network = build_network("squeezenet1_1", num_classes=5)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert isinstance(build_network("cifar_resnet34", width=2), CifarResNet)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_come_without_auxiliary_heads(name: str) -> None:
    with torch.device("meta"):  # draws no weights
        network = build_network(name, num_classes=5)
        logits = network.train()(torch.zeros(2, 3, 75, 75))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 5)


def test_networks_of_timm() -> None:
    pytest.importorskip("timm", reason="needs the package timm")
    network = build_network("timm/test_nfnet", num_classes=5, in_channels=1)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


def test_a_network_of_timm_is_trained_and_read_again(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs the package timm")
    options: dict[str, Any] = {"architecture": "timm/test_efficientnet", "in_channels": 1}
    classifier = Classifier(**options)
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(classifier, DigitsDataModule(image_size=32, batch_size=4))
    run.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = Classifier(**stored["hyper_parameters"])
    again.load_state_dict(stored["state_dict"])
    images = torch.rand(2, 1, 32, 32)
    assert again.eval()(images).equal(classifier.eval()(images))


def test_an_unknown_network_of_timm() -> None:
    pytest.importorskip("timm", reason="needs the package timm")
    message = (
        r"of timm [\d.]+ after 'timm/', but got 'timm/resnet81'. Similar names: .*'timm/resnet"
    )
    with pytest.raises(ValueError, match=message):
        build_network("timm/resnet81")


def test_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm, .* pip install 'lightning-mnp\[timm\]'"):
        build_network("timm/resnet18")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "resnet99"}, "`architecture` to be one of .* but got 'resnet99'"),
        ({"architecture": "resnet81"}, "Similar names: .*'resnet18'.* Any other .* as `network`"),
        ({"architecture": "zzz"}, "but got 'zzz'. Any other network can be given as `network`"),
        ({"architecture": "timm/resnet18", "width": 8}, "`width` to stay 64 for timm's"),
        ({"architecture": "timm/resnet18", "in_channels": 0}, "`in_channels` to be at least 1"),
        ({"architecture": "resnet18", "width": 16}, "to stay 64 and 3 .* but got 16 and 3"),
        ({"architecture": "resnet18", "in_channels": 1}, "to stay 64 and 3 .* but got 64 and 1"),
        ({"architecture": "resnet18", "num_classes": 1}, "`num_classes` to be at least 2"),
        ({"width": 0}, "`width` to be at least 1"),
        ({"lr": 0.0}, "`lr` to be above 0, but got 0.0"),
        ({"lr": float("nan")}, "`lr` to be above 0, but got nan"),
        ({"momentum": 1.0}, "`momentum` to be from 0 to below 1, but got 1.0"),
        ({"weight_decay": -1.0}, "`weight_decay` to be at least 0, but got -1.0"),
        ({"schedule": "linear"}, "`schedule` to be one of .* but got 'linear'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(**options)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_training_starts_from_a_checkpoint(tmp_path: Path, suffix: str) -> None:
    first = Classifier(width=2, in_channels=1)
    path = tmp_path / f"clean{suffix}"
    write_state_dict(path, first.state_dict())
    second = Classifier(width=2, in_channels=1, checkpoint=path)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
    assert "checkpoint" not in second.hparams


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "clean.pt"
    torch.save(Classifier(width=2, in_channels=1).state_dict(), path)
    with pytest.raises(CheckpointError, match="of another shape"):
        Classifier(width=3, in_channels=1, checkpoint=path)
    with pytest.raises(CheckpointError, match="existing file"):
        Classifier(width=2, in_channels=1, checkpoint=tmp_path / "missing.pt")


def test_a_head_is_trained_alone(tmp_path: Path) -> None:
    classifier = Classifier(width=2, in_channels=1, trainable="head", weight_decay=0.1)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    modes = []

    class Watch(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            modes.append({name: part.training for name, part in classifier.named_modules()})

    run = trainer(tmp_path, max_epochs=2, limit_train_batches=2, callbacks=[Watch()])
    run.fit(classifier, DigitsDataModule(batch_size=8, image_size=8))

    changed = {
        name for name, value in classifier.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"network.fc.weight", "network.fc.bias"}
    assert len(modes) == 4
    for mode in modes:
        inside = {name for name, training in mode.items() if training and "network" in name}
        assert inside == {"network.fc"}


def test_everything_is_trained_by_default(tmp_path: Path) -> None:
    classifier = Classifier(width=2, in_channels=1)
    before = {name: value.clone() for name, value in classifier.named_parameters()}
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    run.fit(classifier, DigitsDataModule(batch_size=8))
    assert all(not value.equal(before[name]) for name, value in classifier.named_parameters())


def test_a_network_without_a_head_to_train() -> None:
    with pytest.raises(ValueError, match="to end with a linear layer"):
        Classifier(nn.Conv2d(1, 10, 8), trainable="head")
    with pytest.raises(ValueError, match=r"`trainable` to be one of .* but got 'tail'"):
        Classifier(trainable="tail")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("precision", "capability", "told"),
    [("bf16-mixed", "AVX2", True), ("bf16-mixed", "AVX512", False), ("32-true", "AVX2", False)],
)
def test_a_slow_precision_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: Any,
    capability: str,
    told: bool,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    run = trainer(tmp_path, fast_dev_run=True, precision=precision)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        run.fit(Classifier(Linear()), DigitsDataModule())
    message = "no instructions for bf16-mixed, which takes about ten times as long as float32"
    assert (message in caplog.text) == told


@pytest.mark.parametrize(("images", "processes"), [(5, 2), (9, 4), (3, 5), (8, 2), (2, 3)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_image_counts_in_one_process(images: int, processes: int, size: int) -> None:
    seen = []
    for rank in range(processes):
        data = TensorDataset(torch.arange(images))
        sampler = DistributedSampler(data, processes, rank, shuffle=False)
        loader: DataLoader[Any] = DataLoader(data, size, sampler=sampler)
        for index, (batch,) in enumerate(loader):
            for loaders in (loader, [None, loader]):
                counted = _counted(loaders, (batch,), index, dataloader_idx=1)
            seen += batch[:counted].tolist()
    assert sorted(seen) == list(range(images))


def test_a_loader_of_ones_own_counts_as_it_is() -> None:
    batch = (torch.zeros(3),)
    for loader in (DataLoader(TensorDataset(torch.zeros(3)), 3), [batch], iter([batch])):
        assert _counted([loader], batch, 0, 0) == 3
