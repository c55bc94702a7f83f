"""The memory format in which a network runs fastest, where that is safe."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["fastest_format"]

# The kernels of oneDNN for CPUs without AVX-512 write beyond their memory in the backward pass of
# such convolutions with fewer input channels, channels innermost (seen with PyTorch 2.14 on an AMD
# EPYC with AVX2: the process dies).
_FEWEST_CHANNELS = 8


def fastest_format(network: nn.Module) -> torch.memory_format:
    """Return the memory format for a network and its images.

    Args:
        network: The network, with two-dimensional convolutions.

    Returns:
        Channels innermost (``torch.channels_last``), which CPUs and GPUs are faster at. On a CPU
        without AVX-512, a network that has 1x1 convolutions with a stride and fewer than eight
        input channels gets ``torch.contiguous_format``: PyTorch would crash.

    Example:
        >>> fastest_format(nn.Conv2d(3, 16, 3))
        torch.channels_last
    """
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        return torch.channels_last
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            strided = module.kernel_size == (1, 1) and max(module.stride) > 1
            if strided and module.in_channels < _FEWEST_CHANNELS:
                return torch.contiguous_format
    return torch.channels_last
