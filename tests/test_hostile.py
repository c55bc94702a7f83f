"""Hostile files and names through every door: nothing runs, nothing is left, nothing is printed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import RunsCommand, rewrite_member
from commands import COMMON
from commands import QUICK as SHORT
from helpers import CLASSES, loader, quick_config
from lightning.pytorch import LightningDataModule
from torch import nn

import lightning_mnp
from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.read import read_state_dict
from lightning_mnp.cli import entry
from lightning_mnp.cli.command_line import main
from lightning_mnp.cli.trainer import MNPTrainer
from lightning_mnp.models import Classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.usefixtures("short_searches"),
]

QUICK = [*SHORT, "--mnp.verdict.rule=ratio"]
HOSTILE_NAMES = ["\x1b[31mred\x07", "<script>alert(1)</script>", "/etc/up", "a&b\u202e\x9b2J"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])
    return folder


def save(path: Path, **changes: Any) -> None:
    weights = Classifier(width=4, in_channels=1).state_dict()
    content = {"pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 0}
    torch.save({**content, "state_dict": weights, "optimizer_states": [], **changes}, path)


def tuples_in_tuples(doublings: int) -> bytes:
    """A dict whose key is a tuple of two equal tuples of two equal tuples, and so on."""
    return b"\x80\x02}q\x01)q\x00" + b"h\x00h\x00\x86q\x00" * doublings + b"h\x01h\x00K\x01s."


def runs_code(path: Path) -> None:
    save(path, callbacks={"state": RunsCommand(path.with_name("executed"))})


def old_format_runs_code(path: Path) -> None:
    content = {"state_dict": {}, "callbacks": RunsCommand(path.with_name("executed"))}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}.", zipfile.ZIP_STORED)
        archive.writestr("bomb/data/0", bytes(50_000_000))


def endless_hash(path: Path) -> None:
    save(path)
    rewrite_member(path, "data.pkl", lambda _: tuples_in_tuples(60))


def truncated(path: Path) -> None:
    save(path)
    path.write_bytes(path.read_bytes()[:-1000])


def flipped(path: Path) -> None:
    save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def huge_shape(path: Path) -> None:
    save(path, loops={"state": torch.ones(1).expand(10**7, 10**7)})


def infinite_weights(path: Path) -> None:
    weights = Classifier(width=4, in_channels=1).state_dict()
    next(iter(weights.values())).view(-1)[0] = torch.inf
    save(path, state_dict=weights)


def odd_names(path: Path) -> None:
    weights = Classifier(width=4, in_channels=1).state_dict()
    save(path, state_dict={**weights, **{name: torch.ones(1) for name in HOSTILE_NAMES}})


CORPUS: list[Callable[[Path], None]] = [
    runs_code,
    old_format_runs_code,
    zip_bomb,
    endless_hash,
    truncated,
    flipped,
    huge_shape,
    infinite_weights,
    odd_names,
]


def assert_refused(
    args: list[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    run: Callable[[list[str]], int] = main,
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert run(args) == 2
    captured = capsys.readouterr()
    message = captured.err[captured.err.index("error: ") :]
    assert all(line.isprintable() for line in message.splitlines())
    assert not set(captured.out + captured.err) & set("\x1b\x07\x9b\u202e")
    left = {path: path.read_bytes() for path in folder.iterdir()}
    left.pop(folder / "config.yaml", None)  # `fit` keeps the user's configuration
    assert left == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["work"]


@pytest.mark.parametrize("make", CORPUS)
def test_refused_by_test(
    make: Callable[[Path], None], own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(own_folder / "hostile.ckpt")
    assert_refused(["test", *COMMON, "--ckpt_path=hostile.ckpt"], own_folder, capsys)


@pytest.mark.parametrize("make", [zip_bomb, endless_hash, infinite_weights, odd_names])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_refused_by_fit_and_validate(
    make: Callable[[Path], None],
    command: str,
    own_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(own_folder / "hostile.ckpt")
    args = [command, *COMMON, "--ckpt_path=hostile.ckpt"]
    args += ["--trainer.max_epochs=1"] if command == "fit" else []
    assert_refused(args, own_folder, capsys)


def test_asking_to_trust_the_file_changes_nothing(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_code(own_folder / "hostile.ckpt")
    args = ["test", *COMMON, "--ckpt_path=hostile.ckpt", "--weights_only=false"]
    assert_refused(args, own_folder, capsys)


# What is beside the weights is not even looked at, however large it says it is.
@pytest.mark.parametrize("make", [make for make in CORPUS if make is not huge_shape])
@pytest.mark.parametrize("command", ["audit", "defend"])
def test_refused_by_audit_and_defend(
    make: Callable[[Path], None],
    command: str,
    own_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(own_folder / "hostile.ckpt")
    args = [command, *COMMON, *QUICK, "--ckpt_path=hostile.ckpt", "--report=report.json"]
    args += ["--output=purified.ckpt"] if command == "defend" else []
    assert_refused(args, own_folder, capsys)


@pytest.mark.parametrize("make", [make for make in CORPUS if make is not huge_shape])
def test_refused_by_scan(
    make: Callable[[Path], None], own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(own_folder / "hostile.ckpt")
    args = ["scan", "hostile.ckpt", "--images=images", "--arch=cifar_resnet18"]
    assert_refused(args, own_folder, capsys, run=entry.main)


@pytest.mark.parametrize("doublings", [25, 60, 5000])
def test_tuples_in_tuples_take_no_time(tmp_path: Path, doublings: int) -> None:
    """Reading this key would take a second, thousands of years, and longer."""
    path = tmp_path / "hostile.pt"
    torch.save({"weight": torch.ones(1)}, path)
    rewrite_member(path, "data.pkl", lambda _: tuples_in_tuples(doublings))
    started = time.process_time()
    with pytest.raises(CheckpointError, match="uses the same tuples or lists again and again"):
        read_state_dict(path)
    path.write_bytes(tuples_in_tuples(doublings))  # the format before zip archives
    with pytest.raises(CheckpointError, match="uses the same tuples or lists again and again"):
        read_state_dict(path)
    assert time.process_time() - started < 1


def test_deep_tuples_do_not_break_the_process(tmp_path: Path) -> None:
    """As the key of a dict, hashed by calls in C for every level."""
    path = tmp_path / "hostile.pt"
    torch.save({"weight": torch.ones(1)}, path)
    deep = b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s."
    rewrite_member(path, "data.pkl", lambda _: deep)
    with pytest.raises(CheckpointError, match="puts tuples into tuples more than 1,000 deep"):
        read_state_dict(path)


def test_tuples_that_are_used_again_are_read(tmp_path: Path) -> None:
    betas = (0.9, (0.99, 0.999))
    groups = [{"betas": betas, "pair": (betas, betas)} for _ in range(1000)]
    torch.save({"state_dict": {"weight": torch.ones(1)}, "groups": groups}, tmp_path / "a.ckpt")
    assert list(read_state_dict(tmp_path / "a.ckpt")) == ["weight"]


# Names of layers


class Odd(Classifier):
    """A classifier whose layers have names that do harm where they are printed or joined."""

    def __init__(self) -> None:
        super().__init__(width=4, in_channels=1)
        self.network = nn.Sequential()
        sizes = [1, 4, 4, 4, 4]
        for name, size, following in zip(HOSTILE_NAMES, sizes, sizes[1:], strict=False):
            self.network.add_module(name, nn.Conv2d(size, following, 3, padding=1))
        self.network.add_module("head", nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES)))


class Data(LightningDataModule):
    def defense_dataloader(self) -> Any:
        return loader()


def assert_harmless(text: str) -> None:
    assert not set(text) & set("\x1b\x07\x9b\u202e<>&")
    assert all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_names_stay_names(
    suffix: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Odd()
    torch.save(model.state_dict(), "odd.pt")
    trainer = MNPTrainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    capsys.readouterr()
    config = quick_config(runs=1, amount=4, verdict="ratio")
    output, report = Path(f"out{suffix}"), Path("report.json")
    outcome = trainer.defend(model, Path("odd.pt"), output, Data(), "always", config, report)

    captured = capsys.readouterr()
    assert_harmless(captured.out.replace("<=", "") + captured.err)
    assert_harmless(report.read_text("utf-8"))
    found = json.loads(report.read_text("utf-8"))
    assert found["pruned"] == [list(pair) for pair in outcome.pruned]
    assert {name for name, _ in outcome.pruned} <= {f"network.{name}" for name in HOSTILE_NAMES}
    assert set(read_state_dict(output)) == set(model.state_dict())
    assert sorted(path.name for path in own_folder.iterdir()) == sorted(
        ["odd.pt", output.name, report.name]
    )
    assert sorted(path.name for path in own_folder.parent.iterdir()) == ["work"]


def test_text_of_a_report_is_printable() -> None:
    report = lightning_mnp.DefenseReport(
        "clean", reasons=list(HOSTILE_NAMES), warnings=list(HOSTILE_NAMES)
    )
    assert all(line.isprintable() for line in str(report).splitlines())
    assert_harmless(report.to_json())
    assert json.loads(report.to_json())["reasons"] == HOSTILE_NAMES


def test_markup_in_paths_is_printed_as_it_is(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Classifier(width=4, in_channels=1).state_dict(), "weights.pt")
    args = ["defend", *COMMON, *QUICK, "--ckpt_path=weights.pt", "--output=[bold]:skull:.pt"]
    assert main(args) in (0, 3, 4)
    assert "Weights written to [bold]:skull:.pt" in capsys.readouterr().out


# The command line under faults


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--output=out.onnx"], "`output` to end in one of"),
        (["--output=weights.pt"], "`output` not to exist"),
        (["--output=/proc/self/out.pt"], "`output` to be where files can be written"),
        (["--output=out.pt", "--report=/proc/self/a.json"], "`report` to be where files can"),
        (["--output=out.pt", "--report=."], "`report` not to exist"),
        (["--output=out.pt", "--state_file=/proc/self/s"], "`state_file` to be where files can"),
        (["--output=out.pt", "--state_file=out.pt"], "to name different files"),
        (["--output=out.pt", "--report=r", "--state_file=r"], "to name different files"),
    ],
)
def test_places_are_tried_before_the_work(
    extra: list[str],
    message: str,
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(Classifier(width=4, in_channels=1).state_dict(), "weights.pt")
    monkeypatch.setattr("lightning_mnp.cli.audits.read_weights", None)  # the first work there is
    assert main(["defend", *COMMON, *QUICK, "--ckpt_path=weights.pt", *extra]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in own_folder.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize("spoiled", ["write_state_dict", "DefenseReport.save"])
def test_failed_output_keeps_the_progress(
    spoiled: str,
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk fills up at the very end: the same call, made again, has only that to do."""
    torch.save(Classifier(width=4, in_channels=1).state_dict(), "weights.pt")
    args = ["defend", *COMMON, *QUICK, "--ckpt_path=weights.pt", "--state_file=state.pt"]
    args += ["--output=out.pt", "--report=report.json"]

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"lightning_mnp.cli.trainer.{spoiled}", full)
        assert main(args) == 2
    assert "No space left on device" in capsys.readouterr().err
    written = ["out.pt"] if spoiled == "DefenseReport.save" else []
    names = sorted(path.name for path in own_folder.iterdir())
    assert names == sorted([*written, "state.pt", "weights.pt"])
    for name in written:
        Path(name).rename("first.pt")
    monkeypatch.setattr("lightning_mnp.mnp.suppression.CleanSuppression.step", None)
    assert main(args) in (0, 3, 4)
    names = sorted(path.name for path in own_folder.iterdir())
    assert names == sorted(["out.pt", "report.json", "weights.pt", *["first.pt"] * len(written)])


def test_an_interrupted_training_ends_with_130(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning ends the process by itself then, with code 1."""
    step = "lightning_mnp.models.Classifier.training_step"
    monkeypatch.setattr(step, lambda *args: signal.raise_signal(signal.SIGINT))
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["fit", *COMMON, "--trainer.max_epochs=1"]) == 130
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_a_terminated_training_ends_with_143(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning would end the process with 0, as if the training were complete."""
    earlier = Classifier.training_step

    def step(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return earlier(*args)

    monkeypatch.setattr(Classifier, "training_step", step)
    assert main(["fit", *COMMON, "--trainer.max_epochs=1"]) == 143
    assert capsys.readouterr().err.endswith("terminated\n")


def test_interrupted_command_ends_with_130_and_goes_on(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Classifier(width=4, in_channels=1).state_dict(), "weights.pt")
    before = Path("weights.pt").read_bytes()
    args = ["defend", *COMMON, *QUICK, "--ckpt_path=weights.pt", "--state_file=state.pt"]
    args += ["--output=out.pt", "--when=always"]
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            masks = "lightning_mnp.mnp.dual_masks.DualMask.step"
            patch.setattr(masks, lambda *args: signal.raise_signal(signal.SIGINT))
            assert main(args) == 130
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert sorted(path.name for path in own_folder.iterdir()) == ["state.pt", "weights.pt"]
    assert Path("weights.pt").read_bytes() == before
    assert_resumes(args, monkeypatch)


def assert_resumes(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    resumed_at = []

    def look(defense: Any, *args: Any) -> None:
        resumed_at.append(defense.position)
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_mnp.engine.defense.MNPDefense.step", look)
    assert main(args) == 130
    assert resumed_at[0] >= 1


# A shell that starts something in the background has it ignore SIGINT.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from lightning_mnp.cli import entry
from lightning_mnp.cli.command_line import main
sys.exit(main())
"""


@pytest.mark.slow  # starting a process takes longer than the test above, which is the same in one
def test_process_that_gets_sigint_ends_with_130(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C as it is: a signal to a process, which the same command then takes up again."""
    torch.save(Classifier(width=4, in_channels=1).state_dict(), "weights.pt")
    before = Path("weights.pt").read_bytes()
    endless = ["--mnp.suppression.epochs=1000000", "--mnp.masks.epochs=1000000", "--when=always"]
    args = ["defend", *COMMON, *QUICK, *endless, "--ckpt_path=weights.pt", "--output=out.pt"]
    args += ["--report=report.json", "--state_file=state.pt"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *args], stderr=subprocess.PIPE, text=True
    )
    try:
        patience = time.monotonic() + 300
        while not Path("state.pt").exists() and process.poll() is None:
            assert time.monotonic() < patience
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.endswith("interrupted\n")
    assert "Traceback" not in errors
    assert sorted(path.name for path in own_folder.iterdir()) == ["state.pt", "weights.pt"]
    assert Path("weights.pt").read_bytes() == before
    assert_resumes(args, monkeypatch)


def test_command_without_memory_ends_with_2(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Classifier(width=4, in_channels=1).state_dict(), "weights.pt")

    def exhaust(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("lightning_mnp.mnp.suppression.CleanSuppression.step", exhaust)
    assert main(["audit", *COMMON, *QUICK, "--ckpt_path=weights.pt"]) == 2
    assert "in phase 'suppression', run 1, in a batch of 40 images" in capsys.readouterr().err
