from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from digits_network import fitted_network
from helpers import same, snapshot
from lightning.pytorch import Trainer

from lightning_mnp import DefenseSet, MNPConfig
from lightning_mnp.benchmark.executors import HereExecutor
from lightning_mnp.cli.audits import FileAudit, audit_elsewhere, audit_files, load_file
from lightning_mnp.data import DigitsDataModule
from lightning_mnp.models import Classifier

pytestmark = pytest.mark.usefixtures("short_searches")


class Elsewhere:
    """An executor that stands for other processes."""

    slots = 2

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        assert work is audit_elsewhere
        return HereExecutor().submit(work, *arguments)


@pytest.fixture
def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)


@pytest.fixture
def audit() -> FileAudit:
    data = DigitsDataModule(defense_size=60)
    data.setup("fit")
    config = MNPConfig().changed(
        {"suppression.epochs": 1, "filters.include": ["*conv1"], "verdict.most_classes": 3}
    )
    model = Classifier(fitted_network())
    return FileAudit(model, DefenseSet.from_loader(data.defense_dataloader()), config)


def write(folder: Path, name: str, change: float) -> str:
    network = fitted_network()
    with torch.no_grad():
        list(network.parameters())[-1].mul_(1 + change)
    torch.save(network.state_dict(), folder / name)
    return str(folder / name)


def test_audits_elsewhere_give_what_those_here_give(
    tmp_path: Path, audit: FileAudit, trainer: Trainer
) -> None:
    files = [write(tmp_path, "a.pt", 0.0), write(tmp_path, "b.pt", 0.1)]
    here = dict(audit_files(audit, files, trainer, HereExecutor()))
    before = snapshot(audit.model)
    there = dict(audit_files(audit, files, trainer, Elsewhere()))
    assert same(before, snapshot(audit.model))  # processes share it, and load other weights each
    assert sorted(here) == sorted(there) == files
    for file in files:
        one, other = here[file], there[file]
        assert not isinstance(one, Exception)
        assert not isinstance(other, Exception)
        assert one.report.score == other.report.score
        assert min(one.seconds, other.seconds) > 0


def test_a_file_that_cannot_be_read_is_an_error_of_its_own(
    tmp_path: Path, audit: FileAudit, trainer: Trainer
) -> None:
    good, bad = write(tmp_path, "a.pt", 0.0), tmp_path / "bad.pt"
    bad.write_bytes(b"no weights")
    found = dict(audit_files(audit, [str(bad), good], trainer, HereExecutor()))
    assert isinstance(found[str(bad)], ValueError)
    assert "bad.pt" in str(found[str(bad)])
    assert not isinstance(found[good], Exception)


def test_a_model_that_cannot_be_sent_is_told_before_any_work(
    audit: FileAudit, trainer: Trainer
) -> None:
    audit.model.network.hook = lambda: None
    message = r"a model that can be sent to other processes \(option `jobs`\), but got one that can"
    with pytest.raises(ValueError, match=message):
        next(audit_files(audit, ["a.pt"], trainer, Elsewhere()))


def test_weights_of_a_file_come_into_the_model(tmp_path: Path, audit: FileAudit) -> None:
    file = write(tmp_path, "a.pt", 1.0)
    _, notes = load_file(audit.model, Path(file), None)
    expected = list(fitted_network().parameters())[-1]
    assert torch.equal(list(audit.model.parameters())[-1], 2 * expected)
    assert notes == []
