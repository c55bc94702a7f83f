from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_mnp.surgery.precision import full_float32


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_setting_of_the_program_comes_back(precision: str, fails: bool) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        if fails:
            with pytest.raises(KeyError), full_float32():
                raise KeyError
        with full_float32():
            pass
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("newer", [False, True])
def test_all_switches_are_off_and_come_back(newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name, short, full = ("fp32_precision", "tf32", "ieee") if newer else ("allow_tf32", True, False)
    matmul, cudnn = SimpleNamespace(**{name: short}), SimpleNamespace(**{name: short})
    other = SimpleNamespace(**{name: short})
    backends: Any = SimpleNamespace(
        cuda=SimpleNamespace(matmul=matmul),
        cudnn=SimpleNamespace(conv=cudnn) if newer else cudnn,
        mkldnn=SimpleNamespace(matmul=other, conv=other),
    )
    monkeypatch.setattr(torch, "backends", backends)
    with full_float32():
        assert [getattr(switch, name) for switch in (matmul, cudnn)] == [full, full]
    assert [getattr(switch, name) for switch in (matmul, cudnn, other)] == [short] * 3
