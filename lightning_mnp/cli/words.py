"""Words of the command line that need no PyTorch: help, errors first, and similar names."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from typing import NoReturn

__all__ = ["COMMANDS", "HELP", "WordsParser", "similar"]

COMMANDS = {
    "scan": "judge a weights file, with a folder of clean images; no configuration needed",
    "audit": "judge the network in a checkpoint, by a configuration",
    "defend": "judge a network, prune it if it is flagged, and write its weights",
    "calibrate": "find the threshold of the verdict from clean networks of your own",
    "fit": "train a network, also under attack",
    "validate": "measure clean accuracy and attack success on the validation data",
    "test": "measure clean accuracy and attack success on the test data",
    "benchmark": "compare defenses and detectors on attacks, and make tables of the results",
    "demo": "train a backdoored network on digits, audit it and defend it, in two minutes",
}
HELP = "\n".join(
    [
        "usage: lightning-mnp COMMAND [options]",
        "",
        "Tell whether a trained CNN carries a backdoor, and remove it.",
        "",
        "commands:",
        *(f"  {name:<10} {what}" for name, what in COMMANDS.items()),
        "",
        "options:",
        "  --help     show this text; `lightning-mnp COMMAND --help` lists a command's options",
        "  --version  show the version",
    ]
)


def similar(word: str, known: Iterable[str]) -> str:
    """Return a question that names the known word most like another one; empty if none is.

    Args:
        word: What was written.
        known: What could have been meant.

    Example:
        >>> similar("--imags", ["--images", "--labels"])
        ' Did you mean --images?'
    """
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {found[0]}?" if found else ""


class WordsParser(argparse.ArgumentParser):
    """A parser that says first what is wrong, and then how it is used."""

    def error(self, message: str) -> NoReturn:
        """Print the error, the most similar option and the usage, and end with code 2.

        Args:
            message: What is wrong.
        """
        unknown = re.search(r"unrecognized arguments: (--[^ =]+)", message)
        known = [name for action in self._actions for name in action.option_strings]
        hint = similar(unknown[1], known) if unknown else ""
        shown = "".join(letter if letter.isprintable() else "?" for letter in message)
        sys.stderr.write(f"error: {shown}.{hint}\n{self.format_usage()}")
        self.exit(2)
