"""MNPCallback: audits, and defends, at the end of any training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset

from lightning_mnp.api import run_defense
from lightning_mnp.config import MNPConfig
from lightning_mnp.defense import MNPDefense, When
from lightning_mnp.defense_set import DefenseSet, Unpack, unpack_batch
from lightning_mnp.forward import Forward
from lightning_mnp.result import DefenseReport

__all__ = ["MNPCallback", "find_defense_set", "refuse_sharded_models"]

_SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def refuse_sharded_models(trainer: Trainer) -> None:
    """Raise where no process holds the whole network.

    Raises:
        MisconfigurationException: With a strategy that shards the weights.
    """
    if isinstance(trainer.strategy, _SHARDED):
        raise MisconfigurationException(
            f"Expected a strategy that keeps the whole network in every process, such as 'auto' "
            f"or 'ddp', but got {type(trainer.strategy).__name__}. Train with it, save the full "
            "weights and call `lightning_mnp.defend` on them."
        )


def find_defense_set(
    trainer: Trainer, module: LightningModule, given: Any, unpack: Unpack
) -> DefenseSet:
    """Read the defense set: as given, or from a ``defense_dataloader`` hook.

    Args:
        trainer: The Trainer, whose datamodule may have the hook.
        module: The LightningModule, which may have the hook.
        given: A loader or a defense set, or None.
        unpack: Takes images and labels out of a batch.

    Raises:
        MisconfigurationException: If there is neither. The training set is never taken for it:
            it may be the poisoned one.
    """
    if given is None:
        datamodule = getattr(trainer, "datamodule", None)
        for owner in (datamodule, module):
            hook = getattr(owner, "defense_dataloader", None)
            if callable(hook):
                return DefenseSet.from_loader(hook(), unpack)
        raise MisconfigurationException(
            "Expected a defense set of clean images, but got none. Give a loader as "
            "`defense_loader`, or add a method `defense_dataloader()` to the datamodule or the "
            "LightningModule. The training set is not used: it may be poisoned."
        )
    if isinstance(given, Dataset):
        given = DataLoader(given, batch_size=100)
    return DefenseSet.from_loader(given, unpack)


def _is_trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))  # set outside of the typed attributes


class MNPCallback(Callback):
    """Audit the network when training ends, and prune it where asked.

    At the end of ``Trainer.fit`` the verdict is logged to every logger under ``mnp/``, and the
    report is written as JSON. Where filters are pruned, the LightningModule that was trained is
    changed in place, and a checkpoint of it is written beside the report: a ``ModelCheckpoint``
    has saved the network before. Training itself, its random state included, is not affected.

    Args:
        when: ``"never"`` audits only, ``"flagged"`` prunes if the verdict is ``"backdoored"``,
            ``"always"`` prunes in any case.
        defense_loader: Clean, labeled images: a data loader, a data set or a
            :class:`~lightning_mnp.defense_set.DefenseSet`. Where None, the method
            ``defense_dataloader()`` of the datamodule or the LightningModule gives it.
        config: Options of the method.
        network: Dotted name of the submodule that classifies, where the LightningModule has no
            ``forward`` of its own.
        forward: A function (network, images) that calls it and returns the logits.
        unpack: A function (batch) that gives images and labels.
        output_dir: Folder of the report and the purified checkpoint; where None, the logger's
            folder, or the Trainer's ``default_root_dir``.

    Attributes:
        report: The outcome, after training; None before.

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
    ) -> None:
        if when not in get_args(When):
            raise ValueError(
                f"Expected argument `when` to be one of {get_args(When)}, but got {when!r}."
            )
        self.when = when
        self.defense_loader = defense_loader
        self.config = config or MNPConfig()
        self.network = network
        self.forward = forward
        self.unpack = unpack
        self.output_dir = output_dir
        self.report: DefenseReport | None = None
        self._data: DefenseSet | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that shard the network."""
        if stage == "fit":
            refuse_sharded_models(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the defense set and try it on the network, so that mistakes show before training."""
        with isolate_rng():
            self._data = find_defense_set(trainer, pl_module, self.defense_loader, self.unpack)
            self._defense(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit the trained network, prune it where asked, log and write the outcome."""
        with isolate_rng():
            defense = self._defense(trainer, pl_module)
            bar = trainer.progress_bar_callback is not None and trainer.is_global_zero
            run_defense(defense, progress=bar and not _is_trial(trainer))
            # All processes computed the same; one is followed, so that rounding cannot part them.
            defense.removed = trainer.strategy.broadcast(defense.removed)
            self.report = trainer.strategy.broadcast(defense.report())
            if len(defense.removed):
                defense.prune_()
        for logger in trainer.loggers:
            logger.log_metrics(self.report.metrics(), step=trainer.global_step)
        rank_zero_info(f"MNP audit\n{self.report}")
        if not _is_trial(trainer):
            self._write(trainer, self.report)

    def _defense(self, trainer: Trainer, module: LightningModule) -> MNPDefense:
        assert self._data is not None
        config = self.config
        if _is_trial(trainer):
            config = replace(
                config,
                runs=1,
                suppression_epochs=1,
                mask_epochs=1,
                rule="count",
                amount=1,
                verdict="ratio",
            )
        return MNPDefense(
            module,
            self._data,
            config,
            when=self.when,
            network=self.network,
            forward=self.forward,
            autocast=trainer.precision_plugin.forward_context,
        )

    def _write(self, trainer: Trainer, report: DefenseReport) -> None:
        folder = Path(self.output_dir or trainer.log_dir or trainer.default_root_dir)
        folder = Path(trainer.strategy.broadcast(str(folder)))
        name = "mnp"
        number = 0
        while (folder / f"{name}-report.json").exists() or (folder / f"{name}.ckpt").exists():
            number += 1
            name = f"mnp-v{number}"
        name = trainer.strategy.broadcast(name)
        if trainer.is_global_zero:
            report.save(folder / f"{name}-report.json")
        if report.pruned:
            trainer.save_checkpoint(folder / f"{name}.ckpt", weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """Keep the outcome in checkpoints, as primitives."""
        return {} if self.report is None else {"report": self.report.to_dict()}
