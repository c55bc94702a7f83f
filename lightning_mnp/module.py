"""MNPModule: the defense as a LightningModule, whose stages a Trainer runs."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_mnp.host import find_defense_set, check_host
from lightning_mnp.config import MNPConfig
from lightning_mnp.defense import MNPDefense, When
from lightning_mnp.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.forward import Forward
from lightning_mnp.network import network_forward
from lightning_mnp.result import DefenseReport

__all__ = ["MNPModule"]


class MNPModule(LightningModule):
    """Wraps a network so that ``Trainer.fit`` audits and defends it.

    ``Trainer(max_epochs=-1).fit(MNPModule(network), defense_loader)`` reads the loader once, then
    takes one step of the engine for every batch the Trainer counts, with the Trainer's precision,
    progress bar, loggers and checkpoints, and stops the Trainer when the defense has finished.
    What the loader yields after the first reading is not used: the engine draws its own batches,
    the same as through every other door. A run resumed with ``ckpt_path`` goes on where the
    checkpoint was written.

    Args:
        network: The network. At the end it is pruned in place; save it then, by
            ``trainer.save_checkpoint`` or :func:`~lightning_mnp.checkpoint.write_state_dict`.
            ``ModelCheckpoint`` goes by optimizer steps, and the last of these come before pruning.
        config: Options of the method.
        when: ``"never"`` audits only, ``"flagged"`` prunes if the verdict is ``"backdoored"``,
            ``"always"`` prunes in any case.
        forward: A function (network, images) that calls it and returns the logits.
        unpack: A function (batch) that gives images and labels.

    Attributes:
        report: The outcome, after the fit; None before.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> MNPModule(network, when="never")(torch.zeros(3, 1, 2, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        network: nn.Module,
        config: MNPConfig | None = None,
        when: When = "always",
        forward: Forward | None = None,
        unpack: Unpack = unpack_batch,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # Lightning warns of layers in evaluation mode; the engine sets the modes it needs itself.
        self.network = network.train()
        self.config = config or MNPConfig()
        self.when = when
        self.unpack = unpack
        self._call = forward
        self._resumed: dict[str, Any] | None = None
        self.defense: MNPDefense | None = None
        self.report: DefenseReport | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Give the network's logits, shape (N, K); after the fit, those of the pruned network."""
        return cast(Tensor, network_forward(self.network, None, self._call)(self.network, images))

    def setup(self, stage: str) -> None:
        """Refuse what this door does not do.

        Raises:
            MisconfigurationException: With several processes, or sharded weights.
        """
        if stage == "fit":
            check_host(self.trainer)
            if self.trainer.world_size > 1:
                raise MisconfigurationException(
                    f"Expected one process for MNPModule, but got {self.trainer.world_size}. The "
                    "defense set is small: use `devices=1`, or MNPCallback in the training itself."
                )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Read the defense set, build the engine and hand its optimizers to the Trainer."""
        if self._resumed is not None and "report" in self._resumed:
            # Nothing is left to optimize, but the Trainer warns where there is no optimizer.
            return [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)]
        # The Trainer makes its loaders after this hook, unless asked; it does so only once.
        self.trainer.fit_loop.setup_data()
        autocast = self.trainer.precision_plugin.forward_context
        self.defense = MNPDefense(
            self.network,
            self._read_defense_set(),
            self.config,
            when=self.when,
            forward=self._call,
            autocast=autocast,
        )
        if self._resumed is not None:
            self.defense.load_state_dict(self._resumed)
            self._resumed = None
        return list(self.defense.optimizers)

    def _read_defense_set(self) -> DefenseSet:
        if getattr(self.trainer, "datamodule", None) is not None:
            return find_defense_set(self.trainer, self, None, self.unpack)
        batches = self.trainer.num_training_batches
        limit = int(batches) if batches != float("inf") else None
        loader = self.trainer.train_dataloader
        assert loader is not None, "set up just before"
        return DefenseSet.from_loader(loader, self.unpack, limit)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take one step of the engine, whatever the batch."""
        if self.defense is None or self.defense.finished:
            self.trainer.should_stop = True
            return
        phase = self.defense.phase
        metrics = self.defense.step(_TrainerUpdates(self))
        if phase in ("suppression", "masks"):
            metrics = {f"mnp/{phase}_{name}": value for name, value in metrics.items()}
            self.log_dict(metrics, prog_bar=True, batch_size=1)
        if self.defense.finished:
            self._finish(self.defense)
            self.trainer.should_stop = True

    def _finish(self, defense: MNPDefense) -> None:
        self.report = defense.report()
        if len(defense.removed):
            defense.prune_()
        self.report.model = self.network
        self.log_dict(self.report.metrics(), batch_size=1)

    def on_train_end(self) -> None:
        """Warn where the Trainer ended before the defense did."""
        if self.defense is not None and not self.defense.finished:
            rank_zero_warn(
                f"The Trainer ended while the defense was in phase {self.defense.phase!r}, about "
                f"{self.defense.most_steps()} steps before its end. Raise `max_epochs` (-1 for no "
                "limit) and resume with `ckpt_path`."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the engine's state: tensors and primitives."""
        if self.report is not None:
            checkpoint["lightning_mnp"] = {"report": self.report.to_dict()}
        elif self.defense is not None:
            checkpoint["lightning_mnp"] = self.defense.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the engine's state until the engine is built."""
        self._resumed = checkpoint.get("lightning_mnp")
        if self._resumed is not None and "report" in self._resumed:
            checkpoint["optimizer_states"] = []


class _TrainerUpdates:
    """Backward passes and steps through the Trainer: precision, scaling and step counts."""

    def __init__(self, module: MNPModule) -> None:
        self._module = module

    def _wrapped(self, optimizer: torch.optim.Optimizer) -> LightningOptimizer:
        wrapped = cast("list[LightningOptimizer]", self._module.optimizers())
        return next(entry for entry in wrapped if entry.optimizer is optimizer)

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._module.manual_backward(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self._wrapped(optimizer).step()
