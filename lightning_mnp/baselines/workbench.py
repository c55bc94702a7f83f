"""A network, a copy of it to work on, and clean images: what every baseline begins with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_mnp.defense_data.augment import Augmentation
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.surgery.forward import Forward, evaluating, find_logits
from lightning_mnp.surgery.guards import (
    refuse_quantized,
    refuse_scripts,
    refuse_wrappers,
    require_module,
    running_alone,
    unchanged_on_error,
)
from lightning_mnp.surgery.network import (
    check_copy,
    check_network,
    copy_network,
    network_forward,
)

__all__ = ["Workbench", "require_finite"]


def require_finite(values: Tensor, what: str, remedy: str) -> None:
    """Raise if numbers of a run hold NaN or infinity.

    Args:
        values: The numbers, any shape.
        what: What they are and where in the run, for the message.
        remedy: What the user can do about it: a sentence.

    Raises:
        ArithmeticError: If a number is NaN or infinite.

    Example:
        >>> require_finite(torch.tensor(0.7), "the loss in pass 1", "Lower `lr`.")
    """
    if not bool(torch.isfinite(values).all()):
        found = f"it is {float(values.detach())}" if values.numel() == 1 else "some of it is not"
        raise ArithmeticError(f"Expected {what} to be finite, but {found}. {remedy}")


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Let layers that draw, such as dropout, draw by a seed, until the context ends.

    They draw from the generators of the CPU and of the network's device. These are put back in the
    end. `torch.manual_seed` would seed those of all other devices as well, which are the user's.
    """
    devices = [device] if device.type in ("cuda", "mps") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


class _Options(Protocol):
    """What the options of every baseline that trains say of its batches."""

    @property
    def seed(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def augment(self) -> Augmentation: ...


class Workbench:
    """Checks a network against a defense set, and holds a copy that a baseline may change.

    Args:
        model: The network, or a module around it, on the device to work on; it is never changed.
        loader: Yields batches of clean, labeled images as the network takes them; or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`.
        seed: Seed of all that is drawn.
        batch_size: Most images in a batch; the batches of a pass are of equal size.
        augment: How images are changed: ``"none"``, ``"crop"`` or ``"crop-flip"``.
        forward: A function (network, images) that calls the network and returns logits, or
            something that holds them.
        network: Dotted name of the submodule that classifies, if the model has no ``forward``.
        unpack: A function (batch) that returns images and labels.

    Attributes:
        model: The network as it is.
        copy: The copy to work on.
        data: The defense set.
        call: How both are called.
        classes: Number of classes.
        device: Where both are.

    Raises:
        ValueError: If the model cannot be copied, or the model and the images do not fit each
            other.
        TypeError: If the model is no module, or batches or outputs are of an unknown form.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> bench = Workbench(network, [(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)])
        >>> with bench.training():
        ...     for images, labels in bench.batches("tuning", epoch=0):
        ...         loss = nn.functional.cross_entropy(bench.logits(bench.copy, images), labels)
        >>> 0 <= bench.accuracy(bench.copy) <= 1
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any] | DefenseSet,
        *,
        seed: int = 0,
        batch_size: int = 128,
        augment: Augmentation = "none",
        forward: Forward | None = None,
        network: str | None = None,
        unpack: Unpack = unpack_batch,
    ) -> None:
        require_module(model, loader)
        refuse_wrappers(model)
        refuse_scripts(model)
        refuse_quantized(model)
        check_copy(model)
        self.data = DefenseSet.from_loader(loader, unpack)
        self.seed, self.batch_size, self.augment = seed, batch_size, augment
        self.model = model
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.call = _fresh_casts(network_forward(model, network, forward), self.device)
        with unchanged_on_error(model), running_alone(model):
            self.classes = check_network(model, self.sample, self.data.labels, self.call)
        self.copy = copy_network(model)

    @classmethod
    def of(
        cls,
        config: _Options,
        model: nn.Module,
        loader: Iterable[Any] | DefenseSet,
        forward: Forward | None,
        network: str | None,
        unpack: Unpack,
    ) -> Workbench:
        """Return the workbench of a baseline, from its options and its other arguments.

        Args:
            config: Options, of which seed, batch size and augmentation are taken.
            model: As for the class, like all that follow.
            loader: Clean images.
            forward: How the network is called.
            network: Which submodule classifies.
            unpack: How a batch is read.

        Raises:
            ValueError: If the model cannot be copied, or the model and the images do not fit each
                other.
            TypeError: If the model is no module, or batches or outputs are of an unknown form.
        """
        return cls(
            model,
            loader,
            seed=config.seed,
            batch_size=config.batch_size,
            augment=config.augment,
            forward=forward,
            network=network,
            unpack=unpack,
        )

    @property
    def sample(self) -> Tensor:
        """Two images, on the network's device."""
        return self.data.images[:2].to(self.device)

    @property
    def passes(self) -> int:
        """Number of batches in a pass."""
        return self.data.passes(self.batch_size)

    def batches(
        self, stage: str, epoch: int, augment: Augmentation | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the defense set once, in an order drawn for this pass.

        Args:
            stage: Name of the stage, so that two stages do not draw the same.
            epoch: Number of the pass, from 0.
            augment: How images are changed; as the workbench has it if None.

        Yields:
            Images and labels, on the network's device.
        """
        augment = self.augment if augment is None else augment
        key = (self.seed, stage, epoch)
        for index in range(self.passes):
            yield self.data.batch(index, self.batch_size, self.device, augment, key)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Put the copy into training mode, with draws from the seed, until the context ends.

        Gradients are enabled, also if the caller has disabled them.
        """
        with running_alone(self.copy), _drawing(self.seed, self.device), torch.enable_grad():
            modes = {module: module.training for module in self.copy.modules()}
            self.copy.train()
            try:
                yield
            finally:
                for module, mode in modes.items():
                    module.training = mode

    @contextmanager
    def tuning(self) -> Iterator[list[nn.Parameter]]:
        """Make all weights of the copy trainable, frozen ones too, until the context ends.

        Gradients are enabled, also if the caller has disabled them.

        Yields:
            The parameters of the copy. Afterwards they have no gradients, and those that were
            frozen are frozen again.
        """
        flags = [(parameter, parameter.requires_grad) for parameter in self.copy.parameters()]
        try:
            parameters = [p for p, _ in flags if p.is_floating_point()]
            for parameter in parameters:
                parameter.requires_grad_()
            with torch.enable_grad():
                yield parameters
        finally:
            for parameter, flag in flags:
                parameter.grad = None
                parameter.requires_grad_(flag)

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Run a network in the mode it is in.

        Args:
            network: The model or a copy of it.
            images: Shape (N, C, ...), on its device.

        Returns:
            Logits in float32, shape (N, K).
        """
        return find_logits(self.call(network, images)).float()

    @torch.no_grad()
    def accuracy(self, network: nn.Module) -> float:
        """Measure a network's accuracy on the defense set, in evaluation mode, from 0 to 1.

        Args:
            network: The model or a copy of it.

        Raises:
            ArithmeticError: If its outputs are not finite: because a defense has driven its weights
                too far, or, for the model itself, because of its weights or the images.
        """
        remedy = "Lower the learning rates."
        if network is self.model:
            remedy = "Check its weights, and how the images are prepared."
        hits = 0
        with running_alone(network), evaluating(network):
            for images, labels in self.data.batches(self.batch_size, self.device):
                logits = self.logits(network, images)
                require_finite(logits, "every output on the defense set", remedy)
                hits += int((logits.argmax(1) == labels).sum())
        return hits / len(self.data)


def _fresh_casts(call: Forward, device: torch.device) -> Forward:
    """Return a call that knows no former weights.

    Autocast keeps short copies of the weights for as long as its context lasts, which may be the
    caller's; weights that are tuned meanwhile would have no effect.
    """

    def fresh(network: nn.Module, images: Tensor) -> Any:
        enabled = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type)
        with torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False):
            return call(network, images)

    return fresh
