from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpoint_files import rewrite_member
from helpers import UserModule, loader, quiet_trainer, trained_network
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.write import write_state_dict
from lightning_mnp.hosting.checkpoint_io import CheckedCheckpointIO, use_checked_io


def content(**changes: Any) -> dict[str, Any]:
    made = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.0"}
    return {**made, "state_dict": {"weight": torch.ones(2)}, **changes}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_training_is_the_same_as_without_the_checks(tmp_path: Path) -> None:
    """Everything that Lightning keeps comes through: optimizers, schedulers, loops, callbacks."""

    class Module(UserModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])
            return [optimizer], [schedule]

    def train(epochs: int, ckpt_path: Path | None = None, checked: bool = False) -> L.Trainer:
        callback = L.pytorch.callbacks.ModelCheckpoint(
            tmp_path / f"kept{epochs}{checked}", save_last=True
        )
        options = {"enable_checkpointing": True, "callbacks": [callback]}
        trainer = quiet_trainer(max_epochs=epochs, default_root_dir=tmp_path, **options)
        if checked:
            use_checked_io(trainer)
            assert type(trainer.strategy.checkpoint_io) is CheckedCheckpointIO
        trainer.fit(
            Module(trained_network(steps=2).train()),
            loader(),
            ckpt_path=ckpt_path,
            weights_only=True,
        )
        return trainer

    train(1).save_checkpoint(tmp_path / "one.ckpt")
    plain, checked = (train(2, tmp_path / "one.ckpt", checked) for checked in (False, True))
    assert checked.global_step == plain.global_step == 6
    first, second = plain.model.state_dict(), checked.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    torch.save(content(), path)
    found = CheckedCheckpointIO().load_checkpoint(path)
    path.write_bytes(b"")
    assert torch.equal(found["state_dict"]["weight"], torch.ones(2))


def test_safetensors_are_no_lightning_checkpoint(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "a.safetensors", {"weight": torch.ones(1)})
    message = r"Lightning checkpoint, .*, but got .*a\.safetensors\. For other files use `audit`"
    with pytest.raises(CheckpointError, match=message):
        CheckedCheckpointIO().load_checkpoint(tmp_path / "a.safetensors")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    weight = torch.ones(2)
    torch.save(content(state_dict={"a": weight, "b": weight}), tmp_path / "run.ckpt")
    found = CheckedCheckpointIO().load_checkpoint(tmp_path / "run.ckpt")["state_dict"]
    assert found["a"].data_ptr() == found["b"].data_ptr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dict": {"a": torch.tensor([1.0, torch.nan])}}, "NaN or infinity: a"),
        ({"state_dict": {"a": torch.tensor([torch.inf])}}, "NaN or infinity: a"),
        ({"state_dict": {"\x1b[2J": torch.ones(1)}}, r"to be printable, but got: \\x1b\[2J"),
        ({"state_dict": {3: torch.ones(1)}}, "to be printable, but got: 3"),
        ({"state_dict": None}, "to be a Lightning checkpoint, with the weights under"),
        ({"optimizer_states": [torch.ones(1).expand(10**7, 10**7)]}, "declare 400,000,000,000,0"),
        ({"callbacks": {"c": CheckpointError}}, "refused and nothing in it was run"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    torch.save(content(**changes), tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match=message):
        CheckedCheckpointIO().load_checkpoint(tmp_path / "run.ckpt", weights_only=False)


def test_plain_state_dict_is_no_lightning_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="For other files use `audit` or `defend`;"):
        CheckedCheckpointIO().load_checkpoint(tmp_path / "run.pt")
    torch.save([1], tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="to be a Lightning checkpoint"):
        CheckedCheckpointIO().load_checkpoint(tmp_path / "run.pt")


@pytest.mark.parametrize("path", ["https://example.org/run.ckpt", "memory://run.ckpt", "."])
def test_only_local_files(path: str) -> None:
    with pytest.raises(CheckpointError, match="`ckpt_path` to be an existing file"):
        CheckedCheckpointIO().load_checkpoint(path)


def test_extra_state_that_is_no_tensor_is_kept(tmp_path: Path) -> None:
    weights = {"weight": torch.ones(1), "_extra_state": {"version": 2}}
    torch.save(content(state_dict=weights), tmp_path / "run.ckpt")
    found = CheckedCheckpointIO().load_checkpoint(tmp_path / "run.ckpt")
    assert found["state_dict"]["_extra_state"] == {"version": 2}


def test_nesting_beyond_what_python_copies(tmp_path: Path) -> None:
    torch.save(content(deep=[]), tmp_path / "run.ckpt")
    lists = b"X\x04\x00\x00\x00deep" + b"]" * 50_000 + b"a" * 49_999 + b"s."
    rewrite_member(tmp_path / "run.ckpt", "data.pkl", lambda _: b"\x80\x02}" + lists)
    with pytest.raises(CheckpointError, match="cannot be copied"):
        CheckedCheckpointIO().load_checkpoint(tmp_path / "run.ckpt")


def test_reader_of_the_user_stays() -> None:
    own = AsyncCheckpointIO()
    trainer = quiet_trainer(plugins=[own])
    use_checked_io(trainer)
    assert trainer.strategy.checkpoint_io is own
