"""Kept here only until callers import `lightning_mnp.augment`."""

from lightning_mnp.augment import random_crop_flip

__all__ = ["random_crop_flip"]
