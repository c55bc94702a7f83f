"""An image classifier as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils.data import DistributedSampler

from lightning_mnp.checkpoints.load import load_into
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.metrics import AttackSuccessRate, CleanAccuracy
from lightning_mnp.models.build import build_network
from lightning_mnp.models.head import classifier_head
from lightning_mnp.models.memory_format import fastest_format
from lightning_mnp.models.resnet import CifarResNet

__all__ = ["Classifier", "Schedule", "Trainable"]

Schedule = Literal["cosine", "onecycle", "none"]
Trainable = Literal["all", "head"]

# What torch calls x86 processors that compute in bf16 only by way of float32.
_WITHOUT_BF16 = ("NO AVX", "AVX2")


class Classifier(LightningModule):
    """Train a network by cross-entropy and SGD; log clean accuracy and attack success rate.

    Validation and test take the loaders of
    :class:`~lightning_mnp.data.datamodule.BackdoorDataModule`: the first one has clean images, and
    a second one, if any, has triggered images. It logs ``train/loss`` and, as shares from 0 to 1,
    ``val/CA``, ``val/ASR``, ``test/CA`` and ``test/ASR``. In a checkpoint, the network's weights
    have the prefix ``network.``.

    Args:
        network: The network to train; None to build one by name.
        architecture: See :func:`build_network`; not used with ``network``.
        num_classes: See :func:`build_network`; not used with ``network``.
        width: See :func:`build_network`; not used with ``network``.
        in_channels: See :func:`build_network`; not used with ``network``.
        lr: Learning rate of SGD, above 0; the highest one for a schedule.
        momentum: Momentum of SGD, from 0 to below 1.
        weight_decay: Weight decay of SGD, at least 0.
        schedule: How the learning rate changes with each step: ``"cosine"`` falls to 0,
            ``"onecycle"`` rises and falls, ``"none"`` stays.
        channels_last: Whether to keep images and weights in memory with the channels innermost.
            It makes a thin ResNet-18 train a quarter faster and slows some networks down. None for
            yes if one of this package's CIFAR networks is trained, and else no.
        checkpoint: File with the weights to start from, for fine-tuning: .ckpt, .pt, .pth or
            .safetensors of a network of the same shape. Only weights are read from it. None for
            the weights that the network has.
        trainable: ``"all"`` to train the whole network; ``"head"`` to train its last linear layer
            only. Everything before it is then fixed and in evaluation mode.

    Raises:
        ValueError: If an argument is out of range, or the network has no linear layer to train.
        CheckpointError: If the checkpoint is missing, damaged, or has other weights.

    Example:
        >>> classifier = Classifier(architecture="cifar_resnet18", width=4)
        >>> classifier(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        architecture: str = "cifar_resnet18",
        num_classes: int = 10,
        width: int = 64,
        in_channels: int = 3,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: Schedule = "cosine",
        channels_last: bool | None = None,
        checkpoint: Path | str | None = None,
        trainable: Trainable = "all",
    ) -> None:
        super().__init__()
        if not 0.0 < lr < math.inf:
            raise ValueError(f"Expected argument `lr` to be above 0, but got {lr}.")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(
                f"Expected argument `momentum` to be from 0 to below 1, but got {momentum}."
            )
        if not 0.0 <= weight_decay < math.inf:
            raise ValueError(
                f"Expected argument `weight_decay` to be at least 0, but got {weight_decay}."
            )
        if schedule not in get_args(Schedule):
            raise ValueError(
                f"Expected argument `schedule` to be one of {get_args(Schedule)}, but got "
                f"{schedule!r}."
            )
        if trainable not in get_args(Trainable):
            raise ValueError(
                f"Expected argument `trainable` to be one of {get_args(Trainable)}, but got "
                f"{trainable!r}."
            )
        # By name, so that only primitives reach the checkpoint, also when the CLI builds us; not
        # `checkpoint`, which a trained network no longer needs.
        self.save_hyperparameters(
            "architecture",
            "num_classes",
            "width",
            "in_channels",
            "lr",
            "momentum",
            "weight_decay",
            "schedule",
            "channels_last",
            "trainable",
        )
        if network is None:
            network = build_network(architecture, num_classes, width, in_channels)
        head = classifier_head(network) if trainable == "head" else None
        if checkpoint is not None:
            load_into(network, read_state_dict(Path(checkpoint).expanduser()))
        if head is not None:
            network.requires_grad_(False)
            head.requires_grad_(True)
        self._format = fastest_format(network)
        if channels_last:
            network = network.to(memory_format=self._format)
        self.network = network
        self.channels_last = channels_last
        self.trainable = trainable
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.val_accuracy = CleanAccuracy()
        self.val_success = AttackSuccessRate()
        self.test_accuracy = CleanAccuracy()
        self.test_success = AttackSuccessRate()

    def train(self, mode: bool = True) -> Classifier:
        """Set training or evaluation mode; what is not trained stays in evaluation mode.

        Args:
            mode: Whether to train.

        Returns:
            The module itself.
        """
        super().train(mode)
        if self.trainable == "head":
            self.network.eval()
            classifier_head(self.network).train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.

        Args:
            x: Images, shape (N, C, H, W), normalized.

        Returns:
            Shape (N, K).
        """
        if self.channels_last:
            x = x.contiguous(memory_format=self._format)
        logits: Tensor = self.network(x)
        return logits

    def configure_model(self) -> None:
        """Choose the memory format for training if the argument ``channels_last`` is None."""
        if self.channels_last is None and self.trainer.state.fn == TrainerFn.FITTING:
            self.channels_last = isinstance(self.network, CifarResNet)
            # So that a network built from the checkpoint computes the same to the last bit.
            self.hparams["channels_last"] = self.channels_last
            if self.channels_last:
                self.network.to(memory_format=self._format)

    def on_fit_start(self) -> None:
        """Say so if this CPU is slow at the precision."""
        bf16 = self.device.type == "cpu" and "bf16" in str(self.trainer.precision)
        if bf16 and torch.backends.cpu.get_cpu_capability() in _WITHOUT_BF16:
            rank_zero_info(
                f"This CPU has no instructions for {self.trainer.precision}, which takes about ten "
                "times as long as float32 here: use `--trainer.precision 32-true`."
            )

    def on_train_start(self) -> None:
        """Put what is not trained into evaluation mode; Lightning leaves modes as they were."""
        if self.trainable == "head":
            self.train()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch (images, labels)."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(
        self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count hits: clean images in the first loader, triggered ones in the second."""
        counted = _counted(self.trainer.val_dataloaders, batch, batch_idx, dataloader_idx)
        self._evaluate("val", self.val_accuracy, self.val_success, batch, dataloader_idx, counted)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count hits: clean images in the first loader, triggered ones in the second."""
        counted = _counted(self.trainer.test_dataloaders, batch, batch_idx, dataloader_idx)
        self._evaluate(
            "test", self.test_accuracy, self.test_success, batch, dataloader_idx, counted
        )

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the classes of images, or of a batch that begins with images; shape (N,)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        classes: Tensor = self(images).argmax(1)
        return classes

    def _evaluate(
        self,
        stage: str,
        accuracy: CleanAccuracy,
        success: AttackSuccessRate,
        batch: Sequence[Tensor],
        dataloader_idx: int,
        counted: int,
    ) -> None:
        logits = self(batch[0])[:counted]
        count = len(batch[0])
        options: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "add_dataloader_idx": False,
            "batch_size": count,
            "prog_bar": True,
        }
        if dataloader_idx == 0:
            accuracy.update(logits, batch[1][:counted])
            self.log(f"{stage}/CA", accuracy, **options)
        else:
            success.update(logits, batch[1][:counted], batch[2][:counted])
            self.log(f"{stage}/ASR", success, **options)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD and the schedule, which makes a step with every batch.

        Raises:
            ValueError: If there is a schedule and the Trainer's number of steps is not known.
        """
        optimizer = torch.optim.SGD(
            self.network.parameters(),
            self.lr,
            self.momentum,
            weight_decay=self.weight_decay,
        )
        if self.schedule == "none":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                f"Expected argument `schedule` to be 'none' where training has no end, but got "
                f"{self.schedule!r}. Or set the Trainer's `max_epochs` or `max_steps`."
            )
        scheduler: LRScheduler
        if self.schedule == "cosine":
            scheduler = CosineAnnealingLR(optimizer, max(int(steps), 1))
        else:
            scheduler = OneCycleLR(
                optimizer, self.lr, max(int(steps), 1), cycle_momentum=self.momentum > 0
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def _counted(loaders: Any, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int) -> int:
    """Return how many images of a batch count.

    Lightning's sampler repeats the first images at the end, so that all processes get the same
    number. These count in the process that has them first.
    """
    loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or size is None:
        return len(batch[0])
    total = len(cast(Sized, sampler.dataset))
    own = math.ceil((total - sampler.rank) / sampler.num_replicas)
    return min(max(own - batch_idx * int(size), 0), len(batch[0]))
