from __future__ import annotations

import pytest
import torch

from lightning_mnp.hosting.memory import explain_out_of_memory, is_out_of_memory


def caused(error: Exception) -> Exception:
    outer = ValueError("the model failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (caused(MemoryError()), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_lack_of_memory_is_recognized(error: Exception | None, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_one_is_told() -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"Out of memory here\. Do that\.") as caught:  # noqa: SIM117
        with explain_out_of_memory("here", "Do that."):
            torch.empty(2**60)
    assert "DefaultCPUAllocator" in str(caught.value.__cause__)


@pytest.mark.parametrize("error", [KeyError("k"), KeyboardInterrupt(), RuntimeError("shape")])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)), explain_out_of_memory("here", "Do that."):
        raise error
