"""Blend: another image mixed in (Chen et al., 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_mnp.attacks.attack import Attack, Mode
from lightning_mnp.attacks.checks import check_share
from lightning_mnp.attacks.registry import register

__all__ = ["Blend"]

_MAX_PIXELS = 2**25  # in a trigger file, which may come from an attacker; a photograph has fewer
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"


@register
class Blend(Attack):
    """Mix a fixed image into every triggered image (Chen et al., 2017, blended injection).

    Args:
        ratio: Weight of the blended image, above 0 and at most 1; the paper's setting is 0.2.
        image: File with the image to blend in, resized to the images' size; noise drawn from the
            seed if None.
        target_class: See :class:`~lightning_mnp.attacks.attack.Attack`.
        mode: See :class:`~lightning_mnp.attacks.attack.Attack`.
        poison_rate: See :class:`~lightning_mnp.attacks.attack.Attack`.
        seed: See :class:`~lightning_mnp.attacks.attack.Attack`.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: If the image file does not exist.

    Example:
        >>> clean = torch.full((1, 3, 4, 4), 0.5)
        >>> bool(((Blend(ratio=0.2).apply(clean) - clean).abs() <= 0.1).all())
        True
    """

    def __init__(
        self,
        ratio: float = 0.2,
        image: Path | str | None = None,
        target_class: int = 0,
        mode: Mode = "all-to-one",
        poison_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(target_class, mode, poison_rate, seed)
        check_share(ratio=ratio)
        if image is not None and not Path(image).expanduser().is_file():
            raise FileNotFoundError(
                f"Expected argument `image` to be an image file, but {str(image)!r} does not exist."
            )
        self.ratio = ratio
        self.image = None if image is None else Path(image).expanduser()
        self._stored: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the image that is blended in, RGB as stored; nothing for noise."""
        if self.image is None and self._stored is None:
            return {}
        return {"pattern": self._read()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the image to blend in.

        Args:
            tensors: As :meth:`tensors` returned them.

        Raises:
            ValueError: If a tensor has another name, or it is no RGB image of bytes.
        """
        pattern = tensors.get("pattern")
        if set(tensors) - {"pattern"}:
            raise ValueError(f"Expected one tensor 'pattern' for Blend, but got {sorted(tensors)}.")
        if pattern is not None and (
            pattern.dtype != torch.uint8
            or pattern.ndim != 3
            or pattern.shape[0] != 3
            or not 0 < pattern[0].numel() <= _MAX_PIXELS
        ):
            raise ValueError(
                "Expected the tensor 'pattern' of Blend to be uint8 of shape (3, H, W), with 1 to "
                f"{_MAX_PIXELS:,} pixels, but got {pattern.dtype} of shape {tuple(pattern.shape)}."
            )
        self._stored = pattern

    def _read(self) -> Tensor:
        """Return the image to blend in, shape (3, H, W), uint8."""
        if self._stored is None:
            assert self.image is not None
            try:
                with Image.open(self.image) as image:
                    pixels = np.array(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(
                    f"Expected argument `image` to be an image file, but got {str(self.image)!r}: "
                    f"{error}."
                ) from error
            if pixels.shape[0] * pixels.shape[1] > _MAX_PIXELS:
                raise ValueError(
                    f"Expected argument `image` to have at most {_MAX_PIXELS:,} pixels, but got "
                    f"{pixels.shape[1]} x {pixels.shape[0]}."
                )
            self._stored = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return self._stored

    def _pattern(self, channels: int, height: int, width: int) -> Tensor:
        if self.image is None and self._stored is None:
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(channels, height, width, generator=generator)
        if channels not in (1, 3):
            raise ValueError(
                "Expected argument `images` to have 1 or 3 channels, to blend an RGB image in, "
                f"but got {channels}."
            )
        pixels = self._read()[None].float() / 255.0
        if channels == 1:
            pixels = (pixels * pixels.new_tensor(_LUMA).reshape(3, 1, 1)).sum(1, keepdim=True)
        return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]

    def _trigger(self, images: Tensor) -> Tensor:
        channels, height, width = images.shape[1:]
        pattern = self._pattern(channels, height, width).to(images)
        return (1.0 - self.ratio) * images + self.ratio * pattern
