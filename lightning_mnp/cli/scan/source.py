"""Where weights are: a file, a folder that a library has saved, or Hugging Face's hub."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_mnp.checkpoints.inspection import CheckpointError
from lightning_mnp.checkpoints.printable import printable

__all__ = ["Source", "find_weights", "read_json"]

_HUB = "hf://"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CONFIG, _PREPARATION = "config.json", "preprocessor_config.json"
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class Source:
    """A weights file, and what timm or transformers have written beside it.

    Attributes:
        path: The file.
        config: What ``config.json`` holds; empty if there is none of these libraries.
        preparation: What ``preprocessor_config.json`` holds.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)


def find_weights(weights: str) -> Source:
    """Find a weights file.

    Args:
        weights: A file; a folder that holds ``model.safetensors`` or ``pytorch_model.bin``; or
            ``hf://owner/name``, also with ``@revision`` behind it, which is fetched into Hugging
            Face's cache, unless it is there already.

    Returns:
        The file and what stands beside it.

    Raises:
        CheckpointError: If there is no such file, or it could not be fetched.
        ImportError: If the hub is asked for and its package is not installed.

    Example:
        >>> find_weights("missing.pt").path.name
        'missing.pt'
    """
    path = _fetch(weights.removeprefix(_HUB)) if weights.startswith(_HUB) else Path(weights)
    if path.is_dir():
        found = [path / name for name in _WEIGHTS if (path / name).is_file()]
        if not found:
            raise CheckpointError(
                f"Expected argument `WEIGHTS` to be a file, or a folder that holds "
                f"{' or '.join(_WEIGHTS)}, but {printable(weights)} holds neither. Name the file."
            )
        path = found[0]
    config = read_json(path.with_name(_CONFIG))
    if not config.keys() & {"architecture", "architectures"}:
        return Source(path)  # a file of some other program
    return Source(path, config, read_json(path.with_name(_PREPARATION)))


def _fetch(name: str) -> Path:
    """Fetch weights and configuration of a model on the hub, and return their folder."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"Argument `WEIGHTS` = {_HUB}{printable(name)} needs the package huggingface_hub, "
            "which is not installed: pip install 'lightning-mnp[hub]'"
        ) from error
    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[*_WEIGHTS, _CONFIG, _PREPARATION],
        )
    except Exception as error:  # of many kinds: no network, no such model, no access, a wrong name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"Expected argument `WEIGHTS` to name a model on the hub as {_HUB}owner/name, but "
            f"{printable(name)} could not be fetched: {printable(reason, 300)}. Check the name "
            "and the network, or download the file yourself."
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file; an empty one if there is none.

    Args:
        path: The file.
    """
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
