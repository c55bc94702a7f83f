"""Stage 1, clean suppression: unlearn the clean task (Eq. 6)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.config import MNPConfig
from lightning_mnp.defense_data.defense_set import LEAST_BATCH, DefenseSet
from lightning_mnp.mnp.updates import Updates
from lightning_mnp.surgery.masked_network import MaskedNetwork, Weights

__all__ = ["CleanSuppression", "RunImages", "suppression_parts"]

# A step longer than the weights themselves no longer follows a gradient.
_LONGEST_STEP = 1.0


def suppression_parts(data: DefenseSet, config: MNPConfig) -> int:
    """Return into how many parts runs divide a defense set: as asked for, or fewer for few images.

    Args:
        data: The defense set.
        config: Options.

    Example:
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> suppression_parts(data, MNPConfig())
        2
    """
    return max(1, min(config.suppression.parts, len(data) // LEAST_BATCH))


class RunImages:
    """The images of one suppression run: a part of the defense set, in an order of its own.

    Args:
        data: The defense set.
        config: Options.
        run: Number of the run, from 0.

    Attributes:
        size: Number of images in a pass.
        most_steps: Number of batches in all passes that a run may make.

    Example:
        >>> data = DefenseSet(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> images = RunImages(data, MNPConfig().changed({"suppression.epochs": 3}), run=1)
        >>> images.size, images.most_steps, images.batch(0, torch.device("cpu"))[0].shape
        (4, 3, torch.Size([4, 1, 2, 2]))
    """

    def __init__(self, data: DefenseSet, config: MNPConfig, run: int) -> None:
        self.data = data
        self.config = config
        self.run = run
        parts = suppression_parts(data, config)
        draw, number = divmod(run, parts)
        self._seen = None if parts == 1 else data.part(number, parts, (config.seed, draw))
        self.size = len(data) if self._seen is None else len(self._seen)
        self._passes = math.ceil(self.size / config.batch_size)
        self.most_steps = self._passes * config.suppression.epochs

    def batch(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a step.

        Args:
            step: Which step, from 0.
            device: Where they are to be.
        """
        config = self.config
        epoch, index = divmod(step, self._passes)
        key = (config.seed, "suppression", self.run, epoch)
        return self.data.batch(index, config.batch_size, device, config.augment, key, self._seen)


class CleanSuppression:
    """Gradient ascent on the clean loss of a copy of the weights (Eq. 6, Algorithm 1, line 4).

    What is minimized is ``-cross-entropy + mu * |theta|^2``; the second term is the optimizer's
    weight decay of ``2 mu``. The stage ends after the passes asked for, when the accuracy over
    the latest pass has fallen to ``stop_accuracy``, or, with the last finite weights kept, when
    the loss or a gradient is no longer finite or a step would be longer than the weights.

    Args:
        masked: The network; its own weights are left alone.
        config: Options.

    Attributes:
        weights: The suppressed parameters, theta_s, by name.
        optimizer: Their optimizer.
        steps: Steps taken in this run.
        curve: Accuracy over each pass so far.
        accuracy: Accuracy over the latest pass, from 0 to 1; NaN before the first step.
        stopped: Why the stage ended, or "" while it goes on.

    Example:
        >>> from torch import nn
        >>> from lightning_mnp.surgery.layers import find_filter_layers
        >>> from lightning_mnp.mnp.updates import PlainUpdates
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.arange(8) % 2
        >>> masked = MaskedNetwork(network, find_filter_layers(network, images))
        >>> config = MNPConfig().changed({"suppression.stop_accuracy": None})
        >>> stage = CleanSuppression(masked, config)
        >>> losses = [stage.step(images, labels, 8, PlainUpdates())["loss"] for _ in range(5)]
        >>> losses[-1] > losses[0]
        True
    """

    def __init__(self, masked: MaskedNetwork, config: MNPConfig) -> None:
        self.masked = masked
        self.config = config
        self.weights: Weights = {
            name: weight.clone().requires_grad_(weight.is_floating_point())
            for name, weight in masked.weights().items()
        }
        self.optimizer = torch.optim.SGD(
            [weight for weight in self.weights.values() if weight.requires_grad],
            lr=config.suppression.lr,
            momentum=config.suppression.momentum,
            weight_decay=2 * config.suppression.mu,
        )
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.stopped = ""
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self._window: list[tuple[int, int]] = []
        self._images = 0
        self.curve: list[float] = []

    @torch.no_grad()
    def restart(self) -> None:
        """Go back to the network's own weights for another run."""
        for name, weight in self.masked.weights().items():
            self.weights[name].copy_(weight)
        self._reset()

    @property
    def accuracy(self) -> float:
        """Accuracy over the images of the latest pass, before the step on each was taken."""
        count = sum(images for _, images in self._window)
        return sum(hits for hits, _ in self._window) / count if count else math.nan

    def step(
        self, images: Tensor, labels: Tensor, pass_size: int, updates: Updates
    ) -> dict[str, float]:
        """Take one step up the clean loss.

        Args:
            images: Shape (N, C, ...), on the network's device.
            labels: Shape (N,).
            pass_size: Number of images in a whole pass, over which the accuracy is taken.
            updates: Does the backward pass and the optimizer's step.

        Returns:
            The ``loss`` before the step and the ``accuracy`` over the latest pass.
        """
        logits = self.masked(images, weights=self.weights)
        loss = F.cross_entropy(logits, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._undo()
            return self._stop(f"the loss became {value}", value)
        self._window.append((int((logits.argmax(1) == labels).sum()), len(labels)))
        while sum(count for _, count in self._window[1:]) >= pass_size:
            self._window.pop(0)
        self._images += len(labels)
        if self._images >= (len(self.curve) + 1) * pass_size:
            self.curve.append(self.accuracy)
        full = sum(count for _, count in self._window) >= pass_size
        stop = self.config.suppression.stop_accuracy
        if stop is not None and full and self.accuracy <= stop:
            return self._stop("the accuracy fell to `stop_accuracy`", value)
        updates.backward(-loss, self.optimizer)
        length = self._relative_step()
        if not length <= _LONGEST_STEP:
            return self._stop(f"a step of {length:.3g} times the weights' norm was refused", value)
        updates.step(self.optimizer)
        self.steps += 1
        return {"loss": value, "accuracy": self.accuracy}

    def finish(self, reason: str) -> None:
        """End the run from outside and let go of the gradients."""
        self.stopped = self.stopped or reason
        self.optimizer.zero_grad(set_to_none=True)

    def _stop(self, reason: str, loss: float) -> dict[str, float]:
        self.finish(reason)
        return {"loss": loss, "accuracy": self.accuracy}

    @torch.no_grad()
    def _relative_step(self) -> float:
        """Length of the step that the optimizer is about to take, in norms of the weights."""
        steps, weights = [], []
        for weight in self.optimizer.param_groups[0]["params"]:
            if weight.grad is None:
                continue
            step = torch.add(weight.grad, weight, alpha=2 * self.config.suppression.mu)
            buffer = self.optimizer.state[weight].get("momentum_buffer")
            if buffer is not None:
                step.add_(buffer, alpha=self.config.suppression.momentum)
            steps.append(step.norm())
            weights.append(weight.norm())
        length, norm = (torch.stack(norms).norm() for norms in (steps, weights))
        return float(self.config.suppression.lr * length / norm.clamp_min(1e-12))

    @torch.no_grad()
    def _undo(self) -> None:
        """Take the last step back; its gradients are still there, so no copy need be kept."""
        if self.steps == 0:
            return
        self.steps -= 1
        rate, decay = self.config.suppression.lr, 2 * self.config.suppression.mu
        for weight in self.optimizer.param_groups[0]["params"]:
            buffer = self.optimizer.state[weight].get("momentum_buffer")
            if buffer is not None:
                weight.add_(buffer, alpha=rate)
            elif weight.grad is not None:
                weight.add_(weight.grad, alpha=rate).div_(1 - rate * decay)

    def _gradients(self) -> Weights:
        """What :meth:`_undo` needs if there is no momentum."""
        if self.config.suppression.momentum > 0:
            return {}
        return {name: w.grad for name, w in self.weights.items() if w.grad is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as tensors and primitives."""
        return {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "gradients": self._gradients(),
            "optimizer": self.optimizer.state_dict(),
            "window": [list(entry) for entry in self._window],
            "images": self._images,
            "curve": list(self.curve),
            "steps": self.steps,
            "stopped": self.stopped,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        for name, weight in state["weights"].items():
            self.weights[name].copy_(weight)
            gradient = state["gradients"].get(name)
            self.weights[name].grad = None if gradient is None else gradient.to(weight, copy=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self._window = [(int(hits), int(count)) for hits, count in state["window"]]
        self._images = int(state["images"])
        self.curve = [float(accuracy) for accuracy in state["curve"]]
        self.steps = int(state["steps"])
        self.stopped = str(state["stopped"])
