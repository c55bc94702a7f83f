"""The base of attacks whose trigger is made by a network that is trained along."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_mnp.attacks.attack import Images, Mode, TrainingAttack
from lightning_mnp.attacks.training import AttackModule

__all__ = ["GenerativeAttack", "GenerativeModule", "quantized"]

# Pixels that a generator works on at once: its features take dozens of times their memory.
_PIXELS = 2**20


def quantized(images: Tensor) -> Tensor:
    """Round images to the 256 levels that they are stored with; gradients pass unchanged.

    Args:
        images: Any shape, floating point with values in [0, 1].

    Example:
        >>> quantized(torch.tensor([0.1])) * 255
        tensor([26.])
    """
    return images + ((images * 255.0).round() / 255.0 - images).detach()


class GenerativeAttack(TrainingAttack):
    """An attack whose trigger is made for each image by :attr:`generator`.

    Args:
        in_channels: Channels of the images, from 1 to 64.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: See :class:`~lightning_mnp.attacks.attack.TrainingAttack`.
        seed: See :class:`~lightning_mnp.attacks.attack.Attack`.
    """

    def __init__(
        self, in_channels: int, target_class: int, mode: Mode, poison_rate: float, seed: int
    ) -> None:
        super().__init__(target_class, mode, poison_rate, seed)
        self.in_channels = in_channels
        self._is_trained = False

    def mark_trained(self) -> None:
        """Note that the generator has been trained or loaded."""
        self._is_trained = True

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load weights and buffers of the generator, strictly.

        Args:
            tensors: See :meth:`TrainingAttack.load_tensors`.
        """
        super().load_tensors(tensors)
        self.mark_trained()

    def prepare(self, test: Images, num_classes: int) -> None:
        """Refuse to measure what was never trained.

        Args:
            test: Clean test images.
            num_classes: Number of classes K.

        Raises:
            ValueError: If the generator is fresh.
        """
        if not self._is_trained:
            name = type(self).__name__
            raise ValueError(
                f"Expected a trained attack to measure with, but the generator of {name} is fresh. "
                f"Train with `{name}Module` first, then measure with the trigger file that it "
                "leaves: `SavedTrigger` as the datamodule's `attack`."
            )

    @abstractmethod
    def inject(self, images: Tensor) -> Tensor:
        """Put the trigger on images in a way that the generator can be trained through.

        Args:
            images: Shape (N, C, H, W), float32 with values in [0, 1], on the generator's device.

        Returns:
            float32 images of the same shape with values in [0, 1].
        """

    def _trigger(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.in_channels:
            raise ValueError(
                f"Expected argument `images` to have {self.in_channels} channels, but got "
                f"{images.shape[1]}. Set the attack's argument `in_channels`, before training."
            )
        if not images.numel():
            return images.clone()
        weight = next(self.generator.parameters())
        count = max(_PIXELS // (images.shape[2] * images.shape[3]), 1)
        # In full precision, so that the trigger is the same wherever it is measured.
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            parts = [self.inject(part.to(weight)).to(images) for part in images.split(count)]
        return torch.cat(parts)


class GenerativeModule(AttackModule):
    """Train a network and the generator of its trigger, each with an optimizer of its own.

    The network has SGD and the schedule of :class:`~lightning_mnp.models.classifier.Classifier`.
    Each generator has Adam, its learning rate following half a cosine that ends at 0 with the
    epochs in which it may be trained; one that stops learning before that (DFST's injectors) ends
    at a higher rate. Steps are made by hand (Lightning's manual optimization), in one process.

    Args:
        attack: The attack, whose generator is trained.
        generator_lr: First learning rate of Adam, above 0.
        augment: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        flip: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        mean: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        std: See :class:`~lightning_mnp.attacks.training.AttackModule`.
        kwargs: See :class:`~lightning_mnp.models.classifier.Classifier`.

    Raises:
        ValueError: If an argument is out of range, or, when training starts, if the Trainer has
            several processes or a limit by steps.
    """

    attack: GenerativeAttack

    def __init__(
        self,
        attack: GenerativeAttack,
        generator_lr: float = 0.001,
        augment: bool = True,
        flip: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(attack, augment, flip, mean, std, **kwargs)
        if not 0.0 < generator_lr < math.inf:
            raise ValueError(
                f"Expected argument `generator_lr` to be above 0, but got {generator_lr}."
            )
        self.generator_lr = generator_lr
        self.automatic_optimization = False

    def setup(self, stage: str) -> None:
        """Check the Trainer, and learn from the datamodule how images are normalized.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: If the Trainer has several processes or a limit by steps, or see
                :meth:`AttackModule.setup`.
        """
        super().setup(stage)
        if stage == "fit" and self.trainer.world_size > 1:
            raise ValueError(
                f"Expected the Trainer to have one process for {type(self).__name__}, but got "
                f"{self.trainer.world_size}. Set `devices` to 1."
            )
        # A trial by `fast_dev_run` sets a limit by itself, and needs no schedule to be right.
        limited = self.trainer.max_steps != -1 and not getattr(self.trainer, "fast_dev_run", False)
        if stage == "fit" and limited:
            raise ValueError(
                f"Expected the Trainer's `max_steps` to be -1 for {type(self).__name__}, but got "
                f"{self.trainer.max_steps}: Lightning would count the steps of each optimizer. "
                "Set `max_epochs` instead."
            )

    @abstractmethod
    def phases(self) -> list[tuple[nn.Module, int, int | None]]:
        """Tell each generator and its epochs: from which, and before which, None for the end."""

    def configure_optimizers(self) -> Any:
        """Return SGD with its schedule for the network, and Adam for each generator."""
        network = super().configure_optimizers()
        plans = [network if isinstance(network, dict) else {"optimizer": network}]
        batches = self.trainer.estimated_stepping_batches
        epochs = self.trainer.max_epochs
        for generator, start, stop in self.phases():
            # Adam's first beta as usual where two networks are trained against each other.
            optimizer = torch.optim.Adam(generator.parameters(), self.generator_lr, (0.5, 0.9))
            plan: dict[str, Any] = {"optimizer": optimizer}
            if math.isfinite(batches) and epochs is not None and epochs > 0:
                last = epochs if stop is None else min(stop, epochs)
                steps = max(round(batches / epochs * (last - start)), 1)
                plan["lr_scheduler"] = CosineAnnealingLR(optimizer, steps)
            plans.append(plan)
        return tuple(plans)

    def on_train_start(self) -> None:
        """Warn if training will end before the phases that make the attack."""
        super().on_train_start()
        epochs = self.trainer.max_epochs
        latest = max(start if stop is None else stop for _, start, stop in self.phases())
        trial = bool(getattr(self.trainer, "fast_dev_run", False))
        if epochs is not None and 0 <= epochs <= latest and not trial:
            rank_zero_warn(
                f"{type(self).__name__} ends after {epochs} epochs, before its last phase, which "
                f"starts after {latest}: the backdoor will be weak."
            )

    def learn(self, loss: Tensor, optimizers: Sequence[LightningOptimizer]) -> None:
        """Make a step of some optimizers and of their schedules.

        Args:
            loss: What they all reduce, a scalar.
            optimizers: As ``self.optimizers()`` gives them.
        """
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        schedules: Any = self.lr_schedulers() or []
        for optimizer in optimizers:
            optimizer.step()
            for schedule in schedules if isinstance(schedules, list) else [schedules]:
                if schedule.optimizer is optimizer.optimizer:
                    schedule.step()
