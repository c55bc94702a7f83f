"""Lightning's tips for other products, which would stand above an answer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core import rank_zero

__all__ = ["without_tips"]

_TIP = "\N{ELECTRIC LIGHT BULB}"  # what a tip begins with
_EXTRA = r"Starting from v1\.9\.0, `tensorboardX`"  # what it says for want of another logger


@contextmanager
def without_tips() -> Iterator[None]:
    """Leave out messages in which Lightning advertises other packages; all others are shown.

    Example:
        >>> from lightning.pytorch.utilities import rank_zero_info
        >>> with without_tips():
        ...     rank_zero_info("\N{ELECTRIC LIGHT BULB} Tip: buy another product")
    """

    def is_no_tip(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_TIP)

    logger = rank_zero.log
    logger.addFilter(is_no_tip)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_EXTRA)
            yield
    finally:
        logger.removeFilter(is_no_tip)
