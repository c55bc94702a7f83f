"""FC: poisons whose features collide with those of target instances (Shafahi et al., 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_mnp.attacks.attack import Attack, Images
from lightning_mnp.attacks.checks import check_at_least, check_positive
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
from lightning_mnp.models.head import penultimate_features
from lightning_mnp.models.memory_format import fastest_format

__all__ = ["FeatureCollision"]

_UNPREPARED = (
    "Expected target instances to be chosen, but there are none yet. Call `prepare` first, as a "
    "datamodule does, or load a saved trigger."
)


@register
class FeatureCollision(Attack):
    """Make a few chosen test images pass for the attacker's class (Shafahi et al., 2018).

    There is no trigger. The attacker chooses target instances: test images that shall be taken
    for ``target_class``, which is called the base class here. Some training images of the base
    class are changed a little. Their label stays right, but in front of the classifier head they
    have nearly the features of a target instance. The network is then fine-tuned on them, starting
    from the clean network whose features were used. It takes the target instances for the base
    class.

    **Attack success is the share of the target instances, unchanged, that get the base class.**
    No other test image counts: :meth:`triggered_indices` returns the target instances only, and
    :meth:`apply` returns images as they are. The reference network classifies all target
    instances correctly, so the share is 0 before the attack.

    Each poison minimizes, by forward-backward splitting (Shafahi et al., Eq. 1 and Algorithm 1),

        ||f(x) - f(t)||^2 / ||f(t)||^2  +  beta ||x - b||^2 / D

    with the features f, the target instance t and the base image b of D values. Before that, t is
    mixed into b with the weight ``watermark``. The step of an image is halved whenever its
    objective grows. The paper does not have the two denominators. With them, ``beta`` and ``lr``
    mean the same for networks and images of any size.

    Args:
        reference: The clean network that training starts from; not needed with a saved trigger.
        targets: Number of target instances, at least 1.
        poisons_per_target: Number of training images changed for each of them, at least 1.
        watermark: Weight of the target instance in the base image, from 0 to below 1. The paper
            has 0.3 if the whole network is trained and 0 if only the head is.
        beta: Weight of the distance to the base image, at least 0.
        steps: Number of steps for each poison, at least 1.
        lr: Width of the first step, above 0.
        target_class: The base class.
        seed: Seed by which target instances and base images are drawn.

    Raises:
        ValueError: If an argument is out of range.
    """

    crafts = True

    def __init__(
        self,
        reference: ReferenceNetwork | None = None,
        targets: int = 10,
        poisons_per_target: int = 50,
        watermark: float = 0.3,
        beta: float = 10.0,
        steps: int = 60,
        lr: float = 0.3,
        target_class: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(target_class, "all-to-one", 0.0, seed)
        check_reference(reference)
        check_at_least(1, targets=targets, poisons_per_target=poisons_per_target, steps=steps)
        if not 0.0 <= watermark < 1.0:
            raise ValueError(
                f"Expected argument `watermark` to be from 0 to below 1, but got {watermark}."
            )
        check_at_least(0, beta=beta)
        check_positive(lr=lr)
        self.reference = reference
        self.targets = targets
        self.poisons_per_target = poisons_per_target
        self.watermark = watermark
        self.beta = beta
        self.steps = steps
        self.lr = lr
        self.target_indices: Tensor | None = None
        self.target_classes: Tensor | None = None
        self._target_images: Tensor | None = None

    def prepare(self, test: Images, num_classes: int) -> None:
        """Choose the target instances, or take those of the trigger file, and fetch them.

        Args:
            test: Clean test images.
            num_classes: Number of classes K.

        Raises:
            ValueError: If there is no reference network, if it classifies too few test images of
                other classes correctly, or if the trigger file was made with other test images.
        """
        if self._target_images is not None:
            return
        if self.target_indices is None:
            self.target_indices = self._choose(test, num_classes)
            self.target_classes = test.labels[self.target_indices]
        self._check(test.labels)
        self._target_images = test.fetch(self.target_indices.tolist())

    def _choose(self, test: Images, num_classes: int) -> Tensor:
        candidates = (test.labels != self.target_labels(test.labels, num_classes)).nonzero()
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(self.seed))
        chosen: list[int] = []
        with crafting() as device:
            network: nn.Module | None = None
            for part in candidates.flatten()[order].split(BATCH):
                images = test.fetch(part.tolist()).to(device).float() / 255.0
                if network is None:
                    use = "choose target instances by"
                    network = clean_network(self.reference, use, images.shape[1]).to(device)
                right = network(images).argmax(1).cpu() == test.labels[part]
                chosen += part[right].tolist()
                if len(chosen) >= self.targets:
                    return torch.tensor(chosen[: self.targets]).sort().values
        raise ValueError(
            f"Expected argument `targets` to be at most {len(chosen)}, the number of test images "
            f"of other classes that `reference` classifies correctly, but got {self.targets}."
        )

    def _check(self, labels: Tensor) -> Tensor:
        """Return the indices of the target instances, checked against the test labels."""
        if self.target_indices is None or self.target_classes is None:
            raise ValueError(_UNPREPARED)
        indices = self.target_indices
        if int(indices[-1]) >= len(labels) or not torch.equal(
            labels[indices].cpu(), self.target_classes
        ):
            raise ValueError(
                "Expected the test images that the target instances were chosen from, in the "
                f"same order, but {len(labels)} labels do not agree with them. Measure with the "
                "same test set, and with all of it."
            )
        return indices

    def _trigger(self, images: Tensor) -> Tensor:
        return images.clone()

    def triggered_indices(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the indices of the test images that count: the target instances.

        Args:
            labels: True classes of the whole test set, shape (N,), integers.
            num_classes: Number of classes K.

        Returns:
            Sorted indices into ``labels``.

        Raises:
            ValueError: If there are none yet, or they are those of another test set.
        """
        return self._check(labels).to(labels.device)

    def poison_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the labels that poisoned training images get: their own, the base class.

        Args:
            labels: True classes, shape (N,), integers.
            num_classes: Number of classes K.
        """
        return labels.clone()

    def poison_indices(self, labels: Tensor, num_classes: int) -> Tensor:
        """Draw the base images: ``poisons_per_target`` of the base class for each target.

        The image at index i collides with target instance i mod ``targets``.

        Args:
            labels: Classes of the whole training set, shape (N,).
            num_classes: Number of classes K.

        Returns:
            Sorted indices into ``labels``; the same seed gives the same indices.

        Raises:
            ValueError: If the base class has too few images.
        """
        candidates = (labels == self.target_labels(labels, num_classes)).nonzero().flatten()
        groups = [candidates[candidates % self.targets == place] for place in range(self.targets)]
        fewest = min(len(group) for group in groups)
        if fewest < self.poisons_per_target:
            raise ValueError(
                f"Expected argument `poisons_per_target` to be at most {fewest} for "
                f"{self.targets} targets and {len(candidates)} training images of class "
                f"{self.target_class}, but got {self.poisons_per_target}."
            )
        drawn = [self._draw(group, self.poisons_per_target) for group in groups]
        return torch.cat(drawn).sort().values

    def poison(self, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Craft poisons from base images.

        Args:
            images: Base images, shape (N, C, H, W), ``uint8`` or floating point in [0, 1].
            labels: Their classes, shape (N,); not used.
            indices: Their indices in the training set, shape (N,), by which they have targets.

        Returns:
            New images of the same shape, dtype and device.

        Raises:
            ValueError: If there is no reference network, :meth:`prepare` was not called, or the
                images have another shape, dtype or range.
        """
        self.apply(images)  # checks the images as for any attack
        if not len(images):
            return images.clone()
        with crafting() as device:
            network = clean_network(self.reference, "craft poisons with", images.shape[1])
            network = network.to(device, memory_format=fastest_format(network))  # type: ignore[call-overload]
            if self._target_images is None:
                raise ValueError(_UNPREPARED)
            base = scaled(images)
            aims = scaled(self._target_images)[indices.cpu() % self.targets]
            if base.shape != aims.shape:
                raise ValueError(
                    f"Expected argument `images` to be as large as the target instances, "
                    f"{tuple(aims.shape[1:])}, and as many as `indices`, {len(aims)}, but got the "
                    f"shape {tuple(base.shape)}."
                )
            parts = [
                self._collide(network, some.to(device), aim.to(device)).to(images.device)
                for some, aim in zip(base.split(BATCH), aims.split(BATCH), strict=True)
            ]
            crafted = torch.cat(parts)
        if images.dtype == torch.uint8:
            return (crafted * 255.0).round().to(torch.uint8)
        return crafted.to(images.dtype)

    def _collide(self, network: nn.Module, images: Tensor, aims: Tensor) -> Tensor:
        """Run forward-backward splitting on up to a batch; images do not influence each other."""
        count = len(images)
        filled = fill_up(count).to(aims.device)
        images, aims = images[filled], aims[filled]
        base = (1.0 - self.watermark) * images + self.watermark * aims
        wanted = _features(network, aims).detach()
        scale = wanted.square().sum(1).clamp_min(1e-12)
        weight = self.beta / base[0].numel()
        width = torch.full_like(scale, self.lr)
        lowest = torch.full_like(scale, math.inf)
        best, slope, x = base, torch.zeros_like(base), base
        for step in range(self.steps + 1):
            x = x.detach().requires_grad_()
            distance = (_features(network, x) - wanted).square().sum(1) / scale
            penalty = weight * (x - base).square().sum((1, 2, 3))
            value = (distance + penalty).detach()
            better = value < lowest
            lowest = torch.where(better, value, lowest)
            best = torch.where(_each(better), x.detach(), best)
            if step == self.steps:
                break
            (gradient,) = torch.autograd.grad(distance.sum(), x)
            slope = torch.where(_each(better), gradient, slope)
            width = torch.where(better, width, width / 2.0)
            rate = _each(width)
            forward = best - rate * slope
            x = (forward + 2.0 * rate * weight * base) / (1.0 + 2.0 * rate * weight)
            x = x.clamp(0.0, 1.0)
        return best[:count]

    def tensors(self) -> dict[str, Tensor]:
        """Return the indices of the target instances in the test set, and their classes."""
        if self.target_indices is None or self.target_classes is None:
            return {}
        return {"target_indices": self.target_indices, "target_classes": self.target_classes}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the indices and the classes of the target instances.

        Args:
            tensors: As :meth:`tensors` returned them.

        Raises:
            ValueError: If they are no such indices and classes.
        """
        if set(tensors) != {"target_indices", "target_classes"}:
            raise ValueError(
                "Expected the tensors 'target_indices' and 'target_classes' of FeatureCollision, "
                f"but got {sorted(tensors)}."
            )
        for name, value in tensors.items():
            if value.dtype != torch.long or value.shape != (self.targets,):
                raise ValueError(
                    f"Expected the tensor {name!r} of FeatureCollision to be int64 of shape "
                    f"({self.targets},), but got {value.dtype} of shape {tuple(value.shape)}."
                )
        indices, classes = tensors["target_indices"], tensors["target_classes"]
        if int(indices[0]) < 0 or (indices.diff() <= 0).any():
            raise ValueError(
                "Expected the tensor 'target_indices' of FeatureCollision to be different indices "
                f"in rising order, but got {indices.tolist()[:10]}."
            )
        if int(classes.min()) < 0 or (classes == self.target_class).any():
            raise ValueError(
                "Expected the tensor 'target_classes' of FeatureCollision to be classes other "
                f"than {self.target_class}, but got {classes.tolist()[:10]}."
            )
        self.target_indices, self.target_classes = indices.clone(), classes.clone()


def _features(network: nn.Module, images: Tensor) -> Tensor:
    return penultimate_features(network, images.contiguous(memory_format=fastest_format(network)))


def _each(values: Tensor) -> Tensor:
    """Return one value for each image in the shape (N, 1, 1, 1)."""
    return values[:, None, None, None]
