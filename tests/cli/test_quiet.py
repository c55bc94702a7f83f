from __future__ import annotations

import logging

import pytest
from helpers import quiet_trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core import rank_zero

from lightning_mnp.cli.quiet import without_tips


def test_tips_are_left_out_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    filters = list(rank_zero.log.filters)
    with caplog.at_level(logging.INFO, logger=rank_zero.log.name), without_tips():
        rank_zero_info("\N{ELECTRIC LIGHT BULB} Tip: buy another product")
        rank_zero_info("GPU available: False")
        quiet_trainer(logger=True)  # which advertises a logger
    assert "GPU available: False" in caplog.text
    assert "Tip" not in caplog.text
    assert rank_zero.log.filters == filters
