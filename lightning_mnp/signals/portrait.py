"""Portraits: a surrogate trigger as pictures on a few clean images, for the report."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.report import SurrogateTrigger, TriggerExample
from lightning_mnp.signals.pattern_trigger import PatternTrigger

__all__ = ["MEASURED", "encode_png", "portray"]

MEASURED = 64  # images on which the success is measured
_EXAMPLES = 3
_MOST_PIXELS = 96  # in each direction, so that a report stays small


@torch.no_grad()
def portray(
    trigger: PatternTrigger,
    images: Tensor,
    labels: Tensor,
    goals: Tensor,
    target: int | None,
    batch_size: int,
) -> SurrogateTrigger:
    """Measure a finished pattern on clean images, and draw it on some of them.

    Args:
        trigger: The pattern, which is not changed.
        images: Clean images, shape (N, C, ...).
        labels: Their classes, shape (N,).
        goals: The class that the pattern takes each image to, shape (N,).
        target: The class that it takes all images to; None if that differs.
        batch_size: Most images that the network gets at once.

    Returns:
        The success, and pictures if images have height and width: those come first that the
        network recognizes and that the pattern takes where it should.
    """
    # As the network is, without what the audit adds to the logits of rare classes.
    network = trigger.masked.with_raised({})
    triggered = trigger.applied(images, trigger.pattern)
    before, after = (
        torch.cat([network(p, statistics="running").argmax(1) for p in shown.split(batch_size)])
        for shown in (images, triggered)
    )
    arrived = after == goals
    pattern, examples = "", []
    if images.ndim == 4:
        pattern = encode_png(_contrast((triggered - images).mean(0)))
        order = (~(arrived & (before == labels))).int().argsort(stable=True)
        for row in order[:_EXAMPLES].tolist():
            clean, changed = (
                encode_png(_pixels(picture[row], trigger.low, trigger.high))
                for picture in (images, triggered)
            )
            label, was, became = (int(found[row]) for found in (labels, before, after))
            examples.append(TriggerExample(label, was, became, clean, changed))
    success = int(arrived.sum()) / len(images)
    return SurrogateTrigger(trigger.name, target, success, len(images), pattern, tuple(examples))


def _pixels(image: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return an image as shares of the range of values, which undoes most normalizations."""
    return (image - low[0]) / (high[0] - low[0]).clamp_min(torch.finfo(image.dtype).tiny)


def _contrast(change: Tensor) -> Tensor:
    """Return a change as shares around a half, which stands for no change."""
    return 0.5 + 0.5 * change / change.abs().max().clamp_min(torch.finfo(change.dtype).tiny)


def encode_png(picture: Tensor) -> str:
    """Return a picture as a base64-encoded PNG of at most 96 pixels in each direction.

    Args:
        picture: Shape (C, H, W), values from 0 to 1; in color if C is 3, else gray.

    Example:
        >>> data = base64.b64decode(encode_png(torch.ones(3, 2, 4)))
        >>> Image.open(io.BytesIO(data)).getpixel((0, 0))
        (255, 255, 255)
    """
    picture = picture.detach().float().cpu()
    if len(picture) != 3:
        picture = picture.mean(0, keepdim=True)
    height, width = picture.shape[1:]
    if max(height, width) > _MOST_PIXELS:
        share = _MOST_PIXELS / max(height, width)
        size = max(1, round(height * share)), max(1, round(width * share))
        picture = F.interpolate(picture[None], size=size, mode="area")[0]
    pixels = (255 * picture.clamp(0, 1)).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
