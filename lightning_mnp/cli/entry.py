"""The first word of the command line: what needs no PyTorch is answered at once."""

from __future__ import annotations

import sys
from importlib.metadata import version

from lightning_mnp.cli.streams import lasting_streams
from lightning_mnp.cli.words import COMMANDS, HELP, similar

__all__ = ["main"]

_WRONG_USE = 2


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    What cannot be printed costs neither files nor the exit code.

    Args:
        args: The arguments; those of the process if None.

    Returns:
        The exit code: 0; for ``scan``, ``audit`` and ``defend``, 3 for a backdoored network and 4
        for an undecided one; for ``benchmark``, 1 if a cell failed; 130 after Ctrl-C, 2 for wrong
        use.

    Example:
        >>> main(["--version"])
        lightning-mnp 0.1.0
        0
    """
    with lasting_streams():
        return _run(args)


def _run(args: list[str] | None) -> int:
    words = sys.argv[1:] if args is None else args
    first = words[0] if words else "--help"
    if first == "--version":
        print(f"lightning-mnp {version('lightning-mnp')}")
        return 0
    if first in ("-h", "--help"):
        print(HELP)
        return 0
    if first == "scan":
        from lightning_mnp.cli.scan.options import parse_options

        options = parse_options(words[1:])
        from lightning_mnp.cli.scan.command import main as scan

        return scan(options)
    if not first.startswith("-") and first not in COMMANDS:
        shown = "".join(letter if letter.isprintable() else "?" for letter in first)
        hint = similar(first, COMMANDS)
        print(f"error: expected a command, but got {shown!r}.{hint}\n{HELP}", file=sys.stderr)
        return _WRONG_USE
    from lightning_mnp.cli.command_line import main as configured

    return configured(args)
