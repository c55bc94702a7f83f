from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from digits_network import fitted_network
from streams import broken, in_ascii

from lightning_mnp import DefenseReport, __version__, calibrate_threshold
from lightning_mnp.calibration.file import CalibrationFile
from lightning_mnp.cli.command_line import main
from lightning_mnp.cli.entry import main as whole_command
from lightning_mnp.cli.trainer import MNPTrainer
from lightning_mnp.models import Classifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.usefixtures("short_searches"),
]

COMMAND = [
    "calibrate",
    "--model=lightning_mnp.models.Classifier",
    "--model.width=4",
    "--model.in_channels=1",
    "--data=lightning_mnp.data.DigitsDataModule",
    "--data.defense_size=60",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_model_summary=false",
    "--output=calibration.json",
]

NO_SCORE = 9  # stands for it in a file, whose weights have to be finite


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["lightning-mnp"])


def write_networks(*scores: float) -> list[str]:
    """Networks whose score stands in their last weight."""
    files = []
    for score in scores:
        model = Classifier(width=4, in_channels=1)
        with torch.no_grad():
            list(model.parameters())[-1][-1] = score
        files.append(f"score {score}.pt")
        torch.save(model.state_dict(), files[-1])
    return files


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace audits by a look at the last weight; gives the scores that were asked for."""
    asked: list[float] = []

    def defense(trainer: MNPTrainer, model: Any, *args: Any) -> Any:
        score = round(list(model.parameters())[-1][-1].item(), 4)
        asked.append(score)
        score = score if score < NO_SCORE else math.nan
        verdict: Any = "clean" if score < 1 else "backdoored"
        report = DefenseReport(verdict, score=score, reasons=["as it is"])
        return SimpleNamespace(report=lambda: report)

    monkeypatch.setattr("lightning_mnp.cli.audits.new_defense", defense)
    monkeypatch.setattr("lightning_mnp.cli.audits.run_defense", lambda *args, **options: None)
    return asked


def content() -> Any:
    return json.loads(Path("calibration.json").read_text())


def test_calibrate_prints_and_writes_the_threshold(
    audited: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_networks(0.25, 1.5, 0.75)
    assert main([*COMMAND, "--rate=0.25", "--ckpt_paths", *files, "--mnp.seed=3"]) == 0
    assert audited == [0.25, 1.5, 0.75]
    threshold = math.nextafter(1.5, math.inf)
    shown = capsys.readouterr().out
    assert f"--mnp.verdict.threshold {threshold!r}" in shown
    assert "the default threshold, 1, flags 1 of 3" in shown
    assert "2 of 3: score 1.5.pt: score 1.5\n" in shown
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [
        ["score 0.25.pt", "0.25", "clean"],
        ["score 1.5.pt", "1.5", "backdoored"],
        ["score 0.75.pt", "0.75", "clean"],
    ]
    found = content()
    assert found["calibration"]["threshold"] == threshold
    assert found["calibration"]["files"] == files
    assert [each["score"] for each in found["networks"]] == [0.25, 1.5, 0.75]
    assert found["settings"]["seed"] == 3


@pytest.mark.parametrize("version", ["0.0.9", None])
def test_scores_of_another_version_are_refused(
    version: str | None, audited: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMAND, "--rate=0.5", "--ckpt_paths", *write_networks(0.25)]
    assert main(command) == 0
    found = content()
    assert found["settings"].pop("version") == __version__
    if version is not None:
        found["settings"]["version"] = version
    Path("calibration.json").write_text(json.dumps(found))
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"Expected `version` to be {version}, as for the scores that calibration.json" in told
    assert f"but got {__version__}. Choose another name as `output`" in told
    assert content() == found


QUICK = [
    "--mnp.suppression.epochs=1",
    "--mnp.filters.include=['*conv1']",
    "--mnp.verdict.most_classes=3",
    "--rate=0.5",
]


def test_networks_that_cannot_be_judged_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    [file] = write_networks(0.0)
    assert main([*COMMAND, *QUICK, "--ckpt_paths", file]) == 2
    told = capsys.readouterr().err
    assert f"that of {file} is of no meaning (verdict: undecided; the network's accuracy" in told
    assert not Path("calibration.json").exists()


def test_real_audits_give_scores() -> None:
    torch.save(fitted_network().state_dict(), "fitted.pt")
    command = [option for option in COMMAND if not option.startswith("--model.")]
    command += ["--model.network=digits_network.DigitsNetwork", "--ckpt_paths", "fitted.pt"]
    assert main([*command, *QUICK]) == 0
    [network] = content()["networks"]
    assert network["score"] >= 0
    assert network["seconds"] > 0
    assert content()["calibration"]["scores"] == [network["score"]]


def test_several_at_a_time_are_audited_apart() -> None:
    network = fitted_network()
    for file in ("a.pt", "b.pt", "c.pt"):
        torch.save(network.state_dict(), file)
        with torch.no_grad():
            list(network.parameters())[-1].add_(torch.linspace(0, 0.3, 10))
    command = [option for option in COMMAND if not option.startswith("--model.")]
    command += ["--model.network=digits_network.DigitsNetwork", *QUICK, "--jobs=2"]
    assert main([*command, "--ckpt_paths", "a.pt", "b.pt", "c.pt"]) == 0
    found = content()
    assert found["calibration"]["files"] == ["a.pt", "b.pt", "c.pt"]
    scores = found["calibration"]["scores"]
    assert len(set(scores)) == 3  # not all of the weights that were loaded last
    assert sorted(each["score"] for each in found["networks"]) == sorted(scores)


def test_a_repeated_command_goes_on(
    audited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_networks(0.25, 0.5, NO_SCORE, 0.75)
    command = [*COMMAND, "--rate=0.34", "--ckpt_paths"]
    assert main([*command, *files]) == 2
    message = "Expected every network to have a score, but that of score 9.pt is nan"
    assert (
        f"{message} (verdict: backdoored; as it is). Leave the network" in capsys.readouterr().err
    )
    assert [each["score"] for each in content()["networks"]] == [0.25, 0.5, 0.75]
    assert content()["calibration"] is None
    files = [files[0], files[1], files[3], *write_networks(0.625)]
    assert main([*command, *files]) == 0
    assert audited[4:] == [0.625]
    assert "1 of 4: score 0.25.pt: score 0.25 (from the file)\n" in capsys.readouterr().out
    # Another rate needs no audit, nor does a part of the networks.
    assert main([*COMMAND, "--rate=0.5", "--ckpt_paths", *files]) == 0
    assert main([*COMMAND, "--rate=0.5", "--ckpt_paths", files[0]]) == 0
    assert audited[5:] == []
    assert content()["calibration"]["scores"] == [0.25]
    assert len(content()["networks"]) == 4


def test_an_interrupt_keeps_the_scores(
    audited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        if len(audited) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("lightning_mnp.cli.audits.run_defense", interrupted)
    files = write_networks(0.25, 0.5)
    assert main([*COMMAND, "--rate=0.5", "--ckpt_paths", *files]) == 130
    assert [each["score"] for each in content()["networks"]] == [0.25]


def test_other_weights_or_options_are_refused(
    audited: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_networks(0.25, 0.5)
    command = [*COMMAND, "--rate=0.5", "--ckpt_paths", *files]
    assert main(command) == 0
    before = Path("calibration.json").read_bytes()
    for options, name in (
        (["--mnp.suppression.runs=7"], "suppression.runs"),
        (["--data.defense_seed=1"], "defense_set"),
        (["--network=network"], "network"),
        (["--trainer.precision=bf16-mixed"], "precision"),
    ):
        capsys.readouterr()
        assert main([*command, *options]) == 2, name
        assert f"Expected `{name}` to be" in capsys.readouterr().err
    torch.manual_seed(5)
    write_networks(0.25)
    assert main(command) == 2
    assert "Expected score 0.25.pt to hold the weights whose score is" in capsys.readouterr().err
    assert Path("calibration.json").read_bytes() == before
    assert audited == [0.25, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt_paths", "score 0.5.pt"], "Expected at least 3 clean networks for a `rate`"),
        (["--ckpt_paths"], "Expected at least 3 clean networks for a `rate` of 0.25, but got 0"),
        (["--ckpt_paths", "a.pt", "b.pt", "./a.pt"], "name every file once, but got a.pt again"),
        (["--ckpt_paths", "a.pt", "b.pt", "c.pt"], "`ckpt_paths` to be an existing file"),
        (["--ckpt_paths", "a.pt", "--rate=2"], "`rate` to be between 0 and 1, but got 2.0"),
        (
            ["--ckpt_paths", "a.pt", "b.pt", "c.pt", "--mnp.verdict.rule=ratio"],
            "`verdict.rule` to be 'signals', whose score is calibrated, but got 'ratio'",
        ),
        (
            ["--ckpt_paths", "score 0.5.pt", "twin.pt", "c.pt"],
            "but score 0.5.pt and twin.pt hold the same weights",
        ),
        (["--ckpt_paths", "a", "b", "c", "--output=."], "Expected argument `output` to be a file"),
        (["--ckpt_paths", "a", "b", "c", "--jobs=0"], "`jobs` to be at least 1, but got 0"),
        (["--ckpt_paths", "a", "b", "c", "--address=x"], "`address` for the executor 'ray' only"),
    ],
)
def test_wrong_use_is_told_before_any_work(
    options: list[str], message: str, audited: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    [file] = write_networks(0.5)
    Path("twin.pt").write_bytes(Path(file).read_bytes())
    before = sorted(Path().iterdir())
    assert main([*COMMAND, "--rate=0.25", *options]) == 2
    assert message in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before
    assert audited == []


def test_ray_that_is_not_installed_is_told_before_any_work(
    audited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    files = write_networks(0.5)
    assert main([*COMMAND, "--rate=0.5", "--executor=ray", "--ckpt_paths", *files]) == 2
    assert "The executor 'ray' needs Ray, which is not installed." in capsys.readouterr().err
    assert audited == []


@pytest.mark.parametrize("stdout", [in_ascii, lambda: broken(errno.EPIPE)])
def test_what_cannot_be_printed_ends_no_calibration(
    stdout: Any, audited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_networks(0.25, 0.5)
    os.rename(files[1], "\xe9t\xe9.pt")
    monkeypatch.setattr(sys, "stdout", stdout())
    words = [*COMMAND, "--rate=0.5", "--ckpt_paths", files[0], "\xe9t\xe9.pt"]
    assert whole_command(words) == 0
    assert audited == [0.25, 0.5]
    assert content()["calibration"]["scores"] == [0.25, 0.5]


def test_a_threshold_is_written_before_it_is_printed(
    audited: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_mnp.cli.trainer.score_table", interrupted)
    assert main([*COMMAND, "--rate=0.5", "--ckpt_paths", *write_networks(0.25)]) == 130
    assert content()["calibration"]["scores"] == [0.25]


def test_a_threshold_is_printed_if_it_cannot_be_written(
    audited: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(CalibrationFile, "finish", full)
    assert main([*COMMAND, "--rate=0.5", "--ckpt_paths", *write_networks(0.25)]) == 2
    told = capsys.readouterr()
    assert "error: the disk is full" in told.err
    assert "--mnp.verdict.threshold 0.25" in told.out
    assert "are in" not in told.out


def test_a_network_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    [file] = write_networks(0.5)
    before = Path(file).read_bytes()
    command = [*COMMAND, "--rate=0.5", "--ckpt_paths", file, f"--output={file}"]
    assert main(command) == 2
    assert "holds something else. Nothing is overwritten" in capsys.readouterr().err
    assert Path(file).read_bytes() == before


def test_several_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_mnp.cli.trainer.process_count", lambda: 2)
    assert main([*COMMAND, "--ckpt_paths", *write_networks(0.5)]) == 2
    assert "Expected one process for a calibration, but got 2" in capsys.readouterr().err
    assert not Path("calibration.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--ckpt_paths", "a b.pt", '"[x]', "null"],
        ['--ckpt_paths=["a b.pt", "\\"[x]", "null"]'],
        ["--ckpt_paths", '["a b.pt", "\\"[x]", "null"]'],
        ["--ckpt_paths", "z.pt", "--rate=0.1", "--ckpt_paths", "a b.pt", '"[x]', "null"],
    ],
)
@pytest.mark.parametrize("through", ["argument", "process"])
def test_files_behind_the_option(
    words: list[str], through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Path] = []

    def check(paths: list[Path], *args: Any) -> list[str]:
        found.extend(paths)
        raise ValueError("as seen")

    monkeypatch.setattr("lightning_mnp.cli.trainer.check_networks", check)
    command = [*COMMAND, *words]
    monkeypatch.setattr(sys, "argv", ["lightning-mnp", *(command if through == "process" else [])])
    assert main(None if through == "process" else command) == 2
    assert found == [Path("a b.pt"), Path('"[x]'), Path("null")]


def test_an_earlier_file_is_what_python_reads(audited: list[float], tmp_path: Path) -> None:
    files = write_networks(0.5)
    assert main([*COMMAND, "--rate=0.5", "--ckpt_paths", *files]) == 0
    kept = CalibrationFile(tmp_path / "calibration.json", content()["settings"])
    assert [each.file for each in kept.networks] == files
    found = calibrate_threshold([each.score for each in kept.networks], 0.5)
    assert found.to_dict().items() <= content()["calibration"].items()
