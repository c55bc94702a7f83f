"""The file of a calibration, which keeps the score of each network as soon as it is known."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_mnp.calibration.threshold import Calibration
from lightning_mnp.checkpoints.atomic_write import OutputError, check_writable, write_atomically
from lightning_mnp.checkpoints.printable import printable
from lightning_mnp.config.dotted import dotted
from lightning_mnp.signals.population import SCORES_FORMAT

__all__ = ["CalibrationFile", "NetworkScore"]


@dataclass(frozen=True)
class NetworkScore:
    """The result of the audit of one clean network.

    Attributes:
        file: Name of the checkpoint, as the user wrote it.
        weights: Digest of its weights, see :func:`~lightning_mnp.surgery.network.weights_digest`.
        score: The score, from 0.
        verdict: The verdict, by the threshold in the options.
        seconds: Duration of the audit.

    Example:
        >>> NetworkScore("a.ckpt", "12ef", 0.4, "clean", 61.6).score
        0.4
    """

    file: str
    weights: str
    score: float
    verdict: str
    seconds: float


class CalibrationFile:
    """The scores so far, on disk, so that a calibration that was interrupted can go on.

    Args:
        path: The file, JSON; it may exist if an earlier call with the same settings wrote it.
        settings: All that the scores depend on beside the networks: primitives by name, also in
            groups (dicts in dicts).

    Attributes:
        settings: The settings by dotted names, such as ``"suppression.runs"``.
        networks: The scores so far, also those of networks from earlier calls.

    Raises:
        OutputError: If the file cannot be written or read.
        ValueError: If the file holds something else, or scores of other settings.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "calibration.json")
        >>> CalibrationFile(path, {"seed": 0}).add(NetworkScore("a.ckpt", "12ef", 0.4, "clean", 9))
        >>> CalibrationFile(path, {"seed": 0}).find("a.ckpt", "12ef").score
        0.4
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        check_writable(path, "output")
        self.path = path
        self.settings = dotted(json.loads(json.dumps(settings)))
        self.networks: list[NetworkScore] = []
        if path.exists():
            self._read()

    def find(self, file: str, weights: str) -> NetworkScore | None:
        """Return the score of a network, under whatever name, or None if it is not known yet.

        Args:
            file: Name of the checkpoint, as the user wrote it.
            weights: Digest of its weights.

        Raises:
            ValueError: If the score of a file with this name belongs to other weights.
        """
        for network in self.networks:  # `a.ckpt` may be `./a.ckpt` today
            if network.weights == weights:
                return network
        for network in self.networks:
            if network.file == file:
                raise ValueError(
                    f"Expected {printable(file)} to hold the weights whose score is in "
                    f"{printable(str(self.path))}, but they differ. Choose another name as "
                    "`output`, or put the file back."
                )
        return None

    def add(self, network: NetworkScore) -> None:
        """Add a score and write the file; if writing fails, warn and go on.

        Args:
            network: The score.
        """
        self.networks.append(network)
        try:
            self._write(None)
        except OutputError as error:  # no reason to give up hours of work
            warnings.warn(
                f"{error} The calibration goes on, but its latest scores are not on disk.",
                stacklevel=2,
            )

    def finish(self, calibration: Calibration, files: list[str]) -> None:
        """Write the file with the threshold.

        Args:
            calibration: The threshold and what it was computed from.
            files: Names of the checkpoints as in :attr:`networks`, in the order of the scores.

        Raises:
            OutputError: If it cannot be written; the file is then as it was.
        """
        self._write({"files": files, **calibration.to_dict()})

    def _write(self, calibration: dict[str, Any] | None) -> None:
        content = {
            "format": SCORES_FORMAT,
            "settings": self.settings,
            "networks": [asdict(network) for network in self.networks],
            "calibration": calibration,
        }

        def write(partial: Path) -> None:
            partial.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=2, allow_nan=False)
            partial.write_text(text + "\n", encoding="utf-8")

        write_atomically(self.path, write, argument="output", replace=True)

    def _read(self) -> None:
        shown = printable(str(self.path))
        try:
            content = json.loads(self.path.read_text("utf-8"))
            known = content["format"] == SCORES_FORMAT
            settings = dotted(dict(content["settings"]))
            networks = [NetworkScore(**entry) for entry in content["networks"]]
            known = known and all(_is_sound(network) for network in networks)
        except OSError as error:
            raise OutputError(
                f"Expected argument `output` not to exist or to be a file that can be read, but "
                f"got {shown}: {error.strerror}. Choose another name, or change its permissions."
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            known = False
        if not known:
            raise ValueError(
                "Expected argument `output` not to exist or to hold scores of a calibration by "
                f"this version, but {shown} holds something else. Nothing is overwritten: choose "
                "another name, or move the file away."
            )
        for name in sorted({*settings, *self.settings}):
            then, now = settings.get(name), self.settings.get(name)
            if then != now:
                raise ValueError(
                    f"Expected `{printable(name)}` to be {printable(then)}, as for the scores that "
                    f"{shown} holds, but got {printable(now)}. Choose another name as `output`, or "
                    "move the file away."
                )
        self.networks = networks


def _is_sound(network: NetworkScore) -> bool:
    """Return whether the values read from a file have the right types and ranges."""
    names = (network.file, network.weights, network.verdict)
    numbers = (network.score, network.seconds)
    return all(isinstance(name, str) for name in names) and all(
        type(number) in (int, float) and math.isfinite(number) and number >= 0 for number in numbers
    )
