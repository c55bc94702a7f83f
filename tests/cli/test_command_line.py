from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import RunsFunction
from commands import COMMON, DATA, MODEL, QUICK, TRAINER
from helpers import same, snapshot
from streams import broken, in_ascii

from lightning_mnp.benchmark.networks import using_threads
from lightning_mnp.cli.command_line import MNPCLI, _exit_code, _named_command, main
from lightning_mnp.cli.entry import main as whole_command
from lightning_mnp.cli.words import COMMANDS
from lightning_mnp.models import Classifier
from lightning_mnp.report import DefenseReport, SecondAudit
from lightning_mnp.signals.verdict import Judgement

pytestmark = [
    pytest.mark.usefixtures("short_searches"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]

RATIO = "--mnp.verdict.rule=ratio"  # which needs no search


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "suspicious.pt"
    weights = Classifier(width=4, in_channels=1).state_dict()
    torch.save({"state_dict": weights, "note": RunsFunction(tmp_path / "executed")}, path)
    return path


@pytest.mark.parametrize(("verdict", "code"), [("clean", 0), ("backdoored", 3), ("undecided", 4)])
def test_audit_ends_with_the_exit_code_of_its_verdict(
    verdict: Any, code: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    judgement = Judgement(verdict, 0.5, 0.7, 0, ("a test says so",))
    monkeypatch.setattr("lightning_mnp.engine.case.judge", lambda *args, **kwargs: judgement)
    report = tmp_path / "report.json"
    args = ["audit", *COMMON, *QUICK, f"--ckpt_path={checkpoint}", f"--report={report}"]
    assert main(args) == code
    written = json.loads(report.read_text())
    assert written["verdict"] == verdict
    assert written["class_names"] == [str(digit) for digit in range(10)]
    assert "objects of checkpoint_files.leave_a_mark. They were skipped" in written["warnings"][0]
    assert not (tmp_path / "executed").exists()
    assert written["weights_file"]["name"] == str(checkpoint)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert written["weights_file"]["sha256"] == digest


@pytest.mark.parametrize(("second", "code"), [("clean", 0), ("backdoored", 3), ("undecided", 4)])
def test_defend_ends_with_the_verdict_on_what_it_has_written(second: Any, code: int) -> None:
    again = SecondAudit(second, 0.1, None, False, 0.9, 0.2, [])
    report = DefenseReport("backdoored", pruned=[("conv1", 0)], reaudit=again)
    for command, expected in (("defend", code), ("demo", 0)):
        cli = SimpleNamespace(subcommand=command, trainer=SimpleNamespace(report=report))
        assert _exit_code(cli) == expected


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("--when=never", 3),  # the network is the one that was audited
        ("--mnp.pruning.reaudit=false", 4),
    ],
)
def test_defend_without_a_second_audit(
    extra: str,
    code: int,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judgement = Judgement("backdoored", 0.5, 0.7, 0, ("a test says so",))
    monkeypatch.setattr("lightning_mnp.engine.case.judge", lambda *args, **kwargs: judgement)
    args = ["defend", *COMMON, *QUICK, RATIO, f"--ckpt_path={checkpoint}"]
    assert main([*args, "--output=purified.ckpt", extra]) == code
    told = "The purified copy was not audited again: nobody has judged it yet."
    assert (told in capsys.readouterr().out) == (code == 4)


@pytest.mark.parametrize(
    "suffix", [pytest.param(".pt", marks=pytest.mark.slow), ".ckpt", ".safetensors"]
)
def test_defend_writes_weights_that_load_strictly(
    suffix: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_mnp import load_into, read_state_dict

    before = checkpoint.read_bytes()
    output = tmp_path / f"purified{suffix}"
    args = ["defend", *COMMON, *QUICK, f"--ckpt_path={checkpoint}", f"--output={output}"]
    again = str(suffix == ".ckpt").lower()  # a second audit takes as long as the first
    assert main([*args, "--when=always", f"--mnp.pruning.reaudit={again}"]) in (0, 3, 4)
    assert checkpoint.read_bytes() == before
    purified = Classifier(width=4, in_channels=1)
    load_into(purified, read_state_dict(output))
    original = Classifier(width=4, in_channels=1)
    load_into(original, read_state_dict(checkpoint))
    changed = [
        name
        for name, tensor in original.state_dict().items()
        if not torch.equal(tensor, purified.state_dict()[name])
    ]
    assert changed
    told = capsys.readouterr()
    assert re.search(r"Purified: 3 of [\d,]+ filters pruned", told.out)
    assert "\x1b" not in told.out  # no terminal, no colors
    assert "Tip" not in told.err


def test_output_keeps_the_names_of_the_input(tmp_path: Path) -> None:
    network = Classifier(width=4, in_channels=1).network
    path, output = tmp_path / "plain.pt", tmp_path / "out.pt"
    torch.save(network.state_dict(), path)
    main(["defend", *COMMON, *QUICK, f"--ckpt_path={path}", f"--output={output}"])
    network.load_state_dict(torch.load(output, weights_only=True), strict=True)


class Counting(Classifier):
    """A model with a state beside its weights."""

    state: Any = None

    def get_extra_state(self) -> Any:
        return self.state or {"steps": 0}

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_defend_keeps_an_extra_state_or_refuses_the_format_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Counting(width=4, in_channels=1)
    torch.save(model.state_dict(), "counting.pt")
    args = ["defend", *COMMON, *QUICK, RATIO, "--when=never", f"--model={__name__}.Counting"]
    assert main([*args, "--ckpt_path=counting.pt", "--output=out.pt"]) in (0, 3, 4)
    model.load_state_dict(torch.load("out.pt", weights_only=True), strict=True)
    assert model.state == {"steps": 0}
    assert main([*args, "--ckpt_path=missing.pt", "--output=out.safetensors"]) == 2
    assert "but _extra_state is an extra state: builtins.dict" in capsys.readouterr().err


def test_purified_lightning_checkpoint_is_tested_by_lightning(
    checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "purified.ckpt"
    main(["defend", *COMMON, *QUICK, f"--ckpt_path={checkpoint}", f"--output={output}"])
    assert main(["test", *COMMON, f"--ckpt_path={output}"]) == 0


def test_nothing_is_overwritten(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checkpoint.read_bytes()
    args = ["defend", *COMMON, *QUICK, f"--ckpt_path={checkpoint}", f"--output={checkpoint}"]
    assert main(args) == 2
    assert "Nothing is overwritten" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ckpt_path=missing.pt"], "to be an existing file"),
        (["--ckpt_path=suspicious.pt", "--mnp.filters.include=[backbone.*]"], "matches none of"),
        (["--ckpt_path=suspicious.pt", "--model.width=8"], "Check the architecture"),
        (
            ["--ckpt_path=suspicious.pt", "--report=suspicious.pt"],
            "not to exist, but suspicious.pt",
        ),
    ],
)
def test_wrong_use_is_told_and_ends_with_2(
    extra: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *COMMON, *QUICK, *extra]) == 2
    assert message in capsys.readouterr().err


def test_wrong_option_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *COMMON, "--mnp.suppression.runs=0", "--ckpt_path=suspicious.pt"]) == 2
    assert (
        "Expected argument `suppression.runs` to be a whole number of at least 1, but got 0."
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as stop:
        main(["audit", *COMMON, "--mnp.suppressions.runs=3", "--ckpt_path=suspicious.pt"])
    assert stop.value.code == 2
    error, hint, usage = capsys.readouterr().err.splitlines()
    assert error == "error: unrecognized arguments: --mnp.suppressions.runs=3"
    assert hint == "Did you mean --mnp.suppression.runs?"
    assert usage.startswith("usage: lightning-mnp audit --config FILE [options]")


def test_hyperparameters_in_a_checkpoint_are_not_used(tmp_path: Path) -> None:
    """Lightning's own commands would build the model by what stands in the file."""
    model = Classifier(width=4, in_channels=1)
    path = tmp_path / "hostile.ckpt"
    hyperparameters = {"width": 999, "_class_path": "os.system"}
    content = {
        "state_dict": model.state_dict(),
        "hyper_parameters": hyperparameters,
        "pytorch-lightning_version": "2.6.0",
        "epoch": 0,
        "global_step": 0,
    }
    torch.save(content, path)
    assert main(["audit", *COMMON, *QUICK, f"--ckpt_path={path}"]) in (0, 3, 4)
    assert main(["test", *COMMON, f"--ckpt_path={path}"]) == 0


@pytest.mark.parametrize("command", ["test", "validate", "audit", "fit"])
def test_no_command_runs_code_from_a_checkpoint(command: str, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = tmp_path / "hostile.ckpt"
    content = {"state_dict": {}, "payload": Payload(), "pytorch-lightning_version": "2.6.0"}
    torch.save(content, path)
    extra = QUICK if command == "audit" else []
    epochs = ["--trainer.max_epochs=1"] if command == "fit" else []
    assert main([command, *COMMON, *extra, *epochs, f"--ckpt_path={path}"]) == 2
    assert not (tmp_path / "pwned").exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_training_goes_on_in_its_folder_and_another_is_kept_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = [option for option in TRAINER if "checkpointing" not in option]
    fit = ["fit", *MODEL, *DATA, *trainer, "--trainer.limit_train_batches=2"]
    fit += [f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert main([*fit, "--trainer.max_epochs=1"]) == 0
    [stopped] = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    assert main([*fit, "--trainer.max_epochs=1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: Expected argument `--trainer.default_root_dir` to be a folder")
    assert "go on with that training by `--ckpt_path`" in told
    assert main([*fit, "--trainer.max_epochs=2", f"--ckpt_path={stopped}"]) == 0
    assert "max_epochs: 2" in (tmp_path / "run" / "config.yaml").read_text()


def test_fit_then_audit_and_defend(tmp_path: Path) -> None:
    """The three commands one after the other, as in the README."""
    attack = ["--data.attack=lightning_mnp.attacks.BadNets", "--data.attack.patch_size=2"]
    trainer = [option for option in TRAINER if "checkpointing" not in option]
    fit = [*MODEL, *DATA, *attack, *trainer, "--trainer.max_epochs=1"]
    assert main(["fit", *fit, "--trainer.limit_train_batches=2"]) == 0
    [trained] = tmp_path.rglob("*.ckpt")
    args = [*COMMON, *QUICK, f"--ckpt_path={trained}"]
    assert main(["audit", *args]) in (0, 3, 4)
    assert main(["defend", *args, "--output=purified.ckpt"]) in (0, 3, 4)
    assert (tmp_path / "purified.ckpt").exists()


def test_demo_writes_networks_and_report(tmp_path: Path) -> None:
    quick = [*QUICK, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    quick += ["--model.width=4", "--data.image_size=8", "--trainer.enable_progress_bar=false"]
    quick += ["--mnp.pruning.reaudit=false"]
    with using_threads(2):
        assert main(["demo", *quick, f"--output_dir={tmp_path / 'demo'}"]) == 0
        assert torch.get_num_threads() == 2  # one while it runs
    names = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert names == ["backdoored.ckpt", "purified.ckpt", "report.html", "report.json"]
    assert main(["demo", *quick, f"--output_dir={tmp_path / 'demo'}"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]


@pytest.mark.parametrize("command", ["audit", "defend"])
def test_a_logger_that_fails_costs_no_file(
    command: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def gone(*args: Any) -> None:
        raise OSError("the server is gone")

    monkeypatch.setattr("lightning_mnp.cli.trainer.log_outcome", gone)
    files = ["--report=report.json", *(["--output=out.pt"] if command == "defend" else [])]
    args = [command, *COMMON, *QUICK, RATIO, f"--ckpt_path={checkpoint}", *files]
    assert main(args) == 2
    told = capsys.readouterr()
    assert "error: the server is gone" in told.err
    assert "Score" in told.out or "ratio" in told.out
    assert DefenseReport.load("report.json").filters > 0
    assert Path("out.pt").exists() == (command == "defend")


class Interrupted(io.StringIO):
    """Someone presses Ctrl-C while a pager does not take what is printed."""

    def write(self, text: str) -> int:
        raise KeyboardInterrupt


def full_disk() -> io.TextIOWrapper:
    return broken(errno.ENOSPC, buffered=True)


def closed_pipe() -> io.TextIOWrapper:
    return broken(errno.EPIPE)


@pytest.mark.parametrize("command", ["audit", "defend"])
@pytest.mark.parametrize(
    ("stdout", "code"),
    [(closed_pipe, 3), (full_disk, 3), (in_ascii, 3), (Interrupted, 130)],
)
def test_what_cannot_be_printed_costs_no_file(
    command: str, stdout: Any, code: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judgement = Judgement("backdoored", 0.5, 0.7, 0, ("an \xe9t\xe9 says so",))
    monkeypatch.setattr("lightning_mnp.engine.case.judge", lambda *args, **kwargs: judgement)
    monkeypatch.setattr(sys, "stdout", stdout())
    args = [command, *COMMON, *QUICK, RATIO, f"--ckpt_path={checkpoint}", "--report=report.json"]
    if command == "defend":
        args += ["--output=out.pt", "--when=never"]
    assert whole_command(args) == code
    assert DefenseReport.load("report.json").verdict == "backdoored"
    assert Path("out.pt").exists() == (command == "defend")


@pytest.mark.parametrize("command", ["audit", "defend"])
def test_a_file_that_cannot_be_written_costs_no_verdict(
    command: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any, **others: Any) -> None:
        raise OSError("the disk is full")

    name = "write_state_dict" if command == "defend" else "save_report"
    monkeypatch.setattr(f"lightning_mnp.cli.trainer.{name}", full)
    args = [command, *COMMON, *QUICK, RATIO, f"--ckpt_path={checkpoint}", "--report=report.json"]
    args += ["--output=out.pt", "--when=never"] if command == "defend" else []
    assert main(args) == 2
    told = capsys.readouterr()
    assert "error: the disk is full" in told.err
    assert "ratio" in told.out
    assert "written" not in told.out


def test_paths_may_begin_with_a_tilde(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    home = tmp_path / "home"
    home.mkdir()
    checkpoint.rename(home / "suspicious.pt")
    before = set(tmp_path.iterdir())
    Path("home", "files.yaml").write_text("report: ~/report.json\nckpt_path: ~/suspicious.pt\n")
    args = ["defend", "--config=home/files.yaml", *COMMON, *QUICK, RATIO, "--when=never"]
    seen = []
    monkeypatch.setattr(
        "lightning_mnp.cli.trainer.forget_state", lambda state_file: seen.append(state_file)
    )
    assert main([*args, "--output", "~/out.pt", "--state_file=~/state"]) in (0, 3, 4)
    assert (home / "out.pt").exists()
    assert seen == [home / "state"]
    report = DefenseReport.load(home / "report.json")
    assert report.weights_file is not None
    assert report.weights_file.name == str(home / "suspicious.pt")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "name", "found"),
    [
        (
            ["calibrate", "--output=~/c", "--ckpt_paths", "~/a", "b"],
            "ckpt_paths",
            [Path("/home/me/a"), Path("b")],
        ),
        (["calibrate", "--output=~/c", "--ckpt_paths", "a"], "output", Path("/home/me/c")),
        (["demo", "--output_dir=~/demo"], "output_dir", Path("/home/me/demo")),
        (["test", "--ckpt_path=~/a.ckpt"], "ckpt_path", "/home/me/a.ckpt"),
        (["fit", "--ckpt_path=last"], "ckpt_path", "last"),
        (["fit"], "ckpt_path", None),
    ],
)
def test_paths_of_each_command_are_expanded(
    words: list[str], name: str, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    seen: list[Any] = []

    def stop(cli: MNPCLI) -> None:
        seen.append(cli.config[words[0]][name])
        raise ValueError("as seen")

    monkeypatch.setattr(MNPCLI, "before_instantiate_classes", stop)
    command, *rest = words
    common = [] if command == "demo" else COMMON
    assert main([command, *common, *rest]) == 2
    assert seen == [found]


@pytest.mark.parametrize(
    "command", ["fit", "validate", "test", "audit", "defend", "calibrate", "demo"]
)
def test_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--data" in text
    what = COMMANDS[command]
    usage, told = f"{command} {'[options]' if command == 'demo' else '--config FILE'}", what[1:]
    assert text.startswith(f"usage: lightning-mnp {usage}")
    assert f" {what[0].upper()}{told}. options:" in " ".join(text.split())
    assert "default config file" not in text
    if command in ("audit", "defend", "calibrate"):
        assert len(text.splitlines()) <= 120
        assert max(map(len, text.splitlines())) <= 80
    if command in ("audit", "defend"):
        assert "--trainer.precision" in text
        assert "--trainer.max_epochs" not in text
        assert "The checkpoint: .ckpt, .pt, .pth or .safetensors." in " ".join(text.split())


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["audit", "--help"], "audit"),
        (["--config=all.yaml", "audit"], None),
        (["--version"], None),
        (["--ckpt_path=audit"], None),
        ([], None),
        ({"audit": {}}, None),
    ],
)
def test_a_parser_is_made_for_a_command_that_is_named(args: Any, named: str | None) -> None:
    assert _named_command(args) == named


def test_a_parser_is_made_for_the_command_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mnp", "demo"])
    assert _named_command(None) == "demo"


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("no-command", 2)])
def test_all_commands_are_listed(word: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([word])
    assert stop.value.code == code
    told = capsys.readouterr()
    for command in ("fit", "validate", "test", "audit", "defend", "calibrate", "demo"):
        assert command in (told.err if code else told.out)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("lightning-mnp 0.")


def test_reading_of_hyperparameters_is_still_where_it_is_switched_off() -> None:
    """The override has no effect should Lightning rename what it overrides."""
    from lightning.pytorch.cli import LightningCLI

    assert "_parse_ckpt_path" in vars(LightningCLI)
    assert "_parse_ckpt_path" in vars(MNPCLI)


def test_helpers_see_a_difference() -> None:
    model = Classifier(width=4)
    before = snapshot(model)
    next(model.parameters()).data.add_(1)
    assert not same(before, snapshot(model))
