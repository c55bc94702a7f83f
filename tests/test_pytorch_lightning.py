"""The doors under the Trainer of `pytorch_lightning`, which shares no class with `lightning`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import loader, quick_config
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mnp import MNPCallback
from lightning_mnp.hosting.lightning_host import check_host
from lightning_mnp.pytorch_lightning import MNPModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MNPCallback. verdict"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
CONFIG = quick_config(verdict="ratio", runs=1, amount=1, mask_epochs=1)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(**options: Any) -> pl.Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults |= {"accelerator": "cpu", "enable_model_summary": False}
    return pl.Trainer(**{**defaults, **options})


def triggered() -> list[Any]:
    return [(images, 0 * labels, labels) for images, labels in loader()]


def test_module(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path / "logs"))
    places: dict[str, Any] = {"output_dir": tmp_path / "out", "triggered_loader": triggered()}
    module = MNPModule(small(), CONFIG, **places)
    options = {"callbacks": [pl.callbacks.RichProgressBar()], "enable_progress_bar": True}
    trainer(max_epochs=-1, logger=logger, log_every_n_steps=1, **options).fit(module, loader())
    assert module.report is not None
    assert len(module.report.pruned) == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"mnp-report.html", "mnp-report.json", "mnp.ckpt"}
    logged = Path(logger.log_dir, "metrics.csv").read_text()
    for name in ("mnp/suppression_loss", "mnp/undecided", "mnp/ASR_before", "mnp/ASR_after"):
        assert name in logged
    assert {"mnp-curves.csv", "mnp-masks.png"} <= {p.name for p in Path(logger.log_dir).iterdir()}


def test_callback(tmp_path: Path) -> None:
    callback = MNPCallback("always", loader(), CONFIG, triggered_loader=triggered())
    logger = CSVLogger(str(tmp_path))
    trainer(max_epochs=1, callbacks=[callback], logger=logger).fit(Plain(), loader())
    assert callback.report is not None
    assert callback.purified_path == Path(logger.log_dir, "mnp.ckpt")
    logged = Path(logger.log_dir, "metrics.csv").read_text()
    for name in ("mnp/backdoored", "mnp/undecided", "mnp/ASR_before", "mnp/ASR_after"):
        assert name in logged


def test_sharded_networks_are_refused() -> None:
    class Host:
        strategy = object.__new__(FSDPStrategy)

    with pytest.raises(Exception, match=r"keeps the whole network .* but got FSDPStrategy"):
        check_host(Host())  # type: ignore[arg-type]
