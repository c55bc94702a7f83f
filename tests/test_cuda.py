"""Training, audit, defense, resume and precision on a GPU; skipped without one.

The same tests run on the CPU with LIGHTNING_MNP_CUDA_TESTS=cpu, to check the tests themselves, and
on a device that pretends to be one with LIGHTNING_MNP_CUDA_TESTS=pretended (`tests/pretended.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pretended
import pytest
import torch
from helpers import (
    TinyDataModule,
    images_and_labels,
    loader,
    quiet_trainer,
    same,
    snapshot,
    trained_network,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from loader_script import Recorder
from torch import nn

import lightning_mnp
from lightning_mnp import DefenseSet, MNPConfig, MNPDefense, MNPModule
from lightning_mnp.attacks import (
    CL,
    DFST,
    LIRA,
    SIG,
    AdaptiveTraining,
    Attack,
    BadNets,
    Blend,
    DFSTModule,
    FeatureCollision,
    InputAware,
    InputAwareModule,
    LIRAModule,
    ReferenceNetwork,
    Trojan,
    WaNet,
    WaNetModule,
)
from lightning_mnp.baselines import Suspects
from lightning_mnp.benchmark.loss_changes import loss_changes
from lightning_mnp.benchmark.methods import Method, method_names
from lightning_mnp.cli.command_line import main
from lightning_mnp.config import Constants
from lightning_mnp.data import DigitsDataModule, datamodule
from lightning_mnp.models import Classifier
from lightning_mnp.purify.cuts import CutConstants
from lightning_mnp.purify.greedy import GreedyConstants

KIND = os.environ.get("LIGHTNING_MNP_CUDA_TESTS", "cuda")
PLACE: dict[str, Any] = {"accelerator": "gpu" if KIND == "cuda" else KIND}
if KIND == pretended.NAME:
    PLACE = pretended.trainer_options()

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        KIND == "cuda" and not torch.cuda.is_available(),
        reason="needs a CUDA device; torch.cuda.is_available() is False",
    ),
    # Drivers and libraries of a GPU have warnings of their own.
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("short_searches"),
]

# Short, but through every phase.
CONFIG = {
    "batch_size": 16,
    "suppression.runs": 1,
    "suppression.more_runs": 0,
    "suppression.epochs": 3,
    "masks.epochs": 2,
    "pruning.rule": "count",
    "pruning.amount": 5,
    "pruning.soft_mask_steps": 4,
    "pruning.tuning_steps": 4,
    "pruning.reaudit": False,
}


@pytest.fixture(autouse=True)
def kept_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have images kept on the pretended device, as on a GPU; they would lie on the CPU instead."""
    if KIND == pretended.NAME:
        monkeypatch.setattr(datamodule, "_CPU", torch.device(KIND, 0))


def config(**changes: Any) -> MNPConfig:
    return MNPConfig().changed({**CONFIG, **changes})


def network() -> nn.Module:
    return trained_network().to(KIND)


def trainer(**options: Any) -> Any:
    return quiet_trainer(**PLACE, devices=1, **options)


def classifier(**options: Any) -> Classifier:
    return Classifier(width=4, num_classes=4, lr=0.05, schedule="none", **options)


def on_gpu(module: nn.Module) -> bool:
    return all(tensor.device.type == KIND for tensor in module.state_dict().values())


class Devices(Callback):
    """Notes where the batches are when the loader has made them."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.found |= {part.device.type for part in batch}
        self.found.add(trainer.train_dataloader.dataset.images.device.type)


def test_training_takes_its_batches_from_the_device() -> None:
    devices, module = Devices(), classifier()
    before = module.network.conv1.weight.detach().clone()
    datamodule = TinyDataModule(BadNets(margin=0), augment=True, on_device=True)

    run = trainer(max_epochs=2, callbacks=[devices])
    run.fit(module, datamodule)

    assert devices.found == {KIND}
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert {"val/CA", "val/ASR"} <= run.callback_metrics.keys()
    assert not module.network.conv1.weight.detach().cpu().equal(before)


def test_batches_equal_those_of_the_cpu() -> None:
    batches = []
    for place in ({"accelerator": "cpu"}, PLACE):
        module = Recorder()
        datamodule = TinyDataModule(BadNets(margin=0), augment=True, on_device=True, seed=1)
        quiet_trainer(**place, devices=1, limit_val_batches=0).fit(module, datamodule)
        batches.append(module.seen)
    assert len(batches[0]) == len(batches[1]) == 3
    for one, other in zip(*batches, strict=True):
        torch.testing.assert_close(other[2].cpu(), one[2], rtol=0, atol=1e-5)
        assert other[3].cpu().equal(one[3])


def test_both_ways_give_the_same_figures() -> None:
    module = classifier()
    figures = [
        trainer().test(module, TinyDataModule(BadNets(margin=0), on_device=each), verbose=False)
        for each in (False, True)
    ]
    assert len(figures[0]) == 2
    for one, other in zip(*figures, strict=True):
        # An image on the edge between two classes may fall to either side: 1 of 24 at most.
        assert one == pytest.approx(other, abs=0.05)


STEERING: dict[str, Callable[..., Classifier]] = {
    "wanet": partial(WaNetModule, WaNet()),
    "iab": partial(InputAwareModule, InputAware(width=4, depth=1), mask_epochs=1),
    "lira": partial(LIRAModule, LIRA(0.1, "normalized", width=4, depth=1), generator_epochs=1),
    "dfst": partial(
        DFSTModule, DFST(width=4), style_epochs=1, detox_epoch=1, round_epochs=1, injector_steps=1
    ),
}


@pytest.mark.parametrize("name", STEERING)
def test_attacks_that_steer_the_training(tmp_path: Path, name: str) -> None:
    module = STEERING[name](width=4, num_classes=4, schedule="none")
    run = trainer(max_epochs=2)
    run.fit(module, TinyDataModule(on_device=True))
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert "val/ASR" in run.callback_metrics
    run.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True, map_location="cpu")
    assert all(name.startswith("network.") for name in stored["state_dict"])


@pytest.mark.parametrize("attack", [BadNets(mode="all-to-all"), Blend(), SIG(frequency=2.0)])
def test_attacks_on_images_of_the_device(attack: Attack) -> None:
    module = classifier()
    run = trainer(max_epochs=1)
    run.fit(module, TinyDataModule(attack, on_device=True))
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert "val/ASR" in run.callback_metrics


CRAFTED: dict[str, Callable[[ReferenceNetwork], Attack]] = {
    "cl": partial(CL, steps=2),
    "fc": partial(FeatureCollision, targets=1, poisons_per_target=2, steps=2, target_class=1),
    "trojan": partial(Trojan, patch_size=3, steps=2),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_attacks_that_are_made_with_a_network(tmp_path: Path, name: str) -> None:
    torch.save(Classifier(width=4, num_classes=4).state_dict(), tmp_path / "clean.pt")
    clean = ReferenceNetwork(tmp_path / "clean.pt", num_classes=4, width=4)
    run = trainer(max_epochs=1)
    run.fit(classifier(), TinyDataModule(CRAFTED[name](clean), on_device=True))
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert "val/ASR" in run.callback_metrics


def test_an_attacker_who_knows_the_signals() -> None:
    known = AdaptiveTraining(norms=1.0, pile_up=1.0, margin=1.0, patch=1.0, accuracy=0.1)
    run = trainer(max_epochs=2, callbacks=[known])
    run.fit(classifier(), TinyDataModule(BadNets(margin=0), on_device=True))
    assert torch.isfinite(run.callback_metrics["train/loss"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_in_every_precision(precision: str) -> None:
    if KIND != "cuda" and precision == "16-mixed":
        pytest.skip("16-mixed is for GPUs")
    module = classifier()
    run = trainer(max_epochs=1, precision=precision)
    run.fit(module, TinyDataModule(on_device=True))
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert module.network.conv1.weight.dtype == torch.float32


def test_a_training_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    class Saver(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if len(module.seen) == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def fit(path: Path | None = None, **options: Any) -> Recorder:
        module = Recorder()
        run = trainer(max_epochs=2, limit_val_batches=0, **options)
        datamodule = TinyDataModule(augment=True, on_device=True, seed=1)
        run.fit(module, datamodule, ckpt_path=path, weights_only=True)
        return module

    whole = fit(callbacks=[Saver()])
    resumed = fit(tmp_path / "middle.ckpt")
    assert len(resumed.seen) == 2
    for one, other in zip(resumed.seen, whole.seen[4:], strict=True):
        assert one[:2] == other[:2]
        assert one[2].equal(other[2])
        assert one[3].equal(other[3])


def test_an_audit_leaves_the_network_where_and_as_it_is() -> None:
    model = network()
    before = snapshot(model)
    report = lightning_mnp.audit(model, loader(), config=config())
    assert report.verdict in ("clean", "backdoored", "undecided")
    assert len(report.runs) == 1
    assert report.accuracy_before > 0.9
    assert same(snapshot(model), before)
    assert on_gpu(model)


def test_a_defended_network_computes_as_on_the_cpu(tmp_path: Path) -> None:
    model = network()
    before = snapshot(model)

    report = lightning_mnp.defend(model, loader(), when="always", config=config())

    assert same(snapshot(model), before)
    assert len(report.pruned) == 5
    assert report.model is not None
    assert on_gpu(report.model)
    for name, index in report.pruned:
        assert not report.model.get_submodule(name).weight[index].any()
    images, _ = images_and_labels(8)
    with torch.no_grad():
        logits = report.model(images.to(KIND)).cpu()
        lightning_mnp.write_state_dict(tmp_path / "purified.pt", report.model.state_dict())
        weights = lightning_mnp.read_state_dict(tmp_path / "purified.pt")
        assert {tensor.device.type for tensor in weights.values()} == {"cpu"}
        # Convolutions may round to 10 bits on a GPU (TF32).
        torch.testing.assert_close(logits, report.model.cpu()(images), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("steps", [2, 9])
def test_a_defense_goes_on_from_its_state(tmp_path: Path, steps: int) -> None:
    data = DefenseSet.from_loader(loader())
    first = MNPDefense(network(), data, config())
    for _ in range(steps):
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")

    second = MNPDefense(network(), data, config())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    assert (second.phase, second.run) == (first.phase, first.run)
    assert equal_states(second.state_dict(), first.state_dict())
    while not second.finished:
        second.step()
    assert len(second.report().pruned) == 5
    assert on_gpu(second.purified())


@pytest.mark.parametrize("phase", ["pruning", "soft_masks", "tuning", "check"])
def test_pruning_along_traces_goes_on_from_its_state(tmp_path: Path, phase: str) -> None:
    data = DefenseSet.from_loader(loader())
    options = config(**{"pruning.rule": "auto", "pruning.amount": 0.2})
    # No trace is ever gone, and masks are high after few steps: each stage has steps to take.
    constants = Constants(GreedyConstants(gone_at=0.0), CutConstants(below=0.999, far_below=0.999))
    first = MNPDefense(network(), data, options, when="always", constants=constants)
    while first.phase != phase:
        first.step()
    if phase != "check":
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")

    second = MNPDefense(network(), data, options, when="always", constants=constants)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    assert second.phase == first.phase
    assert equal_states(second.state_dict(), first.state_dict())
    while not second.finished:
        second.step()
    pruning = second.report().pruning
    assert pruning is not None
    assert pruning.masks
    assert pruning.tuned > 0
    assert on_gpu(second.purified())


@pytest.mark.parametrize("preset", [MNPConfig.paper, MNPConfig.averaged_masks])
def test_the_paper_s_settings(preset: Callable[..., MNPConfig]) -> None:
    options = {name: CONFIG[name] for name in ("batch_size", "suppression.epochs", "masks.epochs")}
    report = lightning_mnp.defend(
        network(), loader(), when="always", config=preset().changed(options)
    )
    assert report.pruned
    assert report.model is not None
    assert on_gpu(report.model)


# Few steps for each; a name without options has none that makes it shorter.
QUICK_DEFENSES: dict[str, dict[str, Any]] = {
    "anp": {"iterations": 4},
    "clp": {},
    "fp": {},
    "ft": {"epochs": 2},
    "ft-sam": {"epochs": 2},
    "i-bau": {"rounds": 2},
    "nad": {"epochs": 2, "teacher_epochs": 1},
    "nc": {"search.epochs": 2, "epochs": 1},
    "nft": {"steps": 2},
    "rnp": {"unlearning_epochs": 2, "recovering_epochs": 2},
}
QUICK_DETECTORS: dict[str, dict[str, Any]] = {
    "ac": {"starts": 2, "steps": 4},
    "default": {**CONFIG, "suppression.epochs": 2},
    "mm-bd": {"starts": 3, "steps": 4},
    "nc": {"epochs": 2},
    "sc": {},
    "strip": {"overlays": 4},
}


def test_no_baseline_is_left_out() -> None:
    own = {"default", "mnp", "mnp-averaged"}
    assert set(method_names("defense")) - own == set(QUICK_DEFENSES)
    assert set(method_names("detector")) - own == set(QUICK_DETECTORS) - own


@pytest.mark.parametrize("name", QUICK_DEFENSES)
def test_every_defense_to_compare_with(name: str) -> None:
    model = network()
    before = snapshot(model)
    data = DefenseSet.from_loader(loader())
    outcome = Method(name, QUICK_DEFENSES[name]).defend(model, data, seed=0)
    assert outcome.model is not None
    assert on_gpu(outcome.model)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("name", QUICK_DETECTORS)
def test_every_detector_to_compare_with(name: str) -> None:
    method, suspects = Method(name, QUICK_DETECTORS[name]), None
    if method.suspects is not None:
        suspects = Suspects.from_loader(loader(count=64))
    outcome = method.detect(network(), DefenseSet.from_loader(loader()), 0, suspects)
    assert outcome.verdict in ("clean", "backdoored", "undecided")


def test_loss_changes_of_every_filter() -> None:
    images, labels = images_and_labels()
    found = loss_changes(network(), [(images, labels)], [(images, 0 * labels)])
    assert len(found.names) == 88
    assert torch.isfinite(found.clc).all()
    assert torch.isfinite(found.blc).all()


def test_the_callback_audits_what_was_trained(tmp_path: Path) -> None:
    callback = lightning_mnp.MNPCallback(
        defense_loader=loader(), config=config(), output_dir=tmp_path
    )
    module = Classifier(width=2, in_channels=1, num_classes=4, lr=0.05, schedule="none")
    trainer(max_epochs=1, callbacks=[callback]).fit(module, loader())
    assert callback.report is not None
    assert len(callback.report.runs) == 1


def equal_states(one: Any, other: Any) -> bool:
    """Whether nested states hold the same, to the last bit."""
    if isinstance(one, torch.Tensor):
        return bool(one.cpu().equal(other.cpu()))
    if isinstance(one, dict):
        keys = one.keys() - {"seconds"}
        return keys == other.keys() - {"seconds"} and all(
            equal_states(one[key], other[key]) for key in keys
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(
            equal_states(a, b) for a, b in zip(one, other, strict=True)
        )
    both_nan = isinstance(one, float) and math.isnan(one) and math.isnan(other)
    return both_nan or bool(one == other)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_trainer_runs_the_defense(precision: str) -> None:
    module = MNPModule(trained_network(), config())
    trainer(max_epochs=-1, precision=precision).fit(module, loader())
    assert module.report is not None
    assert len(module.report.pruned) == 5
    for name, index in module.report.pruned:
        assert not module.network.get_submodule(name).weight[index].any()


def test_half_precision_is_refused_for_the_defense() -> None:
    if KIND != "cuda":
        pytest.skip("16-mixed is for GPUs")
    with pytest.raises(MisconfigurationException, match="but got 16-mixed"):
        trainer(max_epochs=-1, precision="16-mixed").fit(
            MNPModule(trained_network(), config()), loader()
        )


@pytest.mark.skipif(KIND == pretended.NAME, reason="the command line cannot name this device")
def test_the_command_line_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr("sys.argv", ["lightning-mnp"])
    torch.save(Classifier(width=2, in_channels=1).state_dict(), tmp_path / "weights.pt")
    quiet = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
    command = [
        *("audit", "--model=lightning_mnp.models.Classifier", "--model.width=2"),
        *("--model.in_channels=1", "--data=lightning_mnp.data.DigitsDataModule"),
        *("--data.defense_size=20", f"--ckpt_path={tmp_path / 'weights.pt'}"),
        *("--mnp.suppression.runs=1", "--mnp.suppression.epochs=1"),
        *(f"--trainer.accelerator={'gpu' if KIND == 'cuda' else KIND}", "--trainer.devices=1"),
        *(f"--trainer.{option}=false" for option in quiet),
        f"--report={tmp_path / 'report.json'}",
    ]
    assert main(command) in (0, 3, 4)
    assert len(lightning_mnp.DefenseReport.load(tmp_path / "report.json").runs) == 1


def test_digits_train_on_whole_batches_by_default() -> None:
    devices = Devices()
    module = Classifier(width=2, in_channels=1, schedule="none")
    trainer(limit_train_batches=2, limit_val_batches=1, callbacks=[devices]).fit(
        module, DigitsDataModule()
    )
    assert devices.found == {KIND}
