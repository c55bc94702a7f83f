"""CL: hard target-class images with patches in the corners (Turner et al., 2019)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp.attacks.attack import CleanLabelAttack
from lightning_mnp.attacks.checks import check_at_least, check_choice, check_positive, check_share
from lightning_mnp.attacks.crafting import (
    BATCH,
    check_reference,
    clean_network,
    crafting,
    fill_up,
    scaled,
)
from lightning_mnp.attacks.reference import ReferenceNetwork
from lightning_mnp.attacks.registry import register
from lightning_mnp.models.memory_format import fastest_format

__all__ = ["CL", "CornerPattern", "Norm"]

Norm = Literal["linf", "l2"]
CornerPattern = Literal["published", "checkerboard"]

# Turner et al.'s pattern in the left corners, 1 white and -1 black; the right ones mirror it.
_PUBLISHED = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (1.0, -1.0, 1.0))


@register
class CL(CleanLabelAttack):
    """Put patches in the corners of adversarial images (label-consistent, Turner et al., 2019).

    Only images of the target class are poisoned, and their labels stay. First, each image is
    changed within a small norm ball so that a clean network does not recognize its class. This is
    projected gradient ascent on the cross-entropy of the true label. Then a patch is put into
    each of the four corners. What the image shows does not help to tell its class any more, so a
    network that is trained on it learns the patches.

    The right corners mirror the left ones, so that the trigger of a mirrored image is the same.
    Test images get the patches at full strength and no other change.

    Args:
        reference: The clean network; not needed with a saved trigger.
        eps: Radius of the ball, on the scale [0, 1], above 0. Stored images keep to it, too: if
            rounding to 8 bits would leave the ball, the change is rounded towards 0.
        norm: ``"linf"`` bounds the change of each value by ``eps``; ``"l2"`` bounds the Euclidean
            norm of the change over all values of an image.
        steps: Number of gradient steps, at least 1.
        step_size: Length of a step, above 0; 2.5 * eps / steps if None. With this, the ascent can
            reach the border of the ball from any point in it (Madry et al., 2018).
        patch_size: Side of each patch in pixels; a multiple of 3 for the published pattern.
        margin: Pixels between the patches and the image's border; 0 as published.
        pattern: ``"published"`` is the pattern of 3 x 3 squares in the authors' code, the same in
            the upper and the lower corners; ``"checkerboard"`` alternates black and white pixels,
            with a white one in the corner, and the lower corners mirror the upper ones.
        amplitude: Strength of the patches in training, above 0 and at most 1: how much is added
            to white pixels of the pattern and taken from black ones. 1 replaces the pixels.
        target_class: See :class:`~lightning_mnp.attacks.attack.CleanLabelAttack`.
        class_rate: See :class:`~lightning_mnp.attacks.attack.CleanLabelAttack`.
        seed: See :class:`~lightning_mnp.attacks.attack.CleanLabelAttack`; also of the points in
            the ball where the ascent starts.

    Raises:
        ValueError: If an argument is out of range, or, when applied, the patches overlap.

    Example:
        >>> CL().apply(torch.full((1, 1, 6, 7), 0.5))[0, 0, :3]
        tensor([[1.0000, 0.0000, 0.0000, 0.5000, 0.0000, 0.0000, 1.0000],
                [0.0000, 1.0000, 0.0000, 0.5000, 0.0000, 1.0000, 0.0000],
                [1.0000, 0.0000, 1.0000, 0.5000, 1.0000, 0.0000, 1.0000]])
    """

    crafts = True

    def __init__(
        self,
        reference: ReferenceNetwork | None = None,
        eps: float = 16 / 255,
        norm: Norm = "linf",
        steps: int = 10,
        step_size: float | None = None,
        patch_size: int = 3,
        margin: int = 0,
        pattern: CornerPattern = "published",
        amplitude: float = 1.0,
        target_class: int = 0,
        class_rate: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__(target_class, class_rate, seed)
        check_reference(reference)
        check_positive(eps=eps)
        check_choice(get_args(Norm), norm=norm)
        check_choice(get_args(CornerPattern), pattern=pattern)
        check_at_least(1, steps=steps, patch_size=patch_size)
        check_at_least(0, margin=margin)
        if step_size is not None and not 0.0 < step_size < math.inf:
            raise ValueError(
                f"Expected argument `step_size` to be above 0 or None, but got {step_size}."
            )
        check_share(amplitude=amplitude)
        if pattern == "published" and patch_size % 3:
            raise ValueError(
                "Expected argument `patch_size` to be a multiple of 3 for the published pattern of "
                f"3 x 3 squares, but got {patch_size}. Or set `pattern` to 'checkerboard'."
            )
        self.reference = reference
        self.eps = eps
        self.norm = norm
        self.steps = steps
        self.step_size = step_size
        self.patch_size = patch_size
        self.margin = margin
        self.pattern = pattern
        self.amplitude = amplitude

    def poison(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Perturb training images and put the patches on.

        Args:
            images: Shape (N, C, H, W), ``uint8`` or floating point with values in [0, 1].
            labels: Their true classes, shape (N,).
            indices: Their indices in the training set, shape (N,). The start of an image's ascent
                depends on its index and the seed only.

        Returns:
            New images of the same shape, dtype and device.

        Raises:
            ValueError: See :meth:`perturb`.
            CheckpointError: If the network's checkpoint cannot be read.
        """
        perturbed = self.perturb(images, labels, indices)
        stamped = self._stamp(scaled(perturbed), self.amplitude)
        if images.dtype == torch.uint8:
            return (stamped * 255.0).round().to(torch.uint8)
        return stamped.to(images.dtype)

    def perturb(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Make images hard to recognize within the norm ball; no patches are put on.

        Args:
            images: See :meth:`poison`.
            labels: See :meth:`poison`.
            indices: See :meth:`poison`.

        Returns:
            New images of the same shape, dtype and device.

        Raises:
            ValueError: If there is no reference network, it takes images of other channels or has
                no such class, or the images have another shape, dtype or range.
            CheckpointError: If the network's checkpoint cannot be read.
        """
        self.apply(images)  # checks the images as for any attack, and that the patches fit
        if not len(images) == len(labels) == len(indices):
            raise ValueError(
                "Expected arguments `images`, `labels` and `indices` to have the same length, but "
                f"got {len(images)}, {len(labels)} and {len(indices)}."
            )
        if not len(images):
            return images.clone()
        with crafting() as device:
            network = clean_network(self.reference, "perturb images with", images.shape[1])
            network = network.to(device, memory_format=fastest_format(network))  # type: ignore[call-overload]
            clean = scaled(images)
            parts = [
                self._ascend(network, some, classes, places).to(images.device)
                for some, classes, places in zip(
                    clean.split(BATCH), labels.split(BATCH), indices.split(BATCH), strict=True
                )
            ]
            change = torch.cat(parts)
        if images.dtype == torch.uint8:
            return (images.float() + self._whole_levels(change)).to(torch.uint8)
        return (clean + change).clamp(0.0, 1.0).to(images.dtype)

    def _ascend(self, network: nn.Module, images: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        """Return the changes of up to a batch of images; images do not influence each other."""
        device, count = next(network.parameters()).device, len(images)
        filled = fill_up(count)
        start = torch.stack([self._start(images.shape[1:], int(place)) for place in places])
        base, labels = images.cpu()[filled].to(device), labels.cpu()[filled].to(device)
        step = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        change = self._allowed(start[filled].to(device), base)
        layout = fastest_format(network)
        for _ in range(self.steps):
            change.requires_grad_()
            logits = network((base + change).contiguous(memory_format=layout))
            if int(labels.max()) >= logits.shape[1]:
                raise ValueError(
                    f"Expected argument `reference` to know the class {int(labels.max())}, but got "
                    f"a network of {logits.shape[1]} classes."
                )
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, change)
            if self.norm == "linf":
                direction = gradient.sign()
            else:
                direction = gradient / _length(gradient).clamp_min(1e-12)
            change = self._allowed(change.detach() + step * direction, base)
        return change[:count]

    def _start(self, shape: torch.Size, place: int) -> Tensor:
        """Draw a point in the ball for the image at this index of the training set."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) % 2**63)
        if self.norm == "linf":
            return self.eps * (2.0 * torch.rand(shape, generator=generator) - 1.0)
        direction = torch.randn((1, *shape), generator=generator)
        radius = self.eps * torch.rand(1, generator=generator)
        return (radius * direction / _length(direction))[0]

    def _allowed(self, change: Tensor, images: Tensor) -> Tensor:
        """Return the changes brought back into the ball and into the range of images."""
        if self.norm == "linf":
            change = change.clamp(-self.eps, self.eps)
        else:
            change = change * (self.eps / _length(change).clamp_min(1e-12)).clamp_max(1.0)
        # Cutting off at 0 and 1 shortens a change, so it stays in the ball.
        return (images + change).clamp(0.0, 1.0) - images

    def _whole_levels(self, change: Tensor) -> Tensor:
        """Return changes in whole steps of 1/255 that do not leave the ball."""
        levels = change * 255.0
        nearest = levels.round()
        bound = self.eps * 255.0 * (1.0 + 1e-6)  # eps = 16/255 has to allow 16 levels
        outside = nearest.abs() > bound if self.norm == "linf" else _length(nearest) > bound
        return torch.where(outside, levels.trunc(), nearest)

    def _stamp(self, images: Tensor, amplitude: float) -> Tensor:
        height, width = images.shape[-2:]
        extent, size = self.patch_size + self.margin, self.patch_size
        if 2 * extent > min(height, width):
            raise ValueError(
                f"Expected arguments `patch_size` and `margin` to add up to at most half of the "
                f"image's {min(height, width)} pixels, so that the patches do not overlap, but "
                f"got {size} and {self.margin}."
            )
        published = self.pattern == "published"
        patch = _published(size) if published else _checkerboard(size)
        shift = torch.zeros(height, width)
        shift[self.margin : extent, self.margin : extent] = patch
        lower = patch if published else patch.flip(0)
        shift[height - extent : height - self.margin, self.margin : extent] = lower
        shift = shift + shift.flip(1)
        return (images + amplitude * shift.to(images)).clamp(0.0, 1.0)

    def _trigger(self, images: Tensor) -> Tensor:
        return self._stamp(images, 1.0)


def _published(size: int) -> Tensor:
    """Return the published pattern, its 3 x 3 squares enlarged to this many pixels a side."""
    squares = torch.tensor(_PUBLISHED).repeat_interleave(size // 3, 0)
    return squares.repeat_interleave(size // 3, 1)


def _checkerboard(size: int) -> Tensor:
    """Return single pixels, by turns 1 for white and -1 for black, starting with white."""
    index = torch.arange(size)
    return 1.0 - 2.0 * ((index[:, None] + index[None]) % 2).float()


def _length(change: Tensor) -> Tensor:
    """Return the Euclidean norm of each image's change, shape (N, 1, 1, 1)."""
    return change.square().sum((1, 2, 3), keepdim=True).sqrt()
