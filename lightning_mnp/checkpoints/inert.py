"""Pickles read without being run: what they name is never imported, and what they call is not."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Foreign", "InertReader", "Storage", "StoredTensor"]

# Instructions whose argument is the value itself.
_VALUES = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
)
_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
}


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that a pickle names; it is not looked up.

    Attributes:
        name: Its full name, such as ``"argparse.Namespace"``.
    """

    name: str


@dataclass(eq=False)
class Foreign:
    """What stands in for an object of a class that weights do not need.

    Attributes:
        name: Full name of the class, or of the function that would have made the object.
        state: The attributes that the pickle gives to it, by name.
    """

    name: str
    state: dict[Any, Any]


@dataclass(frozen=True)
class Storage:
    """A row of numbers in the file, not read yet.

    Attributes:
        key: Its name in the file.
        dtype: The type of the numbers.
        count: How many there are.
    """

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of which only the description was read.

    Attributes:
        storage: Where its numbers are.
        offset: Position of its first number there.
        size: Its shape.
        stride: How far apart neighbors are along each dimension.
    """

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def numel(self) -> int:
        """Return the number of its elements, of which several can be one stored number."""
        count = 1
        for side in self.size:
            count *= side
        return count

    def element_size(self) -> int:
        """Return the bytes of one element."""
        return self.storage.dtype.itemsize


class InertReader:
    """Follow the instructions of a pickle, and make nothing of them but plain containers.

    Dicts, lists, tuples, strings and numbers become what they are; of dicts, only items whose
    key is a string. Tensors become :class:`StoredTensor`. Anything else becomes
    :class:`Foreign`. No module is imported and no
    function that the pickle names is called, so there is nothing that it could run.

    Attributes:
        names: The classes and functions that were named, in their order.
        storages: The storages that were named, by key.

    Example:
        >>> import pickle
        >>> reader = InertReader()
        >>> reader.read(io.BytesIO(pickle.dumps({"lr": 0.1, "loss": print}, protocol=2)))
        {'lr': 0.1, 'loss': Name(name='__builtin__.print')}
    """

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._actions: dict[str, Callable[[Any], None]] = {
            "GLOBAL": self._name,
            "MARK": self._mark,
            "REDUCE": self._reduce,
            "NEWOBJ": self._reduce,
            "BUILD": self._build,
            "BINPERSID": self._refer,
            "APPEND": lambda _: self._append([self._stack.pop()]),
            "APPENDS": lambda _: self._append(self._since_mark()),
            "SETITEM": lambda _: self._set([self._stack.pop() for _ in "kv"][::-1]),
            "SETITEMS": lambda _: self._set(self._since_mark()),
            "TUPLE": self._marked_tuple,
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
        }

    def read(self, stream: io.BytesIO) -> Any:
        """Read one pickle, up to its end.

        Args:
            stream: Where the pickle begins; afterwards, it stands behind it.

        Returns:
            What the pickle describes.

        Raises:
            Exception: Of any kind, if the pickle is damaged or holds an instruction that
                checkpoints do not need.
        """
        self._stack, self._marks, self._memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name in _VALUES:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name.endswith("BINPUT"):
                self._memo[int(str(argument))] = self._stack[-1]
            elif name.endswith("BINGET"):
                self._stack.append(self._memo[int(str(argument))])
            elif name in self._actions:
                self._actions[name](argument)
            elif name not in ("PROTO", "STOP"):
                raise ValueError(f"its pickle holds the instruction {name}")
        [content] = self._stack
        return content

    def _name(self, argument: str) -> None:
        name = argument.replace(" ", ".")
        self.names[name] = None
        self._stack.append(Name(name))

    def _mark(self, argument: None) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _marked_tuple(self, argument: None) -> None:
        items = tuple(self._since_mark())  # first, since it goes back to an earlier stack
        self._stack.append(items)

    def _tuple(self, length: int) -> None:
        items = tuple(self._stack[-length:])
        if len(items) < length:
            raise ValueError("its pickle takes more items than there are")
        self._stack[-length:] = [items]

    def _append(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)
        elif not isinstance(self._stack[-1], Foreign):
            raise ValueError("its pickle appends to what is no list")

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if isinstance(key, str):  # others could be made so that hashing takes for ever
                    target[key] = value
        elif not isinstance(target, Foreign):
            raise ValueError("its pickle sets items of what is no dict")

    def _build(self, argument: None) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Foreign) and isinstance(state, dict):
            self._stack[-1].state = state

    def _refer(self, argument: None) -> None:
        kind, storage_class, *described = self._stack.pop()
        if kind == "module":  # a class with its source, as old files have it
            self._stack.append(Name(storage_class.name))
            return
        key, _, count, *view = described
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError("its pickle refers to what is no storage")
        dtype = _DTYPES.get(storage_class.name)
        if dtype is None:  # quantized or of eight bits, which no weights to audit are
            self._stack.append(Foreign(storage_class.name, {}))
            return
        storage = Storage(str(key), dtype, _whole(count))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("its pickle describes one storage in two ways")
        self._stack.append(storage)

    def _reduce(self, argument: None) -> None:
        parts = self._stack.pop()
        made_by = self._stack.pop()
        if not isinstance(parts, tuple) or not isinstance(made_by, (Name, Foreign)):
            raise ValueError("its pickle calls what is no function")
        self._stack.append(_made(made_by.name, parts))


def _made(name: str, parts: tuple[Any, ...]) -> Any:
    """Return what a call stands for; nothing is called."""
    if name == "collections.OrderedDict":
        pairs = parts[0] if parts else []
        return {key: value for key, value in pairs if isinstance(key, str)}
    if name == "torch.Size":
        return tuple(_whole(side) for side in parts[0])
    if name == "torch._utils._rebuild_parameter":
        return parts[0]
    if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
        storage, offset, size, stride, *rest = parts
        if any(rest[2:]):  # conjugate or negative views, which no weights are
            return Foreign(name, {})
        return _tensor(storage, _whole(offset), tuple(size), tuple(stride))
    if name in _DTYPES:
        raise ValueError("its pickle makes a storage that is not in the file")
    return Foreign(name, {})


def _tensor(
    storage: Any, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]
) -> StoredTensor:
    """Return a tensor's description, after a check that all its numbers are in its storage."""
    tensor = StoredTensor(storage, offset, tuple(map(_whole, size)), tuple(map(_whole, stride)))
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise ValueError("its pickle holds a tensor without numbers")
    last = offset + sum((a - 1) * b for a, b in zip(tensor.size, tensor.stride, strict=True))
    if tensor.numel() and last >= storage.count:
        raise ValueError("a tensor in it reaches beyond its numbers")
    return tensor


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError("its pickle holds something else where a size should be")
    return number
