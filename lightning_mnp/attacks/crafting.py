"""How attacks compute with a clean network: where, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_mnp.attacks.reference import ReferenceNetwork
from lightning_mnp.surgery.precision import full_float32

__all__ = ["BATCH", "check_reference", "clean_network", "crafting", "fill_up", "scaled"]

BATCH = 64
"""Images that go through the network together, see :func:`fill_up`."""


def fill_up(count: int) -> Tensor:
    """Return the indices that fill a batch up to :data:`BATCH` images by repeating the last one.

    Sums over another batch size may differ in their last digit, and the sign of a gradient may
    change with it. An image's result would then depend on the images around it.

    Args:
        count: Number of images there are, from 1 to BATCH.

    Returns:
        Indices into these images, shape (BATCH,), on the CPU.

    Example:
        >>> fill_up(3)[:5]
        tensor([0, 1, 2, 2, 2])
    """
    return torch.arange(BATCH).clamp(max=count - 1)


def scaled(images: Tensor) -> Tensor:
    """Return images as float32 with values in [0, 1].

    Args:
        images: ``uint8``, or floating point with values in [0, 1].

    Example:
        >>> scaled(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([0., 1.])
    """
    return images.float() / 255.0 if images.dtype == torch.uint8 else images.float()


def check_reference(reference: object) -> None:
    """Raise an error if an argument `reference` is of another type.

    Args:
        reference: The attack's argument.

    Raises:
        ValueError: If it is neither a ReferenceNetwork nor None.
    """
    if reference is not None and not isinstance(reference, ReferenceNetwork):
        raise ValueError(
            f"Expected argument `reference` to be a ReferenceNetwork or None, but got "
            f"{reference!r:.80}."
        )


@contextmanager
def crafting() -> Iterator[torch.device]:
    """Compute gradients in float32, whatever mode the caller is in.

    The global random numbers of the CPU, from which a new network draws its weights, are as
    before afterwards.

    Yields:
        The device to compute on: an accelerator such as a GPU if there is one, else the CPU.

    Example:
        >>> with torch.inference_mode(), crafting():
        ...     torch.is_grad_enabled()
        True
    """
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    # Autocast of the CPU and of the accelerator; a Trainer in bf16 may have switched on either.
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False),
        full_float32(),
    ):
        yield device


def clean_network(reference: ReferenceNetwork | None, use: str, channels: int) -> nn.Sequential:
    """Read the reference network of an attack.

    Args:
        reference: The attack's argument.
        use: What the network is needed for, to complete "a ReferenceNetwork to ..." in an error.
        channels: Number of channels of the images.

    Returns:
        See :meth:`~lightning_mnp.attacks.reference.ReferenceNetwork.load`.

    Raises:
        ValueError: If the attack has none, or it takes images of other channels.
        CheckpointError: If its checkpoint cannot be read.
    """
    if reference is None:
        raise ValueError(
            f"Expected argument `reference` to be a ReferenceNetwork to {use}, but got None. "
            "Without it, success can be measured with a saved trigger."
        )
    if len(reference.mean) != channels:
        raise ValueError(
            f"Expected argument `reference` to take images of {channels} channels, as the data "
            f"has, but its `mean` has {len(reference.mean)} numbers."
        )
    return reference.load()
