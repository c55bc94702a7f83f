"""A Trainer with the commands that the command line has beside Lightning's own."""

from __future__ import annotations

import math
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from lightning_mnp.benchmark.executors import ExecutorName, open_executor
from lightning_mnp.benchmark.networks import using_threads
from lightning_mnp.calibration.file import CalibrationFile
from lightning_mnp.calibration.run import (
    check_networks,
    collect_scores,
    digest_networks,
    score_table,
)
from lightning_mnp.calibration.threshold import Calibration, calibrate_threshold
from lightning_mnp.checkpoints.atomic_write import OutputError, check_new, check_writable
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.checkpoints.write import check_output, write_state_dict
from lightning_mnp.cli.audits import FileAudit, audit_files, load_file, new_defense
from lightning_mnp.cli.scores import Scores, scores_table
from lightning_mnp.config import MNPConfig
from lightning_mnp.data import BackdoorDataModule
from lightning_mnp.defense_data.defense_set import DefenseSet, unpack_batch
from lightning_mnp.engine.defense import MNPDefense, When
from lightning_mnp.engine.runner import forget_state, run_defense
from lightning_mnp.hosting.lightning_host import (
    check_host,
    find_defense_set,
    follow_first,
    refuse_other_processes,
)
from lightning_mnp.hosting.loggers import log_outcome
from lightning_mnp.hosting.processes import do_in_first, process_count
from lightning_mnp.report import DefenseReport, WeightsFile
from lightning_mnp.report.text import text, wants_color
from lightning_mnp.reporting.files import save_report
from lightning_mnp.surgery.network import weights_digest

__all__ = ["MNPTrainer"]

_DEFAULTS = MNPConfig()


class MNPTrainer(Trainer):
    """Lightning's Trainer, which can also audit and defend what is in a checkpoint.

    Attributes:
        report: The outcome of the latest audit or defense; None before.

    Example:
        >>> MNPTrainer(logger=False, enable_checkpointing=False, accelerator="cpu").report is None
        True
    """

    report: DefenseReport | None = None

    def audit(
        self,
        model: LightningModule,
        ckpt_path: Path,
        datamodule: LightningDataModule | None = None,
        mnp: MNPConfig = _DEFAULTS,
        report: Path | None = None,
        key: str | None = None,
        network: str | None = None,
        state_file: Path | None = None,
    ) -> DefenseReport:
        """Judge whether the network in a checkpoint carries a backdoor.

        Only the weights in the file are read; nothing in it is run. The exit code is 0 for a
        clean network, 3 for a backdoored one, 4 if it stays undecided, 2 for wrong use.

        Args:
            model: The model that the weights belong to.
            ckpt_path: The checkpoint: .ckpt, .pt, .pth or .safetensors.
            datamodule: Its ``defense_dataloader`` gives the clean images.
            mnp: Options of the method.
            report: File for the report, as its ending says: .html, .md, .sarif, else JSON; must not
                exist.
            key: Where in the file the weights are, if they are not found by themselves.
            network: Name of the submodule that classifies, if the model has no ``forward``.
            state_file: File that keeps the progress, so that a killed run goes on.

        Returns:
            The report.
        """
        self._meet()
        self._check_places(report, state_file)
        notes = load_file(model, ckpt_path, key)[1]
        file = WeightsFile.of(ckpt_path)
        data = self._defense_set(model, datamodule)
        defense = new_defense(self, model, data, mnp, network)
        outcome = self._carry_out(defense, state_file, file, notes)
        try:
            self._save_report(outcome, report)
        finally:  # a verdict is told even if its file cannot be written
            self._tell(outcome)
        forget_state(state_file)
        self._log(outcome)
        return outcome

    def defend(
        self,
        model: LightningModule,
        ckpt_path: Path,
        output: Path,
        datamodule: LightningDataModule | None = None,
        when: When = "flagged",
        mnp: MNPConfig = _DEFAULTS,
        report: Path | None = None,
        key: str | None = None,
        network: str | None = None,
        state_file: Path | None = None,
    ) -> DefenseReport:
        """Audit the network in a checkpoint, prune it if asked, and write its weights.

        Only the weights in the file are read; nothing in it is run, and it is never written to.
        The output loads strictly into the same class, and is written whatever the verdict. Extra
        states (``get_extra_state``) in it are the model's, since those in the file are not read.
        The exit code tells the verdict on the network that was written: 0 for clean, 3 for
        backdoored, 4 for undecided, 2 for wrong use. It is that of the second audit; of the first
        one if nothing was changed. A changed network that is not audited again is undecided.

        Args:
            model: The model that the weights belong to.
            ckpt_path: The checkpoint: .ckpt, .pt, .pth or .safetensors.
            output: File to write the weights to, in the format of its ending; must not exist.
            datamodule: Its ``defense_dataloader`` gives the clean images.
            when: ``flagged`` prunes if the verdict is backdoored, ``always`` in any case,
                ``never`` audits only.
            mnp: Options of the method.
            report: File for the report, as its ending says: .html, .md, .sarif, else JSON; must not
                exist.
            key: Where in the file the weights are, if they are not found by themselves.
            network: Name of the submodule that classifies, if the model has no ``forward``.
            state_file: File that keeps the progress, so that a killed run goes on.

        Returns:
            The report.
        """
        self._meet()
        self._check_places(report, state_file, output)
        check_output(output, model.state_dict(), "output")
        names, notes = load_file(model, ckpt_path, key)
        file = WeightsFile.of(ckpt_path)
        data = self._defense_set(model, datamodule)
        defense = new_defense(self, model, data, mnp, network, when)
        outcome = self._carry_out(defense, state_file, file, notes)
        if outcome.changes:
            defense.prune_()
        weights = {
            # A Lightning checkpoint has the model's names, other files those they came with.
            name if output.suffix == ".ckpt" else names.to_file(name): tensor
            for name, tensor in model.state_dict().items()
        }
        metadata = {"verdict": outcome.verdict, "pruned_filters": str(len(outcome.pruned))}
        try:
            do_in_first(lambda: write_state_dict(output, weights, metadata, argument="output"))
            self._save_report(outcome, report)
        finally:  # a verdict is told even if its file cannot be written
            self._tell(outcome)
        if self.is_global_zero:
            _say(f"Weights written to {output}")
        forget_state(state_file)
        self._log(outcome)
        return outcome

    def calibrate(
        self,
        model: LightningModule,
        ckpt_paths: list[Path],
        output: Path,
        datamodule: LightningDataModule | None = None,
        rate: float = 0.05,
        mnp: MNPConfig = _DEFAULTS,
        key: str | None = None,
        network: str | None = None,
        jobs: int = 1,
        executor: ExecutorName = "processes",
        address: str | None = None,
    ) -> Calibration:
        """Find the threshold of the verdict, from clean networks of your own.

        Audits each network; the threshold then flags a clean network of the same kind with a
        probability of at most the rate. Every score is written as soon as it is known, and the
        same command goes on behind the scores that there are, also with more networks or another
        rate. Only the weights in the files are read; nothing in them is run.

        Args:
            model: The model that the weights belong to.
            ckpt_paths: The checkpoints of clean networks, one after the other.
            output: File to write scores and threshold to, as JSON.
            datamodule: Its ``defense_dataloader`` gives the clean images.
            rate: The most that the probability of flagging a clean network may be.
            mnp: Options of the method, the same as in the audits to come.
            key: Where in the files the weights are, if they are not found by themselves.
            network: Name of the submodule that classifies, if the model has no ``forward``.
            jobs: Audits at a time; more than one are done in processes of one thread each.
            executor: Where audits are done: in processes of this machine, or on a Ray cluster.
            address: Address of the Ray cluster; one is started on this machine if null.

        Returns:
            The threshold and what it rests on.
        """
        self._meet()
        if process_count() > 1:
            raise MisconfigurationException(
                f"Expected one process for a calibration, but got {process_count()}. Start the "
                "command without torchrun or srun."
            )
        files = check_networks(ckpt_paths, rate, mnp)
        check_writable(output, "output")

        def digest(file: str) -> str:
            load_file(model, Path(file), key, "ckpt_paths")
            return weights_digest(model)

        with open_executor(executor, jobs, address) as where:
            digests = digest_networks(files, digest)
            data = self._defense_set(model, datamodule)
            settings = {
                **mnp.flat(),
                "network": network,
                "defense_set": data.fingerprint,
                "precision": str(self.precision_plugin.precision),
                "version": version("lightning-mnp"),  # another one may come to other scores
            }
            kept = CalibrationFile(output, settings)
            audit = FileAudit(model, data, mnp, key, network)
            scores = collect_scores(
                digests, kept, lambda left: audit_files(audit, left, self, where), _say
            )
        calibration = calibrate_threshold([each.score for each in scores], rate)
        try:
            kept.finish(calibration, [each.file for each in scores])
        finally:  # a threshold is told even if its file cannot be written
            Console().print(score_table(scores, calibration))
            _say(str(calibration))
        _say(f"Scores and threshold are in {output}")
        _say(f"To compare with these networks: --mnp.verdict.reference {output}")
        return calibration

    def demo(
        self,
        model: LightningModule,
        datamodule: BackdoorDataModule,
        output_dir: Path | None = None,
        mnp: MNPConfig = _DEFAULTS,
    ) -> DefenseReport:
        """Train a backdoored network on scikit-learn's digits, audit it and defend it.

        All of it is an ordinary configuration; every option can be changed. The network is pruned
        whatever the verdict. The network before and after, and the report, are written to a folder.

        Args:
            model: The model to train.
            datamodule: The data, with an attack.
            output_dir: Folder for the results, which must not hold any yet; a new temporary one
                if it is not given.
            mnp: Options of the method.

        Returns:
            The report.
        """
        check_host(self)
        if self.num_devices * self.num_nodes > 1:
            raise MisconfigurationException(
                f"Expected one process for the demo, but got "
                f"{self.num_devices * self.num_nodes}. Set `--trainer.devices 1`."
            )
        folder = Path(output_dir or tempfile.mkdtemp(prefix="lightning-mnp-demo-"))
        files = {name: folder / name for name in ("backdoored.ckpt", "purified.ckpt")}
        page = folder / "report.html"
        for path in (*files.values(), folder / "report.json", page):
            check_new(path, "output_dir")
            check_writable(path, "output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        # Sums depend on the number of threads, and what is shown should not depend on the machine.
        with using_threads(1):
            _say(f"Training a network under attack: {datamodule.attack}")
            self.fit(model, datamodule=datamodule)
            before = self._scores(model, datamodule)
            write_state_dict(files["backdoored.ckpt"], model.state_dict())
            outcome = self.defend(
                model,
                files["backdoored.ckpt"],
                files["purified.ckpt"],
                datamodule,
                when="always",
                mnp=mnp,
                report=folder / "report.json",
            )
            after = self._scores(model, datamodule)
        save_report(outcome, page, argument="output_dir")
        Console().print(scores_table(before, after, outcome))
        _say(f"Networks and report are in {folder}; open report.html in a browser")
        return outcome

    def _scores(self, model: LightningModule, datamodule: BackdoorDataModule) -> Scores:
        numbers: dict[str, float] = {}
        for result in self.test(model, datamodule=datamodule, verbose=False):
            numbers.update(result)
        return Scores(numbers["test/CA"], numbers.get("test/ASR", math.nan))

    def _meet(self) -> None:
        """Meet the other processes, if the command was started in several.

        None are started here: each would do the same work, and one is enough.
        """
        check_host(self)
        if self.num_devices * self.num_nodes > 1:
            environment = getattr(self.strategy, "cluster_environment", None)
            if environment is None or not environment.creates_processes_externally:
                rank_zero_info("One process does the whole work; no others are started.")
                return
            self.strategy.setup_environment()  # by torchrun or srun, or by an earlier `fit`
        refuse_other_processes(self)

    @staticmethod
    def _check_places(
        report: Path | None, state_file: Path | None, output: Path | None = None
    ) -> None:
        """Check where files are to be written, before anything is read."""
        places = {"report": report, "state_file": state_file, "output": output}
        given = {name: path.absolute() for name, path in places.items() if path is not None}
        if len(set(given.values())) < len(given):
            raise OutputError(
                f"Expected arguments {', '.join(f'`{name}`' for name in given)} to name different "
                f"files, but got {', '.join(printable(str(path)) for path in given.values())}."
            )
        if report is not None:
            check_new(report, "report")
            check_writable(report, "report")
        if state_file is not None:
            check_writable(state_file, "state_file")

    def _defense_set(
        self, model: LightningModule, datamodule: LightningDataModule | None
    ) -> DefenseSet:
        given = None
        if datamodule is not None:
            if self.local_rank == 0:
                datamodule.prepare_data()
            self.strategy.barrier()
            if not isinstance(datamodule, BackdoorDataModule):  # ours reads what it needs
                datamodule.setup("fit")
            hook = getattr(datamodule, "defense_dataloader", None)
            given = None if hook is None else hook()
        return find_defense_set(self, model, given, unpack_batch)

    def _carry_out(
        self, defense: MNPDefense, state_file: Path | None, file: WeightsFile, notes: list[str]
    ) -> DefenseReport:
        bar = self.progress_bar_callback is not None and self.is_global_zero
        run_defense(defense, state_file=state_file, progress=bar)
        self.report = outcome = follow_first(defense)
        outcome.weights_file = file
        outcome.warnings[:0] = notes
        return outcome

    def _tell(self, outcome: DefenseReport) -> None:
        """Print the outcome, once its files are written."""
        if self.is_global_zero:
            print(text(outcome, color=wants_color(sys.stdout)), flush=True)

    def _log(self, outcome: DefenseReport) -> None:
        """Log the outcome, last of all: a logger that fails costs no file."""
        if self.is_global_zero:
            log_outcome(self.loggers, outcome, self.global_step)

    def _save_report(self, outcome: DefenseReport, report: Path | None) -> None:
        if report is not None:
            do_in_first(lambda: save_report(outcome, report, argument="report"))


def _say(text: str) -> None:
    """Print lines that may hold names of all kinds, as they are but without control characters."""
    lines = [printable(line, 10_000) for line in text.splitlines()]
    Console().print("\n".join(lines), highlight=False, markup=False, emoji=False, soft_wrap=True)
