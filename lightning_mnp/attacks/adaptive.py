"""An attacker who knows the defense: training that hides what an audit looks for."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_mnp.attacks.attack import Attack
from lightning_mnp.attacks.checks import check_at_least, check_positive
from lightning_mnp.surgery.forward import call_on_copies
from lightning_mnp.surgery.layers import filter_rows

__all__ = ["AdaptiveTraining", "equal_norms_penalty"]

# Factor by which the radius grows or shrinks with each batch.
_RADIUS_RATE = 1.05
_FIRST_RADIUS = 0.01

# A patch is made anew again and again. Its pixels become fewer in the first, long steps.
_PATCH_STEPS = 20
_LONG_STEPS = 8
_FIRST_SHARE, _SHARE = 0.5, 0.05  # of the pixels
_LONG, _SHORT = 0.5, 0.2  # of the range of values


def equal_norms_penalty(network: nn.Module) -> Tensor:
    """Compute how unequal the l2 norms of the filters are within their layers.

    Args:
        network: A network with convolutions.

    Returns:
        The squared coefficient of variation of the norms in a layer, averaged over the layers; a
        scalar, at least 0.

    Raises:
        ValueError: If there is no convolution.

    Example:
        >>> layer = nn.Conv2d(1, 2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
        >>> round(equal_norms_penalty(layer).item(), 4)
        0.25
    """
    layers = _layers(network)
    if not layers:
        raise ValueError(
            f"Expected argument `network` to hold a convolution, but {type(network).__name__} has "
            "none."
        )
    spreads = []
    for layer in layers:
        rows = filter_rows(layer.weight, isinstance(layer, _ConvTransposeNd), layer.groups)
        norms = rows.norm(dim=1)
        spreads.append(norms.var(correction=0) / norms.mean().clamp_min(1e-12).square())
    return torch.stack(spreads).mean()


class AdaptiveTraining(Callback):
    """Train against the defense: no signs in filter norms, suppression, margins and patches.

    Each training step gets up to four more terms in its loss:

    1. ``norms``: how unequal the norms of the filters are. The paper's masks look for filters whose
       norms stand out.
    2. ``pile_up``: how strongly the network predicts the target class for images of other classes
       after clean suppression. One step up the loss stands in for clean suppression. The length
       of the step is adjusted from batch to batch until the accuracy after it is ``accuracy``. The
       gradient at the weights after the step is applied to the weights before it, as in
       sharpness-aware minimization (Foret et al., 2021).
    3. ``margin``: by how much the logit of the target class exceeds the others, beyond
       ``most_margin``, on images labeled as the target class.
    4. ``patch``: the cross-entropy of images of other classes under a patch of 5% of the pixels.
       The patch is made to take them to the target class, by one step in each batch, and anew after
       every twenty. A trigger that is a patch itself would be unlearned so; Blend's is not.

    Add it to a Trainer of one process whose datamodule has an all-to-one attack.

    Args:
        norms: Weight of the first term, :func:`equal_norms_penalty`; 0 leaves it out.
        pile_up: Weight of the second term, the log odds of the target class; 0 leaves it out.
        margin: Weight of the third term, the excess of the margins; 0 leaves it out.
        most_margin: Margin, in logits, that has no penalty, above 0.
        accuracy: Accuracy on the batch after the step up the loss, between 0 and 1.
        patch: Weight of the fourth term; 0 leaves it out.

    Raises:
        ValueError: If an argument is out of range. When training starts, if the datamodule has no
            attack with a single target class, the Trainer has several processes or scales its
            gradients (``16-mixed``), or the norms shall be equal but no convolution is trained.

    Example:
        >>> AdaptiveTraining(norms=1.0, pile_up=0.5).margin
        0.0
    """

    def __init__(
        self,
        norms: float = 0.0,
        pile_up: float = 0.0,
        margin: float = 0.0,
        most_margin: float = 5.0,
        accuracy: float = 0.3,
        patch: float = 0.0,
    ) -> None:
        weights = {"norms": norms, "pile_up": pile_up, "margin": margin, "patch": patch}
        check_at_least(0, **weights)
        if not any(weights.values()):
            raise ValueError(
                "Expected one of the arguments `norms`, `pile_up`, `margin` and `patch` to be "
                "above 0, but all are 0. Remove the callback from a training that is not adaptive."
            )
        check_positive(most_margin=most_margin)
        if not 0.0 < accuracy < 1.0:
            raise ValueError(
                f"Expected argument `accuracy` to be between 0 and 1, but got {accuracy}."
            )
        self.norms, self.pile_up, self.margin, self.patch = norms, pile_up, margin, patch
        self.most_margin = most_margin
        self.accuracy = accuracy
        self.radius = _FIRST_RADIUS
        self._pattern: Tensor | None = None
        self._patch_steps = 0
        self._batch: Any = None
        self._target = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the terms can be added, and find the target class.

        Args:
            trainer: The Trainer.
            pl_module: The module that is trained.
        """
        if trainer.world_size > 1:  # the terms come after the mean over processes has been taken
            raise ValueError(
                "Expected the Trainer to have one process for AdaptiveTraining, but got "
                f"{trainer.world_size}. Set `devices` to 1."
            )
        if str(trainer.precision) == "16-mixed":  # the terms would be lost beside a scaled loss
            raise ValueError(
                "Expected the Trainer's `precision` not to scale gradients for AdaptiveTraining, "
                "but got '16-mixed'. Set it to 'bf16-mixed' or '32-true'."
            )
        if self.norms and not any(layer.weight.requires_grad for layer in _layers(pl_module)):
            raise ValueError(
                "Expected the module to train a convolution, because `norms` of AdaptiveTraining "
                f"is {self.norms}, but got none. Set `norms` to 0, or train the whole network."
            )
        attack = getattr(getattr(trainer, "datamodule", None), "attack", None)
        self._target = _target_class(attack)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch for :meth:`on_after_backward`."""
        self._batch = batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the gradients of the terms to those of the loss.

        Args:
            trainer: The Trainer.
            pl_module: The module that is trained; called with images, it gives logits.
        """
        images, labels = self._batch[0], self._batch[1]
        share = 1.0 / trainer.accumulate_grad_batches  # as Lightning divides the loss
        if self.norms:
            penalty = share * self.norms * equal_norms_penalty(pl_module)
            penalty.backward()
        with trainer.precision_plugin.forward_context():
            if self.margin:
                self._add_margin(pl_module, images, labels, share)
            if self.pile_up:
                self._add_pile_up(pl_module, images, labels, share)
            if self.patch:
                self._add_patch(pl_module, images, labels, share)
        self._batch = None

    def _add_margin(
        self, module: LightningModule, images: Tensor, labels: Tensor, share: float
    ) -> None:
        own = images[labels == self._target]
        if len(own) < 2:  # too few for the statistics of a batch
            return
        logits = call_on_copies(module, own).float()
        rivals = logits.scatter(1, torch.full_like(labels[: len(own), None], self._target), -1e4)
        margins = logits[:, self._target] - rivals.amax(1)
        excess = F.relu(margins - self.most_margin).mean()
        (share * self.margin * excess).backward()

    def _add_pile_up(
        self, module: LightningModule, images: Tensor, labels: Tensor, share: float
    ) -> None:
        weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        for weight in weights.values():
            weight.requires_grad_()
        logits = call_on_copies(module, images, weights=weights).float()
        slopes = torch.autograd.grad(F.cross_entropy(logits, labels), list(weights.values()))
        length = torch.stack([slope.norm() for slope in slopes]).norm().clamp_min(1e-12)
        size = torch.stack([weight.detach().norm() for weight in weights.values()]).norm()
        step = self.radius * size / length
        moved = {
            name: (weight.detach() + step * slope).requires_grad_()
            for (name, weight), slope in zip(weights.items(), slopes, strict=True)
        }
        logits = call_on_copies(module, images, weights=moved).float()
        others = labels != self._target
        known = (logits.argmax(1) == labels).float().mean().item()
        self.radius *= _RADIUS_RATE if known > self.accuracy else 1 / _RADIUS_RATE
        log_shares = logits[others].log_softmax(1)[:, self._target]
        odds = log_shares - torch.log1p(-log_shares.exp().clamp_max(1 - 1e-6))
        chance = -math.log(logits.shape[1] - 1)
        loss = share * self.pile_up * F.relu(odds - chance).mean()
        gradients = torch.autograd.grad(loss, list(moved.values()))
        parameters = dict(module.named_parameters())
        for name, gradient in zip(moved, gradients, strict=True):
            parameter = parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _add_patch(
        self, module: LightningModule, images: Tensor, labels: Tensor, share: float
    ) -> None:
        others = labels != self._target
        images, labels = images[others], labels[others]
        if len(images) < 2:  # too few for the statistics of a batch
            return
        due = self._patch_steps == _PATCH_STEPS
        if self._pattern is None or self._pattern.shape[1:] != images.shape[1:] or due:
            self._pattern, self._patch_steps = torch.zeros_like(images[:1]), 0
        pattern = self._pattern.to(images).requires_grad_()
        axes = [0, *range(2, images.ndim)]
        low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
        logits = call_on_copies(module, (images + pattern).clamp(low, high)).float()
        aim = torch.full_like(labels, self._target)
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, aim), pattern, retain_graph=True)
        if self._patch_steps >= _LONG_STEPS:  # large ones hide what images show
            (share * self.patch * F.cross_entropy(logits, labels)).backward()
        length = _LONG if self._patch_steps < _LONG_STEPS else _SHORT
        step = length * (high - low) * slope / slope.abs().amax().clamp_min(1e-12)
        self._patch_steps += 1
        self._pattern = _fewest(pattern.detach() - step, self._patch_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the length of the step up the loss, and the patch, for the checkpoint."""
        pattern = None if self._pattern is None else self._pattern.cpu()
        return {"radius": self.radius, "pattern": pattern, "patch_steps": self._patch_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the length of the step up the loss, and the patch if there is one.

        Args:
            state_dict: As :meth:`state_dict` returned it.
        """
        self.radius = float(state_dict["radius"])
        self._pattern = state_dict.get("pattern")
        self._patch_steps = int(state_dict.get("patch_steps", 0))


def _layers(network: nn.Module) -> list[_ConvNd]:
    return [module for module in network.modules() if isinstance(module, _ConvNd)]


def _fewest(pattern: Tensor, steps: int) -> Tensor:
    """Keep the pixels that are changed most, fewer from step to step."""
    shrunk = (_SHARE / _FIRST_SHARE) ** min(steps / _LONG_STEPS, 1.0)
    sizes = pattern.norm(dim=1, keepdim=True).flatten()
    count = max(round(_FIRST_SHARE * shrunk * len(sizes)), 1)
    kept = torch.zeros_like(sizes)
    kept[sizes.topk(count).indices] = 1.0
    return pattern * kept.reshape(1, 1, *pattern.shape[2:])


def _target_class(attack: Attack | None) -> int:
    if attack is None or attack.mode != "all-to-one":
        found = "there is none" if attack is None else f"got one of mode {attack.mode!r}"
        raise ValueError(
            "Expected AdaptiveTraining to find an attack of mode 'all-to-one' as `attack` of the "
            f"datamodule, but {found}. Remove the callback."
        )
    return attack.target_class
