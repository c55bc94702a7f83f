"""The base of attacks whose trigger is made by a network, trained with the classifier."""

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
from lightning_mnp.attacks.checks import check_positive
from lightning_mnp.attacks.training import AttackModule
from lightning_mnp.surgery.precision import full_float32

__all__ = ["GenerativeAttack", "GenerativeModule"]

# Pixels that a generator works on at once: its features take dozens of times their memory.
_PIXELS = 2**20


class GenerativeAttack(TrainingAttack):
    """An attack whose :attr:`generator` makes a trigger for each image.

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
        """Note that the generator is trained or loaded."""
        self._is_trained = True

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load all weights and buffers of the generator.

        Args:
            tensors: See :meth:`TrainingAttack.load_tensors`.
        """
        super().load_tensors(tensors)
        self.mark_trained()

    def prepare(self, test: Images, num_classes: int) -> None:
        """Raise an error if the generator was never trained.

        Args:
            test: Clean test images.
            num_classes: Number of classes K.

        Raises:
            ValueError: If the generator has its fresh weights.
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
        """Return images with the trigger, with gradients for the generator.

        Args:
            images: Shape (N, C, H, W), float32 with values in [0, 1], on the generator's device.

        Returns:
            float32 images of the same shape, with values in [0, 1] if the attack is
            :attr:`~lightning_mnp.attacks.attack.Attack.storable`.
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
        # In full precision, so the trigger is the same wherever it is measured.
        autocast = torch.autocast(weight.device.type, enabled=False)
        with torch.no_grad(), autocast, full_float32():
            parts = [self.inject(part.to(weight)).to(images) for part in images.split(count)]
        return torch.cat(parts)


class GenerativeModule(AttackModule):
    """Train a network and the generator of its trigger, each with an optimizer of its own.

    The network has SGD and the schedule of :class:`~lightning_mnp.models.classifier.Classifier`.
    Each generator has Adam. Its learning rate falls by half a cosine to 0 over the epochs in
    which it may be trained. A generator that is not trained in all of them, such as DFST's
    injectors, ends at a higher rate. The module makes the steps itself (Lightning's manual
    optimization), in one process.

    Args:
        attack: The attack, whose generator is trained.
        generator_lr: First learning rate of Adam, above 0.
        kwargs: See :class:`~lightning_mnp.attacks.training.AttackModule`.

    Raises:
        ValueError: If an argument is out of range. When training starts, if the Trainer has
            several processes or a limit by steps.
    """

    attack: GenerativeAttack

    def __init__(
        self,
        attack: GenerativeAttack,
        generator_lr: float = 0.001,
        **kwargs: Any,
    ) -> None:
        super().__init__(attack, **kwargs)
        check_positive(generator_lr=generator_lr)
        self.generator_lr = generator_lr
        self.automatic_optimization = False

    def setup(self, stage: str) -> None:
        """Check the Trainer, and ask the datamodule how images are normalized.

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
        # `fast_dev_run` sets a limit of its own, and its schedule does not matter.
        limited = self.trainer.max_steps != -1 and not getattr(self.trainer, "fast_dev_run", False)
        if stage == "fit" and limited:
            raise ValueError(
                f"Expected the Trainer's `max_steps` to be -1 for {type(self).__name__}, but got "
                f"{self.trainer.max_steps}: Lightning would count the steps of each optimizer. "
                "Set `max_epochs` instead."
            )

    @abstractmethod
    def phases(self) -> list[tuple[nn.Module, int, int | None]]:
        """Return each generator with the epochs in which it is trained.

        Returns:
            For each generator: the module, its first epoch, and the epoch after its last, which is
            None if it is trained until the end.
        """

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
        """Warn if training ends before the attack's last phase."""
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

        Only the weights of these optimizers get gradients.

        Args:
            loss: What they all reduce, a scalar.
            optimizers: Some of those that ``self.optimizers()`` returns.
        """
        weights = []
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                weights += [weight for weight in group["params"] if weight.requires_grad]
        self.manual_backward(loss, inputs=weights)
        schedules: Any = self.lr_schedulers() or []
        for optimizer in optimizers:
            optimizer.step()
            for schedule in schedules if isinstance(schedules, list) else [schedules]:
                if schedule.optimizer is optimizer.optimizer:
                    schedule.step()
