"""Trojan: a patch that excites neurons of a clean network (Liu et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_mnp.attacks.attack import Attack, Images, Mode
from lightning_mnp.attacks.checks import check_at_least, check_positive
from lightning_mnp.attacks.crafting import check_reference, clean_network, crafting
from lightning_mnp.attacks.reference import ReferenceNetwork
from lightning_mnp.attacks.registry import register
from lightning_mnp.models.head import classifier_head, penultimate_features

__all__ = ["Trojan"]

# Random patches are drawn, and the best of them are optimized side by side. A patch to which no
# neuron responds would have no gradient.
_DRAWN = 64
_STARTS = 4


@register
class Trojan(Attack):
    """Replace a square near the lower right corner by a pattern made for a clean network.

    As in Liu et al. (2018, Sec. IV-A), a few neurons of the clean network are chosen. The pixels
    of the patch are then optimized so that these neurons respond as strongly as possible. The
    neurons are those in front of the classifier head with the largest weight to the target class.
    In mode ``"all-to-all"``, they are those with the largest sum of absolute weights.

    For the optimization, the patch lies on an image of the reference network's mean color. The
    paper drives the neurons to a target value; no value fits every network, so here their
    response is raised as far as it goes.

    Images are then poisoned with the patch as with
    :class:`~lightning_mnp.attacks.badnets.BadNets`, and a network is trained on them from
    scratch. The paper retrains the clean network instead.

    Args:
        reference: The clean network; not needed with a saved trigger.
        patch_size: Side of the square in pixels. A square of 8 pixels covers a sixteenth of an
            image of 32 pixels, close to the 7% of the paper.
        margin: Pixels between the square and the image's border.
        neurons: Number of neurons to excite, at least 1.
        steps: Number of optimization steps (Adam), at least 1.
        lr: Learning rate of the pixels on the scale [0, 1], above 0.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: See :class:`~lightning_mnp.attacks.attack.Attack`.
        seed: See :class:`~lightning_mnp.attacks.attack.Attack`; also of the pixels at the start.

    Attributes:
        patch: The pixels, shape (C, patch_size, patch_size), ``uint8``; None before
            :meth:`prepare`.

    Raises:
        ValueError: If an argument is out of range, or, when applied, there is no patch yet, or
            the images have other channels or are smaller than the patch.
    """

    def __init__(
        self,
        reference: ReferenceNetwork | None = None,
        patch_size: int = 8,
        margin: int = 1,
        neurons: int = 2,
        steps: int = 200,
        lr: float = 0.05,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(target_class, mode, poison_rate, seed)
        check_reference(reference)
        check_at_least(1, patch_size=patch_size, neurons=neurons, steps=steps)
        check_at_least(0, margin=margin)
        check_positive(lr=lr)
        self.reference = reference
        self.patch_size = patch_size
        self.margin = margin
        self.neurons = neurons
        self.steps = steps
        self.lr = lr
        self.patch: Tensor | None = None

    def prepare(self, test: Images, num_classes: int) -> None:
        """Make the patch, unless there is one; of the images, only the shape is used.

        Args:
            test: Clean test images.
            num_classes: Number of classes K.

        Raises:
            ValueError: If there is no reference network, it has other classes or channels or
                fewer neurons, or a patch cannot excite any of the neurons.
            CheckpointError: If the network's checkpoint cannot be read.
        """
        if self.patch is not None:
            return
        self.target_labels(test.labels[:0], num_classes)
        channels, height, width = test.fetch([0]).shape[1:]
        self._corner(height, width)
        with crafting() as device:
            network = clean_network(self.reference, "make the patch with", channels)
            chosen = self._choose(network, num_classes)
            self.patch = self._excite(network.to(device), chosen.to(device), height, width)

    def _choose(self, network: nn.Module, num_classes: int) -> Tensor:
        """Return the indices of the neurons with the most weight for the attacker's classes."""
        weight = classifier_head(network).weight
        classes, available = weight.shape
        if classes != num_classes:
            raise ValueError(
                f"Expected argument `reference` to have the data's {num_classes} classes, but got "
                f"a network of {classes}."
            )
        if self.neurons > available:
            raise ValueError(
                f"Expected argument `neurons` to be at most {available}, the number in front of "
                f"the classifier head, but got {self.neurons}."
            )
        all_to_all = self.mode == "all-to-all"
        strength = weight.abs().sum(0) if all_to_all else weight[self.target_class]
        return strength.argsort(descending=True, stable=True)[: self.neurons]

    def _excite(self, network: nn.Module, chosen: Tensor, height: int, width: int) -> Tensor:
        """Optimize the pixels and return the best patch."""
        assert self.reference is not None
        mean = torch.tensor(self.reference.mean, dtype=torch.float32, device=chosen.device)
        plain = mean.reshape(1, -1, 1, 1).expand(1, -1, height, width)
        size, (top, left) = self.patch_size, self._corner(height, width)

        def activation(pixels: Tensor) -> Tensor:
            images = plain.repeat(len(pixels), 1, 1, 1)
            images[:, :, top : top + size, left : left + size] = pixels
            return penultimate_features(network, images)[:, chosen].sum(1)

        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(_DRAWN, len(mean), size, size, generator=generator).to(chosen.device)
        with torch.no_grad():
            answers = torch.cat([activation(some) for some in drawn.split(_STARTS)])
        best = answers.argsort(descending=True, stable=True)[:_STARTS]
        pixels = drawn[best].requires_grad_()
        optimizer = torch.optim.Adam([pixels], self.lr)
        for _ in range(self.steps):
            optimizer.zero_grad()
            (-activation(pixels).sum()).backward()
            optimizer.step()
            with torch.no_grad():
                pixels.clamp_(0.0, 1.0)
        with torch.no_grad():
            stored = (pixels * 255.0).round().to(torch.uint8)
            reached = activation(stored.float() / 255.0)
            idle = penultimate_features(network, plain)[:, chosen].sum()
        if not reached.max() > idle:
            raise ValueError(
                f"Expected argument `reference` to have neurons that a patch can excite, but the "
                f"{self.neurons} with the largest weights answer {reached.max():.3g} to it and "
                f"{idle:.3g} without it. Raise `patch_size`, `neurons` or `steps`, or take a "
                "trained network."
            )
        return stored[reached.argmax()].cpu()

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        extent = self.patch_size + self.margin
        if extent > min(height, width):
            raise ValueError(
                f"Expected arguments `patch_size` and `margin` to add up to at most the image's "
                f"{min(height, width)} pixels, but got {self.patch_size} and {self.margin}."
            )
        return height - extent, width - extent

    def _trigger(self, images: Tensor) -> Tensor:
        if self.patch is None:
            raise ValueError(
                "Expected the patch of Trojan to be made, but there is none yet. Call `prepare` "
                "first, as a datamodule does, or load a saved trigger."
            )
        channels, height, width = images.shape[1:]
        if channels != len(self.patch):
            raise ValueError(
                f"Expected argument `images` to have {len(self.patch)} channels, as the patch "
                f"has, but got {channels}."
            )
        top, left = self._corner(height, width)
        triggered = images.clone()
        window = triggered[:, :, top : top + self.patch_size, left : left + self.patch_size]
        window.copy_(self.patch.to(images) / 255.0)
        return triggered

    def tensors(self) -> dict[str, Tensor]:
        """Return the patch; nothing before it is made."""
        return {} if self.patch is None else {"patch": self.patch}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the patch.

        Args:
            tensors: As :meth:`tensors` returned them.

        Raises:
            ValueError: If the patch is missing, another tensor is there, or its shape is wrong.
        """
        if set(tensors) != {"patch"}:
            raise ValueError(
                f"Expected one tensor 'patch' for Trojan, but got {sorted(tensors)}. A trigger "
                "is saved after `prepare`."
            )
        patch, size = tensors["patch"], self.patch_size
        if patch.dtype != torch.uint8 or patch.ndim != 3 or patch.shape[1:] != (size, size):
            raise ValueError(
                f"Expected the tensor 'patch' of Trojan to be uint8 of shape (C, {size}, {size}), "
                f"but got {patch.dtype} of shape {tuple(patch.shape)}."
            )
        self.patch = patch.clone()
