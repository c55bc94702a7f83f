"""The command line: Lightning's commands, and audit, defend, calibrate, demo and benchmark."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mnp.attacks import TriggerCheckpoint
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.cli.benchmark import main as benchmark
from lightning_mnp.cli.configurations import with_found_configurations
from lightning_mnp.cli.parser import MNPParser
from lightning_mnp.cli.paths import expanded
from lightning_mnp.cli.quiet import without_tips
from lightning_mnp.cli.trainer import MNPTrainer
from lightning_mnp.config import grouped_message
from lightning_mnp.hosting.checkpoint_io import use_checked_io

__all__ = ["MNPCLI", "main"]

CONFIGURED = ("fit", "validate", "test", "audit", "defend", "calibrate", "demo")
_FILES = "--ckpt_paths"
_PATHS = {"ckpt_path", "ckpt_paths", "output", "output_dir", "report", "state_file"}
_DEMO = Path(__file__).with_name("demo.yaml")
_WRONG_USE = 2
_WRONG_INPUT = (
    ValueError,
    TypeError,
    OSError,
    MisconfigurationException,
    ModuleNotFoundError,  # an extra that is not installed
    torch.OutOfMemoryError,
)
_CONFIG_EXISTS = "SaveConfigCallback expected"
_TRAINED_BEFORE = (
    "Expected argument `--trainer.default_root_dir` to be a folder without an earlier training, "
    "but it holds a `config.yaml`. Name another folder, or go on with that training by "
    "`--ckpt_path`."
)
_INTERRUPTED, _TERMINATED = 130, 143  # as shells have it for Ctrl-C and for SIGTERM


class MNPCLI(LightningCLI):
    """LightningCLI with the commands of :class:`~lightning_mnp.cli.trainer.MNPTrainer`.

    Checkpoints are taken for untrusted: files are read with ``weights_only=True`` by every
    command, and hyperparameters in them are never used to build a model.
    """

    def __init__(self, args: ArgsType = None) -> None:
        self._named = _named_command(args)
        options: dict[str, Any] = {
            "description": "Tell whether a CNN carries a backdoor, and remove it.",
            "version": version("lightning-mnp"),
        }
        if "demo" in self.subcommands():
            options["demo"] = {"default_config_files": [str(_DEMO)]}
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=MNPTrainer,
            parser_class=MNPParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs=options,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning
        """Name the commands to make parsers for, and the arguments that are not options of theirs.

        Only the command that is asked for, if the first word names it: seven parsers take half a
        second, one takes a seventh of that.
        """
        data = {"train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "model"}
        return {name: set(data) for name in ([self._named] if self._named else CONFIGURED)}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Take several files behind one ``--ckpt_paths``, and find ``package:`` configurations."""
        _refuse_flat_options(sys.argv[1:] if args is None else args)
        if args is None:
            self.config = parser.parse_args(_join_files(with_found_configurations(sys.argv[1:])))
        elif isinstance(args, list):
            super().parse_arguments(parser, _join_files(with_found_configurations(args)))
        else:
            super().parse_arguments(parser, args)
        self._expand_paths()

    def _expand_paths(self) -> None:
        """Put the home folder in place of ``~`` in the paths of the command's own options."""
        options = self.config[self.config["subcommand"]]
        for name in _PATHS & set(options.keys()):
            value = options[name]
            if isinstance(value, list):
                options[name] = [type(path)(expanded(str(path))) for path in value]
            elif value is not None:
                options[name] = type(value)(expanded(str(value)))

    def before_instantiate_classes(self) -> None:
        """Write the configuration beside the logs of `fit` only, anew where a training goes on."""
        if self.subcommand != "fit":
            self.save_config_callback = None
        elif self.config["fit"].get("ckpt_path") is not None:
            self.save_config_kwargs["overwrite"] = True

    def _parse_ckpt_path(self) -> None:
        """Leave hyperparameters in checkpoints alone: Lightning would build the model by them."""

    def before_fit(self) -> None:
        """Read checkpoints with ``weights_only=True``; keep the trigger of an attack."""
        self._read_weights_only()
        attacked = any(getattr(owner, "attack", None) for owner in (self.model, self.datamodule))
        callbacks: list[Any] = getattr(self.trainer, "callbacks")  # noqa: B009 (set untyped)
        if attacked and not any(isinstance(each, TriggerCheckpoint) for each in callbacks):
            callbacks.append(TriggerCheckpoint())

    def before_validate(self) -> None:
        """Read checkpoints with ``weights_only=True``."""
        self._read_weights_only()

    def before_test(self) -> None:
        """Read checkpoints with ``weights_only=True``."""
        self._read_weights_only()

    def _read_weights_only(self) -> None:
        options = self.config_init[self.subcommand]
        if options.get("weights_only") is None:
            options["weights_only"] = True
        use_checked_io(self.trainer)


def _named_command(args: ArgsType) -> str | None:
    """Return the command that the first word names; None if it names none or there are no words."""
    words = sys.argv[1:] if args is None else args
    first = words[0] if isinstance(words, list) and words else None
    return first if first in CONFIGURED else None


def _refuse_flat_options(args: ArgsType) -> None:
    """Raise for an option of the method that is given without its group, and name the group."""
    for word in args if isinstance(args, list) else ():
        name = str(word).partition("=")[0].removeprefix("--mnp.")
        message = grouped_message(name) if str(word).startswith("--mnp.") else None
        if message is not None:
            raise ValueError(message)


def _join_files(args: list[str]) -> list[str]:
    """Make one JSON list of the words behind ``--ckpt_paths``, which is what the parser takes."""
    if _FILES not in args:
        return args
    first = args.index(_FILES) + 1
    files: list[str] = []
    for word in args[first:]:
        if word.startswith("--"):
            break
        files.append(word)
    rest = _join_files(args[first + len(files) :])
    if len(files) == 1 and files[0].startswith("["):
        return [*args[: first + 1], *rest]
    return [*args[: first - 1], f"{_FILES}={json.dumps(files)}", *rest]


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: The arguments; those of the process if None.

    Returns:
        The exit code: 0; for ``audit`` and ``defend``, 3 for a backdoored network and 4 for an
        undecided one; for ``benchmark``, 1 if a cell failed; 130 after Ctrl-C, 143 after SIGTERM in
        a training, 2 for wrong use. ``defend`` goes by the network that it has written.
    """
    words = sys.argv[1:] if args is None else args
    try:
        if words[:1] == ["benchmark"]:
            return benchmark(words[1:], fit=main)
        with without_tips():
            cli = MNPCLI(args)
    except _WRONG_INPUT as error:
        if os.environ.get("LIGHTNING_MNP_DEBUG"):
            raise
        hint = "Set LIGHTNING_MNP_DEBUG=1 to see where this comes from."
        lines = [printable(line, 10_000) for line in str(error).splitlines()]
        print("error: " + "\n".join([*lines, hint]), file=sys.stderr)
        return _WRONG_USE
    except RuntimeError as error:
        # What torch says of a checkpoint of another architecture has no type of its own, nor has
        # what Lightning says of a folder with another training.
        if os.environ.get("LIGHTNING_MNP_DEBUG"):
            raise
        if _CONFIG_EXISTS in str(error):
            print(f"error: {_TRAINED_BEFORE}", file=sys.stderr)
        elif "loading state_dict" in str(error):
            print(f"error: {printable(str(error), 600)}", file=sys.stderr)
        else:
            raise
        return _WRONG_USE
    except SIGTERMException:  # by which Lightning ends a training; its own code would be 0
        if os.environ.get("LIGHTNING_MNP_DEBUG"):
            raise
        print("terminated", file=sys.stderr)
        return _TERMINATED
    except SystemExit as stop:
        # Lightning ends the process by itself after Ctrl-C in a training, with code 1.
        if not isinstance(stop.__context__, KeyboardInterrupt) or os.environ.get(
            "LIGHTNING_MNP_DEBUG"
        ):
            raise
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except KeyboardInterrupt:
        if os.environ.get("LIGHTNING_MNP_DEBUG"):
            raise
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return _exit_code(cli)


def _exit_code(cli: Any) -> int:
    judges = cli.subcommand in ("audit", "defend")
    return int(cli.trainer.report.exit_code) if judges else 0
