"""MNPModule: the defense as a LightningModule, whose stages a Trainer runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_mnp.config import MNPConfig, require_config
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.engine.defense import MNPDefense, When
from lightning_mnp.hosting.lightning_host import (
    check_host,
    find_defense_set,
    follow_first,
    output_folder,
    refuse_other_processes,
    write_outcome,
)
from lightning_mnp.hosting.loggers import is_a, log_outcome
from lightning_mnp.hosting.processes import gather_objects, process_count, whole_loader
from lightning_mnp.hosting.rates import check_triggered, measure_hosted_rates
from lightning_mnp.report import DefenseReport
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.network import network_forward

__all__ = ["MNPModule", "MNPSteps"]


# In ``pytorch_lightning`` the same class has another name, and its Trainer takes no other one.
if TYPE_CHECKING:
    _Base = LightningModule
else:
    _Base = object


class MNPSteps(_Base):
    """What :class:`MNPModule` does; a LightningModule of either package is the other base.

    The arguments are those of :class:`MNPModule`.
    """

    def __init__(
        self,
        network: nn.Module,
        config: MNPConfig | None = None,
        when: When = "always",
        forward: Forward | None = None,
        unpack: Unpack = unpack_batch,
        output_dir: Path | str | None = None,
        triggered_loader: Iterable[Any] | None = None,
    ) -> None:
        if when not in get_args(When):
            raise ValueError(
                f"Expected argument `when` to be one of {get_args(When)}, but got {when!r}."
            )
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.config = require_config(config)
        self.when = when
        self.unpack = unpack
        self.output_dir = output_dir
        self.triggered_loader = triggered_loader
        self.rates: dict[str, float] = {}
        self._folder: Path | None = None
        self._call = forward
        self._resumed: dict[str, Any] | None = None
        self._modes: dict[nn.Module, bool] = {}
        self.defense: MNPDefense | None = None
        self.report: DefenseReport | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's logits, shape (N, K); after the fit, those of the pruned network."""
        return cast(Tensor, network_forward(self.network, None, self._call)(self.network, images))

    def setup(self, stage: str) -> None:
        """Refuse what this door does not do.

        Raises:
            MisconfigurationException: With sharded weights, or a precision other than
                ``"32-true"`` and ``"bf16-mixed"``.
            ValueError: If the triggered images are of another form, or can be read only once.
        """
        if stage != "fit":
            return
        check_host(self.trainer)
        refuse_other_processes(self.trainer)
        if self.trainer.precision_plugin.precision == "16-mixed":
            raise MisconfigurationException(
                "Expected the precision 32-true or bf16-mixed for MNPModule, but got 16-mixed: "
                "gradients of masks and images are too small for it."
            )
        check_triggered(self.triggered_loader)
        self._folder = None  # an earlier fit may have had one
        if self.output_dir is not None and not getattr(self.trainer, "fast_dev_run", False):
            self._folder = output_folder(self.trainer, self.output_dir)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Read the defense set, build the engine and hand its optimizers to the Trainer."""
        # Each fit is one of its own: what an earlier one found, or was resumed from, is over.
        resumed, self._resumed = self._resumed, None
        self.report = self.defense = None
        self.rates = {}
        if resumed is not None and "report" in resumed:
            self.report = DefenseReport.from_dict(resumed["report"])
            self.report.model = self.network
            self.rates = dict(resumed.get("rates", {}))
            # Nothing is left to optimize, but the Trainer warns if there is no optimizer.
            return [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)]
        # The Trainer makes its loaders after this hook, unless asked; it does so only once.
        self.trainer.fit_loop.setup_data()
        self._refuse_uneven_epochs()
        autocast = self.trainer.precision_plugin.forward_context
        self.defense = MNPDefense(
            self.network,
            self._read_defense_set(),
            self.config,
            when=self.when,
            forward=self._call,
            autocast=autocast,
        )
        if resumed is not None:
            self.defense.load_state_dict(resumed)
        return list(self.defense.optimizers)

    def _read_defense_set(self) -> DefenseSet:
        if getattr(self.trainer, "datamodule", None) is not None:
            return find_defense_set(self.trainer, self, None, self.unpack)
        assert self.trainer.train_dataloader is not None, "set up just before"
        # The Trainer has put a DistributedSampler in it, if there are several processes.
        loader = whole_loader(self.trainer.train_dataloader)
        share = self.trainer.limit_train_batches
        limit = share if isinstance(share, int) else None
        if limit is None and self.trainer.num_training_batches != float("inf"):
            limit = int(len(cast(Any, loader)) * share)
        return DefenseSet.from_loader(loader, self.unpack, limit, gather=True)

    def _refuse_uneven_epochs(self) -> None:
        """Raise if processes would end their epochs at different steps, and wait in vain."""
        numbers = gather_objects(self.trainer.num_training_batches)
        if len(numbers) > 1 and (len(set(numbers)) > 1 or numbers[0] == float("inf")):
            raise MisconfigurationException(
                f"Expected the loader to have the same number of batches in every process, but "
                f"got {numbers}. Give one with a length, and let the Trainer shard it."
            )

    def on_fit_start(self) -> None:
        """Keep Lightning from warning of layers in evaluation mode: the engine sets all modes."""
        self._modes = {module: module.training for module in self.network.modules()}
        self.network.train()

    def on_train_start(self) -> None:
        """Set the network's modes back, for whoever looks at it from now on."""
        for module, training in self._modes.items():
            module.training = training
        self._modes = {}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take one step of the engine, whatever the batch."""
        if self.defense is None or self.defense.finished:
            self.trainer.should_stop = True
            return
        phase = self.defense.phase
        with self._without_synchronization():
            metrics = self.defense.step(_TrainerUpdates(self))
        self._check_agreement(self.defense)
        if phase in ("suppression", "masks"):
            finite = {
                f"mnp/{phase}_{name}": value
                for name, value in metrics.items()
                if math.isfinite(value)  # not all loggers take other numbers
            }
            self.log_dict(finite, prog_bar=True, batch_size=1)
        if self.defense.finished:
            self._finish(self.defense)
            self.trainer.should_stop = True

    def _without_synchronization(self) -> AbstractContextManager[Any]:
        """Keep DDP from waiting for gradients of the network's own weights: there are none."""
        strategy = self.trainer.strategy
        if is_a(strategy, "ParallelStrategy"):
            return cast("AbstractContextManager[Any]", cast(Any, strategy).block_backward_sync())
        return nullcontext()

    @staticmethod
    def _check_agreement(defense: MNPDefense) -> None:
        """Raise if processes have come to different places, before one waits for another."""
        if process_count() == 1:
            return
        places = gather_objects(defense.place)
        if len(set(places)) > 1:
            raise RuntimeError(
                f"Expected all processes to compute the same, but they have come to different "
                f"places: {places}. Use processors of one kind, or one process."
            )

    def _finish(self, defense: MNPDefense) -> None:
        self.report = follow_first(defense)
        self._measure("before")
        if self.report.changes:
            defense.prune_()
            self._measure("after")
        self.report.model = self.network
        # The loggers get them when training ends.
        self.log_dict(self.report.metrics() | self.rates, batch_size=1, logger=False)

    def _measure(self, ending: str) -> None:
        """Measure CA and ASR, if there are triggered images."""
        call, given = network_forward(self.network, None, self._call), self.triggered_loader
        self.rates |= measure_hosted_rates(self.trainer, self.network, call, given, ending)

    def on_train_end(self) -> None:
        """Write the outcome, then log it: a logger that fails must not cost the files."""
        if self.report is None:
            return
        if self._folder is not None:
            write_outcome(self.trainer, self.report, self._folder)
        if self.trainer.is_global_zero:
            loggers, step = self.trainer.loggers, self.trainer.global_step
            log_outcome(loggers, self.report, step, self.rates)

    def on_fit_end(self) -> None:
        """Warn if the Trainer ended before the defense did, or had nothing to do at all."""
        if self.defense is not None and not self.defense.finished:
            rank_zero_warn(
                f"The Trainer ended while the defense was in phase {self.defense.phase!r}, about "
                f"{self.defense.most_steps()} steps before its end. Raise `max_epochs` (-1 for no "
                "limit) and resume with `ckpt_path`."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the engine's state: tensors and primitives."""
        if self.report is not None:
            checkpoint["lightning_mnp"] = {"report": self.report.to_dict(), "rates": self.rates}
        elif self.defense is not None:
            checkpoint["lightning_mnp"] = self.defense.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the engine's state until the engine is built, if a fit is to go on from it."""
        host = self._trainer  # none in `load_from_checkpoint`
        if host is not None and host.state.fn != "fit":
            return  # `predict` and the like take weights only
        self._resumed = checkpoint.get("lightning_mnp")
        if self._resumed is not None and "report" in self._resumed:
            checkpoint["optimizer_states"] = []


class MNPModule(MNPSteps, LightningModule):
    """Wraps a network so that ``Trainer.fit`` audits and defends it.

    ``Trainer(max_epochs=-1).fit(MNPModule(network), defense_loader)`` reads the loader once, then
    takes one step of the engine for every batch the Trainer counts, with the Trainer's precision,
    progress bar, loggers and checkpoints, and stops the Trainer when the defense has finished.
    What the loader yields after the first reading is not used: the engine draws its own batches,
    the same as through every other door. A run resumed with ``ckpt_path`` goes on where the
    checkpoint was written. Of several processes, each takes the same steps on the images of all.
    For a Trainer of ``pytorch_lightning``, import it from ``lightning_mnp.pytorch_lightning``.

    Args:
        network: The network. At the end it is pruned in place. ``ModelCheckpoint`` does not save
            it then: it goes by optimizer steps, and the last of these come before pruning.
        config: Options of the method.
        when: ``"never"`` audits only, ``"flagged"`` prunes if the verdict is ``"backdoored"``,
            ``"always"`` prunes in any case.
        forward: A function (network, images) that calls it and returns the logits.
        unpack: A function (batch) that gives images and labels.
        output_dir: Folder for the report and, where the network is changed, a checkpoint of the
            purified one: ``mnp-report.html``, ``mnp-report.json`` and ``mnp.ckpt``, as
            :class:`~lightning_mnp.callback.MNPCallback` writes them. If None, nothing is
            written.
        triggered_loader: Triggered test images, to measure attack success before and after, as for
            :class:`~lightning_mnp.callback.MNPCallback`.

    Attributes:
        rates: CA and ASR before and after, as they are logged, if they were measured.
        report: The outcome, after the fit; None before. A further fit begins without it.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2))
        >>> MNPModule(network, when="never")(torch.zeros(3, 1, 2, 2)).shape
        torch.Size([3, 2])
    """


class _TrainerUpdates:
    """Backward passes and steps through the Trainer: precision, scaling and step counts."""

    def __init__(self, module: MNPSteps) -> None:
        self._module = module

    def _wrapped(self, optimizer: torch.optim.Optimizer) -> LightningOptimizer:
        wrapped = cast("list[LightningOptimizer]", self._module.optimizers())
        return next(entry for entry in wrapped if entry.optimizer is optimizer)

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._module.manual_backward(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self._wrapped(optimizer).step()
