"""Files written by ``torch.save``: first what they hold, then the numbers of some tensors."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_mnp.checkpoints.inert import InertReader, Storage, StoredTensor
from lightning_mnp.checkpoints.inspection import LEGACY_PICKLES, MAX_PICKLE_BYTES

__all__ = ["StoredFile"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first, before PyTorch 1.6
_LEGACY_PROTOCOL = 1001
_COUNT_BYTES = 8


class StoredFile:
    """A file written by ``torch.save``, read without ``torch.load``.

    Args:
        path: The file, which has been inspected.
        is_zip: Whether it is a zip archive, as files are since PyTorch 1.6.

    Attributes:
        content: What was saved, with a :class:`StoredTensor` for each tensor and a
            :class:`~lightning_mnp.checkpoints.inert.Foreign` for what is neither tensor nor plain.
        names: Full names of the classes and functions that the file mentions.

    Raises:
        Exception: Of any kind, if the file is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> torch.save({"weight": torch.ones(2)}, path)
        >>> stored = StoredFile(path, is_zip=True)
        >>> stored.content["weight"].size
        (2,)
        >>> stored.tensors(stored.content)
        {'weight': tensor([1., 1.])}
    """

    def __init__(self, path: Path, is_zip: bool) -> None:
        self.path = path
        self.is_zip = is_zip
        reader = InertReader()
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                [pickle] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                self._folder = pickle.removesuffix("data.pkl")
                self.content = reader.read(io.BytesIO(archive.read(pickle)))
                if f"{self._folder}byteorder" in archive.namelist():
                    _check_order(archive.read(f"{self._folder}byteorder").decode("ascii"))
        else:
            with path.open("rb") as file:
                head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
            parts = [reader.read(head) for _ in range(LEGACY_PICKLES)]
            magic, protocol, system, self.content, self._keys = parts
            if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
                raise ValueError("it does not begin as PyTorch's files do")
            _check_order("little" if system["little_endian"] else "big")
            self._storages: dict[str, Storage] = reader.storages
            self._numbers_begin = head.tell()
        self.names = tuple(reader.names)

    def tensors(self, described: Mapping[str, StoredTensor | Any]) -> dict[str, Tensor]:
        """Read the numbers of tensors.

        Args:
            described: The tensors of the file to read, by name.

        Returns:
            Contiguous tensors on the CPU, independent of the file and of each other.

        Raises:
            Exception: Of any kind, if the file is damaged.
        """
        wanted = {each.storage.key: each.storage for each in described.values()}
        storages = self._from_zip(wanted) if self.is_zip else self._from_legacy(wanted)
        return {
            name: torch.as_strided(
                storages[each.storage.key], each.size, each.stride, each.offset
            ).clone(memory_format=torch.contiguous_format)
            for name, each in described.items()
        }

    def _from_zip(self, wanted: dict[str, Storage]) -> dict[str, Tensor]:
        with zipfile.ZipFile(self.path) as archive:
            return {
                key: _numbers(archive.read(f"{self._folder}data/{key}"), storage)
                for key, storage in wanted.items()
            }

    def _from_legacy(self, wanted: dict[str, Storage]) -> dict[str, Tensor]:
        found = {}
        with self.path.open("rb") as file:
            file.seek(self._numbers_begin)
            for key in self._keys:
                storage = self._storages[key]
                if int.from_bytes(_exactly(file, _COUNT_BYTES), "little") != storage.count:
                    raise ValueError("a storage in it has another size than it declares")
                size = storage.count * storage.dtype.itemsize
                if key in wanted:
                    found[key] = _numbers(_exactly(file, size), storage)
                else:
                    file.seek(size, io.SEEK_CUR)
        return found


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends too early")
    return data


def _numbers(data: bytes, storage: Storage) -> Tensor:
    if len(data) < storage.count * storage.dtype.itemsize:
        raise ValueError("a storage in it is smaller than it declares")
    if not storage.count:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(data), dtype=storage.dtype, count=storage.count)


def _check_order(order: str) -> None:
    if order != sys.byteorder:
        raise ValueError(f"its numbers are in another order of bytes ({order}-endian)")
