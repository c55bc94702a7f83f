"""Other people's trainings: their optimization, callbacks, data, precision and interruptions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed_script import CONFIG, data, small_network, still
from helpers import REPOSITORY, UserModule, images_and_labels, quiet_trainer, same, snapshot
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import lightning_mnp
from lightning_mnp import MNPCallback, MNPDefense, MNPModule
from lightning_mnp.checkpoints.atomic_write import OutputError
from lightning_mnp.defense_data.defense_set import DefenseSet

WRITTEN = {"mnp-report.html", "mnp-report.json", "mnp.ckpt"}
NOT_AUDITED = "MNPCallback has not audited the network: there was nothing to train"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # What small networks are called is of no account here.
    pytest.mark.filterwarnings("ignore:MNPCallback. verdict"),
]


def new_callback(folder: Path, when: Any = "always", **options: Any) -> MNPCallback:
    options = {"defense_loader": data(), "in_place": True, **options}
    return MNPCallback(when, config=CONFIG, output_dir=folder, **options)


def fit(
    folder: Path,
    module: L.LightningModule,
    loader: Any = None,
    in_place: bool = True,
    **options: Any,
) -> tuple[MNPCallback, L.Trainer]:
    """Train a module with the callback, which stands in front of the others."""
    callback = new_callback(folder, in_place=in_place)
    options["callbacks"] = [callback, *options.get("callbacks", [])]
    trainer = quiet_trainer(**options)
    trainer.fit(module, loader or data())
    return callback, trainer


def assert_pruned(callback: MNPCallback, module: nn.Module, folder: Path) -> None:
    """The module in memory and the one in the checkpoint are pruned and equal."""
    assert callback.report is not None
    assert len(callback.report.pruned) == 3
    for name, index in callback.report.pruned:
        assert not module.get_submodule(name).weight[index].any()
    stored = torch.load(folder / "mnp.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


class Adversarial(L.LightningModule):
    """Two networks, two optimizers, manual steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = small_network().train()
        self.noise = nn.Conv2d(1, 1, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
            optimizer.zero_grad()
            self.manual_backward(sign * F.cross_entropy(self.net(self.noise(images)), labels))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.net.parameters(), 0.01),
            torch.optim.Adam(self.noise.parameters(), 0.001),
        ]


def test_manual_optimization_and_several_optimizers(tmp_path: Path) -> None:
    module = Adversarial()
    callback = new_callback(tmp_path, network="net")
    quiet_trainer(callbacks=[callback]).fit(module, data())
    assert_pruned(callback, module, tmp_path)
    assert all(name.startswith("net.") for name, _ in callback.report.pruned)


def test_two_networks_and_no_name_is_an_error_before_training(tmp_path: Path) -> None:
    module = Adversarial()
    before = snapshot(module)
    with pytest.raises(ValueError, match="Name one with the argument `network`"):
        fit(tmp_path, module)
    assert same(before, snapshot(module))


def test_what_ddp_leaves_on_a_module_is_not_taken_for_its_forward(tmp_path: Path) -> None:
    module = UserModule(small_network().train())
    module.forward = module.forward  # type: ignore[method-assign]  # the method, on the object
    callback, _ = fit(tmp_path, module)
    assert_pruned(callback, module, tmp_path)


def test_gradient_accumulation(tmp_path: Path) -> None:
    module = UserModule(small_network().train())
    callback, trainer = fit(tmp_path, module, accumulate_grad_batches=3)
    assert trainer.global_step == 2
    assert_pruned(callback, module, tmp_path)


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    module = UserModule(small_network().train())
    module.net[0].requires_grad_(False)
    callback, _ = fit(tmp_path, module)
    assert_pruned(callback, module, tmp_path)
    assert [p.requires_grad for p in module.net[0].parameters()] == [False, False]


class EveryStep(WeightAveraging):
    pass


@pytest.mark.parametrize("averaging", [EveryStep, lambda: EMAWeightAveraging(decay=0.5)])
def test_weight_averaging_audits_and_saves_the_average(tmp_path: Path, averaging: Any) -> None:
    average = averaging()
    module = UserModule(small_network().train(), lr=0.1)
    callback, trainer = fit(tmp_path, module, callbacks=[average])
    assert trainer.callbacks.index(average) < trainer.callbacks.index(callback)
    assert_pruned(callback, module, tmp_path)
    pruned = {name for name, _ in callback.report.pruned}
    averaged = average._average_model.module
    assert "net.8" not in pruned  # the linear layer
    assert torch.equal(averaged.net[8].weight, module.net[8].weight)
    # What is saved later is pruned as well, and not the average from before.
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    later = torch.load(tmp_path / "later.ckpt", weights_only=True)["state_dict"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, later[name])


@pytest.mark.parametrize("averaging", [EveryStep, lambda: EMAWeightAveraging(decay=0.5)])
def test_the_average_stays_as_it_is_beside_a_purified_one(tmp_path: Path, averaging: Any) -> None:
    average = averaging()
    module = UserModule(small_network().train(), lr=0.1)
    callback, trainer = fit(tmp_path, module, in_place=False, callbacks=[average])
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    later = torch.load(tmp_path / "later.ckpt", weights_only=True)["state_dict"]
    purified = torch.load(tmp_path / "mnp.ckpt", weights_only=True)["state_dict"]
    averaged = average._average_model.module.state_dict()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, later[name])
        assert torch.equal(tensor, averaged[name])
    assert callback.report is not None
    for name, index in callback.report.pruned:
        assert later[f"{name}.weight"][index].any()
        assert not purified[f"{name}.weight"][index].any()


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging(tmp_path: Path) -> None:
    module = UserModule(small_network().train())
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    callback, _ = fit(tmp_path, module, max_epochs=3, callbacks=[averaging])
    assert_pruned(callback, module, tmp_path)


def test_own_average_is_audited_where_it_is_named(tmp_path: Path) -> None:
    class Averaged(UserModule):
        def __init__(self) -> None:
            super().__init__(small_network().train())
            self.average = torch.optim.swa_utils.AveragedModel(self.net)

        def on_train_batch_end(self, *args: Any) -> None:
            self.average.update_parameters(self.net)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), self.lr)

    module = Averaged()
    callback = new_callback(tmp_path, network="average")
    quiet_trainer(callbacks=[callback]).fit(module, data())
    assert_pruned(callback, module, tmp_path)
    assert all(name.startswith("average.") for name, _ in callback.report.pruned)


def test_model_pruning_is_made_permanent_first(tmp_path: Path) -> None:
    module = UserModule(small_network().train())
    pruning = ModelPruning("l1_unstructured", amount=0.3)
    callback, _ = fit(tmp_path, module, callbacks=[pruning])
    assert_pruned(callback, module, tmp_path)
    assert 0 < int((module.net[0].weight == 0).sum()) < module.net[0].weight.numel()


def test_model_pruning_that_leaves_masks_is_refused(tmp_path: Path) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.3, make_pruning_permanent=False)
    with pytest.raises(MisconfigurationException, match="leaves masks beside them"):
        fit(tmp_path, UserModule(small_network()), callbacks=[pruning])


def test_model_checkpoint_has_the_network_from_before(tmp_path: Path) -> None:
    module = UserModule(small_network().train())
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    callback, trainer = fit(tmp_path, module, callbacks=[saver], enable_checkpointing=True)
    assert trainer.callbacks.index(callback) < trainer.callbacks.index(saver)
    assert_pruned(callback, module, tmp_path)
    for path in (saver.best_model_path, saver.last_model_path):
        saved = torch.load(path, weights_only=True)["state_dict"]
        for name, index in callback.report.pruned:
            assert saved[f"{name}.weight"][index].any()


def test_a_users_way_of_saving_is_put_back(tmp_path: Path) -> None:
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    way = AsyncCheckpointIO()
    module = UserModule(small_network().train())
    callback, trainer = fit(tmp_path, module, plugins=[way])
    assert_pruned(callback, module, tmp_path)
    assert trainer.strategy.checkpoint_io is way


class Validated(UserModule):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", 1.0)

    def val_dataloader(self) -> Any:
        return data()


def test_early_stopping(tmp_path: Path) -> None:
    module = Validated(small_network().train())
    stopping = EarlyStopping("loss", patience=1)
    callback, trainer = fit(tmp_path, module, max_epochs=9, callbacks=[stopping])
    assert trainer.current_epoch == 2
    assert_pruned(callback, module, tmp_path)


class Pair:
    """A batch that only its own code understands."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels


def make_pair(items: list[tuple[Tensor, Tensor]]) -> Pair:
    images, labels = (torch.stack(column) for column in zip(*items, strict=True))
    return Pair(255 * images, labels)


class OwnTransfer(UserModule):
    """Moves batches itself, and normalizes them on the device."""

    moved = 0

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        OwnTransfer.moved += 1
        return Pair(batch.images.to(device), batch.labels.to(device))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return Pair(batch.images / 255, batch.labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(self.net(batch.images), batch.labels)


def test_own_batches_and_own_transfer(tmp_path: Path) -> None:
    batches = DataLoader(data().dataset, 20, collate_fn=make_pair)
    module = OwnTransfer(small_network().train(), lr=0.0)
    callback = new_callback(
        tmp_path,
        defense_loader=batches,
        unpack=lambda batch: (batch.images / 255, batch.labels),
    )
    quiet_trainer(callbacks=[callback]).fit(module, batches)
    assert OwnTransfer.moved == 2
    assert_pruned(callback, module, tmp_path)
    assert callback.report.accuracy_before > 0.9


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        images, labels = images_and_labels()
        yield from zip(images, labels, strict=True)


def test_iterable_data(tmp_path: Path) -> None:
    module = UserModule(small_network().train())
    callback = new_callback(tmp_path, defense_loader=Stream())
    quiet_trainer(callbacks=[callback]).fit(module, DataLoader(Stream(), 10))
    assert_pruned(callback, module, tmp_path)
    assert callback.report.defense_set is not None
    assert callback.report.defense_set.images == 40


def test_a_generator_is_read_once(tmp_path: Path) -> None:
    batches = (batch for batch in data())
    callback = new_callback(tmp_path, defense_loader=batches)
    quiet_trainer(callbacks=[callback]).fit(UserModule(small_network().train()), data())
    assert callback.report is not None
    with pytest.raises(ValueError, match="its loader yields no batch"):
        quiet_trainer(callbacks=[callback]).fit(UserModule(small_network().train()), data())
    assert callback.report is None


def test_iterable_data_for_the_module() -> None:
    module = MNPModule(small_network(), CONFIG)
    quiet_trainer(max_epochs=-1).fit(module, DataLoader(Stream(), 10))
    assert module.report is not None
    assert module.report.defense_set is not None
    assert module.report.defense_set.images == 40


def test_resumed_run_is_audited_at_its_end(tmp_path: Path) -> None:
    first = UserModule(small_network().train())
    _, trainer = fit(tmp_path / "first", first)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = UserModule(small_network().train())
    callback = new_callback(tmp_path)
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(second, data(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert trainer.current_epoch == 2
    assert_pruned(callback, second, tmp_path)


def test_finished_run_is_not_audited_and_says_so(tmp_path: Path) -> None:
    module = UserModule(small_network().train())
    trainer = quiet_trainer()
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    callback = new_callback(tmp_path / "outcome")
    with pytest.warns(UserWarning, match=NOT_AUDITED):
        quiet_trainer(callbacks=[callback]).fit(
            module, data(), ckpt_path=tmp_path / "end.ckpt", weights_only=True
        )
    assert callback.report is None
    assert not (tmp_path / "outcome").exists()


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_nothing_to_train_is_not_audited_and_says_so(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    callback = new_callback(tmp_path)
    with pytest.warns(UserWarning, match=NOT_AUDITED):
        quiet_trainer(callbacks=[callback], **options).fit(UserModule(small_network()), data())
    assert callback.report is None


@pytest.mark.filterwarnings("ignore:.*[Bb]arebones.*")
def test_barebones(tmp_path: Path) -> None:
    callback = new_callback(tmp_path)
    module = UserModule(small_network().train())
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, barebones=True, callbacks=[callback])
    trainer.fit(module, data())
    assert_pruned(callback, module, tmp_path)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train")
@pytest.mark.parametrize("amount", [2, 0.5])
def test_overfit_batches(tmp_path: Path, amount: float) -> None:
    module = UserModule(small_network().train())
    callback, trainer = fit(
        tmp_path, module, data(shuffle=True), overfit_batches=amount, limit_val_batches=0
    )
    assert trainer.num_training_batches == 2
    assert callback.report.defense_set is not None
    assert callback.report.defense_set.images == 40  # the defense set is not cut
    assert_pruned(callback, module, tmp_path)


@pytest.mark.parametrize("amount", [2, 0.5])
def test_a_limit_of_batches_cuts_the_defense_set_of_the_module(amount: float) -> None:
    module = MNPModule(small_network(), CONFIG)
    trainer = quiet_trainer(max_epochs=-1, limit_train_batches=amount)
    trainer.fit(module, data())
    assert module.report is not None
    assert module.report.defense_set is not None
    assert module.report.defense_set.images == 20


@pytest.mark.filterwarnings("ignore:.*[Bb]arebones.*")
def test_barebones_for_the_module(tmp_path: Path) -> None:
    module = MNPModule(small_network(), CONFIG, output_dir=tmp_path)
    L.Trainer(accelerator="cpu", max_epochs=-1, barebones=True).fit(module, data())
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN


def test_fast_dev_run_for_the_module_writes_nothing(tmp_path: Path) -> None:
    module = MNPModule(small_network(), CONFIG, output_dir=tmp_path)
    with pytest.warns(UserWarning, match="The Trainer ended while the defense was in phase"):
        quiet_trainer(fast_dev_run=True).fit(module, data())
    assert list(tmp_path.iterdir()) == []


def test_module_writes_what_model_checkpoint_does_not_see(tmp_path: Path) -> None:
    module = MNPModule(small_network(), CONFIG, output_dir=tmp_path)
    quiet_trainer(max_epochs=-1).fit(module, data())
    assert module.report is not None
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN
    fresh = small_network()
    lightning_mnp.load_into(fresh, lightning_mnp.read_state_dict(tmp_path / "mnp.ckpt"))
    for name, tensor in module.network.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name])
    for name, index in module.report.pruned:
        assert not fresh.get_submodule(name).weight[index].any()


def test_unwritable_output_shows_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    module = UserModule(small_network().train())
    before = snapshot(module)
    with pytest.raises(OutputError, match="Expected argument `output_dir`"):
        fit(tmp_path / "file", module)
    assert same(before, snapshot(module))


def test_remote_output_is_refused() -> None:
    callback = MNPCallback("never", data(), CONFIG, output_dir="s3://bucket/runs")
    with pytest.raises(
        MisconfigurationException, match=r"to be a local folder.*'s3://bucket/runs'"
    ):
        quiet_trainer(callbacks=[callback]).fit(UserModule(small_network()), data())


def assert_like(first: Any, second: Any, ranks: float = 1e-5) -> None:
    """Two reports say the same, under names that may have a part for compilation."""
    names = [
        [(name.replace("_orig_mod.", ""), index) for name, index in report.pruned]
        for report in (first, second)
    ]
    assert names[0] == names[1]
    assert first.pruning.scores == pytest.approx(second.pruning.scores, abs=1e-5)
    assert first.verdict == second.verdict
    # Of ranks: filters that are nearly equal may change places.
    assert first.detection_ratio == pytest.approx(second.detection_ratio, abs=ranks)


@pytest.fixture(scope="module")
def reference() -> Any:
    return lightning_mnp.defend(small_network(), data(), when="always", config=CONFIG)


def never_called(graph: Any, inputs: Any) -> Any:
    raise AssertionError("the network was compiled")


@pytest.mark.parametrize("way", ["torch.compile", "module.compile", "part"])
def test_compiled_networks_run_as_they_are_written(way: str, reference: Any) -> None:
    network: Any = small_network()
    if way == "torch.compile":
        network = torch.compile(network, backend=never_called)
    elif way == "module.compile":
        network.compile(backend=never_called)
    else:
        network[0] = torch.compile(network[0], backend=never_called)
    before = snapshot(network)
    report = lightning_mnp.defend(network, data(), when="always", config=CONFIG)
    assert same(before, snapshot(network))
    assert_like(report, reference)
    network.load_state_dict(report.model.state_dict(), strict=True)


def test_compiled_network_in_a_training(tmp_path: Path) -> None:
    network = torch.compile(small_network().train(), backend="eager")
    module = UserModule(network)  # type: ignore[arg-type]
    callback, _ = fit(tmp_path, module)
    assert_pruned(callback, module, tmp_path)
    images, _ = images_and_labels(4)
    # Compiled again after the pruning, it still runs.
    assert torch.equal(module.net(images).argmax(1), module.net._orig_mod(images).argmax(1))


def test_channels_last(tmp_path: Path, reference: Any) -> None:
    network: Any = small_network().to(memory_format=torch.channels_last)
    report = lightning_mnp.defend(network, data(), when="always", config=CONFIG)
    assert_like(report, reference, ranks=0.05)
    assert report.model[4].weight.is_contiguous(memory_format=torch.channels_last)
    path = tmp_path / "purified.safetensors"
    lightning_mnp.write_state_dict(path, report.model.state_dict())
    fresh = small_network()
    lightning_mnp.load_into(fresh, lightning_mnp.read_state_dict(path))
    assert torch.equal(fresh[4].weight, report.model[4].weight)


def precise(precision: Any, folder: Path, seen: set[Any] | None = None, **options: Any) -> Any:
    module = still(small_network())
    if seen is not None:
        module.net[4].register_forward_hook(lambda _, images, logits: seen.add(logits.dtype))
    callback, _ = fit(folder, module, precision=precision, **options)
    assert_pruned(callback, module, folder)
    return callback.report


def plainly_named(report: Any) -> Any:
    report.pruned = [(name.removeprefix("net."), index) for name, index in report.pruned]
    return report


def test_precision_32_true(tmp_path: Path, reference: Any) -> None:
    assert_like(plainly_named(precise("32-true", tmp_path)), reference)


def test_precision_bf16_mixed(tmp_path: Path, reference: Any) -> None:
    seen: set[torch.dtype] = set()
    report = precise("bf16-mixed", tmp_path, seen)
    assert report.accuracy_before == reference.accuracy_before
    assert report.pile_up == pytest.approx(reference.pile_up, abs=0.05)
    assert seen == {torch.bfloat16, torch.float32}  # the detection ratio is measured in the latter


def test_precision_16_mixed_audits_in_float32(
    tmp_path: Path, reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        report = precise(None, tmp_path, plugins=[plugin])
    assert_like(plainly_named(report), reference)
    assert "The audit runs in float32" in caplog.text


def test_precision_16_mixed_is_bf16_mixed_on_the_cpu(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        precise("16-mixed", tmp_path)


def test_precision_16_mixed_is_refused_by_the_module() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="32-true or bf16-mixed for MNPModule"):
        quiet_trainer(max_epochs=-1, plugins=[plugin]).fit(
            MNPModule(small_network(), CONFIG), data()
        )


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_other_precisions_are_refused(precision: Any, tmp_path: Path) -> None:
    match = f"keeps the weights in float32, .* but got {precision}"
    with pytest.raises(MisconfigurationException, match=match):
        fit(tmp_path, UserModule(small_network()), precision=precision)
    with pytest.raises(MisconfigurationException, match=match):
        quiet_trainer(max_epochs=-1, precision=precision).fit(
            MNPModule(small_network(), CONFIG), data()
        )


def test_no_code_is_for_cuda_only() -> None:
    """Devices come from the network; what is drawn is drawn on the CPU, the same everywhere."""
    for path in (REPOSITORY / "lightning_mnp").rglob("*.py"):
        text = path.read_text("utf-8")
        assert not re.search(r"\.cuda\(|device=[\"']cuda|\.to\([\"']cuda", text), path
        assert not re.search(r"Generator\(device|Generator\([\"']", text), path


def test_float64_is_used_on_the_cpu_only() -> None:
    """Apple's GPUs do not have it."""
    paths = list((REPOSITORY / "lightning_mnp").rglob("*.py"))
    assert len(paths) > 30
    for path in paths:
        text = path.read_text("utf-8")
        doubles = re.findall(r"\w[\w.()]*\.double\(\)", text)
        assert all(".cpu()" in each for each in doubles), (path, doubles)
        on_device = r"float64[^()]*\bdevice=|\bdevice=[^()]*float64|to\(torch\.float64"
        assert not re.search(on_device, text), path


def test_defense_set_draws_on_the_cpu_and_moves_what_is_drawn() -> None:
    defense_set = DefenseSet(*images_and_labels())
    device = torch.device("meta")  # takes tensors and computes nothing: no draw could be read
    images, labels = defense_set.batch(0, 16, device, "crop-flip", key=(0, "a test"))
    assert images.device == labels.device == device
    assert images.shape == (14, 1, 8, 8)


def test_removed_filters_masks_and_weights_are_those_of_the_first_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positions travel between processes as numbers, for each has a device of its own."""
    from lightning_mnp.hosting import lightning_host

    defense = MNPDefense(small_network(), DefenseSet(*images_and_labels()), CONFIG)
    while not defense.finished:
        defense.step()
    before = defense.purification.changes.removed
    masks = torch.rand(defense.case.masked.kernels.total)
    tuned = {"fc.weight": torch.rand(4, 3)}
    first: list[Any] = []
    for rank in (0, 1):
        # What this process has: of the first, it is sent and taken; of another, neither.
        defense.purification.changes.kernel_masks = masks + rank
        defense.purification.changes.tuned = {name: weight + rank for name, weight in tuned.items()}

        def gather(outcome: Any, rank: int = rank) -> list[Any]:
            if rank == 0:
                first.append(outcome)
            else:
                assert outcome[2:4] == (None, None)
            return [first[0], outcome]

        monkeypatch.setattr(lightning_host, "process_rank", lambda rank=rank: rank)
        monkeypatch.setattr(lightning_host, "gather_objects", gather)
        report = lightning_host.follow_first(defense)
        assert defense.purification.changes.tuned is not None
        assert defense.purification.changes.tuned["fc.weight"].equal(tuned["fc.weight"])
        assert defense.purification.changes.kernel_masks is not None
        assert defense.purification.changes.kernel_masks.equal(masks)
    assert torch.equal(before, defense.purification.changes.removed)
    assert defense.purification.changes.removed.device == before.device
    assert report.pruned == [defense.case.layers.locate(int(each)) for each in before]
