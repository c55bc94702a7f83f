"""What a figure was measured on, and what it cost: time, passes and memory."""

from __future__ import annotations

import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

__all__ = ["Meter", "describe_machine", "processor_name"]

_PROCESS = Path("/proc/self")
_PACKAGES = ("lightning-mnp", "torch", "torchvision", "lightning")


def describe_machine(device: str) -> dict[str, Any]:
    """Return the device, its name, the number of threads and the versions, as primitives.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Example:
        >>> describe_machine("cpu")["device"]
        'cpu'
    """
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }


def processor_name() -> str:
    """Return the name of the processor, as the system tells it.

    Example:
        >>> processor_name() == processor_name().strip()
        True
    """
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or platform.machine()


class Meter:
    """Measures what a method costs on a network, from the start to the end of a context.

    Args:
        network: The network that the method gets. Copies of it are counted, too.
        device: ``"cpu"`` or ``"cuda"``.

    Attributes:
        seconds: Wall time.
        passes: Images that went through the network as a whole: 1 for an image for which gradients
            could be computed, a third otherwise.
        peak_mib: Highest memory during the context, in MiB: that of PyTorch on a GPU, that of the
            whole process on a CPU. None if the system does not tell it.
        start_mib: The same at the start.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> with Meter(network, "cpu") as meter, torch.no_grad():
        ...     _ = network(torch.zeros(6, 2))
        >>> meter.passes
        2.0
    """

    def __init__(self, network: nn.Module, device: str) -> None:
        self.network, self.device = network, device
        self.seconds = 0.0
        self.forward = self.both = 0
        self.peak_mib: float | None = None
        self.start_mib: float | None = None

    @property
    def passes(self) -> float:
        """See the class."""
        return self.both + self.forward / 3

    def __enter__(self) -> Meter:
        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            images = next((each for each in args if isinstance(each, torch.Tensor)), None)
            if images is None or not self.counting:
                return
            if (
                torch.is_grad_enabled()
                and isinstance(output, torch.Tensor)
                and output.requires_grad
            ):
                self.both += len(images)
            else:
                self.forward += len(images)

        self.counting = True
        self.hook = self.network.register_forward_hook(count)
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start_mib = torch.cuda.memory_allocated() / 2**20
        else:
            self.start_mib = _memory("VmRSS") if _forget_peak() else None
        self.started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak_mib = torch.cuda.max_memory_allocated() / 2**20
        elif self.start_mib is not None:
            self.peak_mib = _memory("VmHWM")
        self.seconds = time.perf_counter() - self.started
        self.counting = False  # copies of the network keep their hook
        self.hook.remove()


def _forget_peak() -> bool:
    """Let Linux measure the peak memory of this process anew; return whether it does."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return _memory("VmHWM") is not None


def _memory(name: str) -> float | None:
    """Return a line of the process's status, in MiB."""
    found = re.search(rf"{name}:\s*(\d+) kB", (_PROCESS / "status").read_text())
    return int(found[1]) / 2**10 if found else None
