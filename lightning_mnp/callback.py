"""MNPCallback: audits, and defends, at the end of any training."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from torch.nn.utils.prune import is_pruned
from torch.utils.data import Dataset

from lightning_mnp.config import MNPConfig, require_config
from lightning_mnp.defense_data.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.engine.defense import MNPDefense, When
from lightning_mnp.engine.runner import run_defense
from lightning_mnp.hosting.lightning_host import (
    check_host,
    engine_autocast,
    find_defense_set,
    follow_first,
    output_folder,
    refuse_other_processes,
    saved_checkpoints,
    write_outcome,
)
from lightning_mnp.hosting.loggers import is_a, log_outcome
from lightning_mnp.hosting.rates import check_triggered, measure_hosted_rates
from lightning_mnp.report import DefenseReport
from lightning_mnp.report.notice import notice
from lightning_mnp.surgery.forward import Forward
from lightning_mnp.surgery.network import network_forward, weights_digest

__all__ = ["MNPCallback"]

# What `fast_dev_run` makes: each stage once, and nothing that takes long.
_TRIAL = {
    "suppression.runs": 1,
    "suppression.epochs": 1,
    "masks.epochs": 1,
    "pruning.rule": "count",
    "pruning.amount": 1,
    "verdict.rule": "ratio",
}


def _is_trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # set outside of the typed attributes


def _ends_in_weights(pruning: Any) -> bool:
    """Whether its masks become part of the weights when training ends, as is the default."""
    return bool(getattr(pruning, "_make_pruning_permanent", True))


class MNPCallback(Callback):
    """Audit the network when training ends, and write a purified one beside it.

    At the end of ``Trainer.fit`` the verdict is logged to every logger under ``mnp/``, and the
    report is written as a page and as JSON. If there is a purified network, its checkpoint is
    written beside the report. The network in memory, and what a ``ModelCheckpoint`` saves, stay
    as they were trained, bit for bit, unless ``in_place=True``. A verdict other than ``"clean"``
    is told by a ``UserWarning``. Training itself, its random state included, is not affected. A
    Trainer takes one such callback; audit other submodules with :func:`~lightning_mnp.audit`.

    Args:
        when: ``"never"`` audits only, ``"flagged"`` makes a purified network if the verdict is
            ``"backdoored"``, ``"always"`` makes one in any case.
        defense_loader: Clean, labeled images: a data loader, a data set or a
            :class:`~lightning_mnp.defense_data.defense_set.DefenseSet`. If None, the method
            ``defense_dataloader()`` of the datamodule or the LightningModule gives it.
        config: Options of the method.
        network: Dotted name of the submodule that classifies, if the LightningModule has no
            ``forward`` of its own.
        forward: A function (network, images) that calls it and returns the logits.
        unpack: A function (batch) that gives images and labels.
        output_dir: Folder of the report and the purified checkpoint; if None, the logger's
            folder, or the Trainer's ``default_root_dir``.
        in_place: Whether the network in memory is pruned, too. It makes no difference with
            ``when="never"``.
        triggered_loader: Triggered test images, to measure attack success before and after: yields
            (images, attacker's labels, true labels). It is read several times, so no generator. If
            None, a datamodule of this package with an attack gives it, and clean test images as
            well. No part of the audit.

    Attributes:
        rates: CA and ASR before and after, as they are logged, if they were measured.
        report: The outcome, after training; None before.
        purified_path: The checkpoint of the purified network; None if none was written.

    Raises:
        ValueError: If ``when`` is not one of the three.

    Example:
        >>> MNPCallback(when="never").report is None
        True
    """

    def __init__(
        self,
        when: When = "flagged",
        defense_loader: Iterable[Any] | Dataset[Any] | None = None,
        config: MNPConfig | None = None,
        network: str | None = None,
        forward: Forward | None = None,
        unpack: Unpack = unpack_batch,
        output_dir: Path | str | None = None,
        in_place: bool = False,
        triggered_loader: Iterable[Any] | None = None,
    ) -> None:
        if when not in get_args(When):
            raise ValueError(
                f"Expected argument `when` to be one of {get_args(When)}, but got {when!r}."
            )
        self.when = when
        self.defense_loader = defense_loader
        self.config = require_config(config)
        self.network = network
        self.forward = forward
        self.unpack = unpack
        self.output_dir = output_dir
        self.in_place = in_place
        self.triggered_loader = triggered_loader
        self.rates: dict[str, float] = {}
        self.report: DefenseReport | None = None
        self.purified_path: Path | None = None
        self._data: DefenseSet | None = None
        self._folder: Path | None = None
        self._failure: Exception | None = None
        self._is_pruned = False  # whether the network in memory is the purified one just now
        self._left: str | None = None  # digest of the weights that the audit left in memory

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what does not leave the whole network, and go behind the other callbacks.

        Callbacks that average or prune weights when training ends have done so then, and a
        ``ModelCheckpoint`` that saves when training ends saves what is left.

        Raises:
            MisconfigurationException: With strategies that shard the network, weights that are
                not in float32, or a ``ModelPruning`` that leaves its masks beside the weights.
        """
        if stage != "fit":
            return
        check_host(trainer)
        refuse_other_processes(trainer)
        host: Any = trainer  # its callbacks are not among the typed attributes
        for callback in host.callbacks:
            if is_a(callback, "ModelPruning") and not _ends_in_weights(callback):
                raise MisconfigurationException(
                    "Expected weights that are parameters when training ends, but ModelPruning "
                    "has `make_pruning_permanent=False`, which leaves masks beside them. Set it to "
                    "True."
                )
        # A new list: the Trainer is going through the old one.
        others = [callback for callback in host.callbacks if callback is not self]
        savers = [callback for callback in others if is_a(callback, "Checkpoint")]
        host.callbacks = [c for c in others if c not in savers] + [self] + savers

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the defense set and try it on the network, so that mistakes show before training."""
        self.report = self.purified_path = self._failure = self._left = None
        self.rates = {}
        self._is_pruned = False
        trial = _is_trial(trainer)
        self._folder = None if trial else output_folder(trainer, self.output_dir)
        with isolate_rng():
            check_triggered(self.triggered_loader)
            self._data = find_defense_set(trainer, pl_module, self.defense_loader, self.unpack)
            if not is_pruned(pl_module):  # by ModelPruning, until training ends
                self._defense(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit the trained network, write, log and tell the outcome.

        An error waits until :meth:`on_fit_end`, so that what saves when training ends does so;
        not where other processes would wait for this one meanwhile.
        """
        try:
            self._audit(trainer, pl_module)
        except Exception as error:
            if trainer.world_size > 1:
                raise
            self._failure = error

    def _audit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with isolate_rng():
            defense = self._defense(trainer, pl_module)
            bar = trainer.progress_bar_callback is not None and trainer.is_global_zero

            def heed_sigterm(*step: Any) -> None:
                # Lightning only notes the signal, and looks at it between two batches.
                if trainer.received_sigterm:
                    raise SIGTERMException

            run_defense(defense, progress=bar and not _is_trial(trainer), observe=heed_sigterm)
            self.report = report = follow_first(defense)
            self._measure(trainer, pl_module, "before")
        rank_zero_info(f"MNP audit\n{report}")
        earlier = saved_checkpoints(trainer)
        files: tuple[Path | None, Path | None] = (None, None)
        unwritten = "Writing the outcome failed, as the error says."
        if self._folder is None:
            unwritten = (
                "Nothing was written: `fast_dev_run` only tries the steps, its verdict means "
                "nothing."
            )
        try:
            with self._purified(defense, pl_module, report.changes) as changed:
                if report.changes:
                    self._measure(trainer, pl_module, "after")
                # The files first: a logger that fails must not cost them.
                if self._folder is not None:
                    files, unwritten = write_outcome(trainer, report, self._folder, changed), ""
                if trainer.is_global_zero:
                    log_outcome(trainer.loggers, report, trainer.global_step, self.rates)
        finally:
            self.purified_path = files[1]
            if trainer.is_global_zero:
                self._tell(report, files, earlier, unwritten)
        self._left = weights_digest(pl_module) if self._is_pruned else report.weights_sha256

    def _measure(self, trainer: Trainer, module: LightningModule, ending: str) -> None:
        """Measure CA and ASR, if there are triggered images."""
        call = network_forward(module, self.network, self.forward)
        given = self.triggered_loader
        self.rates |= measure_hosted_rates(trainer, module, call, given, ending)

    @contextmanager
    def _purified(
        self, defense: MNPDefense, module: LightningModule, changes: bool
    ) -> Iterator[Collection[str]]:
        """Hold the purified network in the module, so that it can be saved; for good if wanted.

        Yields:
            Names of the weights that are changed.
        """
        if not changes:
            yield ()
            return
        pruning = defense.prune_()
        self._is_pruned = True
        try:
            yield pruning.saved.keys()
        finally:
            if not self.in_place:
                pruning.undo(module)
                self._is_pruned = False

    def _tell(
        self,
        report: DefenseReport,
        files: tuple[Path | None, Path | None],
        earlier: list[str],
        unwritten: str,
    ) -> None:
        """Say what was found and done: a warning, which no logger's level hides, if not clean."""
        text = notice(
            report,
            in_place=self.in_place,
            searched=self.when != "never",
            written=files[0],
            purified=files[1],
            earlier=earlier,
            unwritten=unwritten,
        )
        if report.verdict == "clean":
            rank_zero_info(text)
        else:
            warnings.warn(text, stacklevel=2)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise what the audit raised; warn if there was none, or its outcome was undone.

        Raises:
            Exception: Whatever the audit raised when training ended.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if not trainer.is_global_zero:
            return
        if self._left is not None and self._left != weights_digest(pl_module):
            done = "pruned" if self._is_pruned else "audited"
            warnings.warn(
                f"MNPCallback has {done} the network, but its weights were changed after that: "
                "something that runs when training ends, such as the module's `on_train_end`, has "
                "put others in place. Audit the network again with `lightning_mnp.audit`.",
                stacklevel=2,
            )
        if self.report is None:
            warnings.warn(
                "MNPCallback has not audited the network: there was nothing to train. Call "
                "`lightning_mnp.audit` or `lightning_mnp.defend` on it.",
                stacklevel=2,
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep other callbacks from saving a state from before the pruning, such as an average."""
        if self._is_pruned:
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()

    def _defense(self, trainer: Trainer, module: LightningModule) -> MNPDefense:
        assert self._data is not None
        config = self.config
        if _is_trial(trainer):
            config = config.changed(_TRIAL)
        return MNPDefense(
            module,
            self._data,
            config,
            when=self.when,
            network=self.network,
            forward=self.forward,
            autocast=engine_autocast(trainer),
        )

    def state_dict(self) -> dict[str, Any]:
        """Keep the outcome in checkpoints, as primitives, and whether the weights are purified."""
        if self.report is None:
            return {}
        return {"report": self.report.to_dict(), "purified": self._is_pruned}
