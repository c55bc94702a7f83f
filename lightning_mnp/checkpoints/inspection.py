"""What a checkpoint file holds, checked before any of it is unpickled."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import NamedTuple

from lightning_mnp.checkpoints.printable import printable

__all__ = ["CheckpointError", "check_archive"]

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
LEGACY_PICKLES = 5  # magic number, protocol, system, the object, storage keys
MAX_PICKLE_BYTES = 64 * 2**20  # the structure of a checkpoint, not its weights
MAX_DEPTH = 1000  # of tuples in tuples
MAX_SHARED_ITEMS = 10**7  # items in tuples that are used again, counted as often as they are

_ALLOWED_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "collections Counter",  # milestones of a learning rate schedule
        "torch Size",
        "torch device",
        "torch.nn.parameter Parameter",
        "torch.storage UntypedStorage",
        "torch.serialization _get_layout",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
    }
)
_ALLOWED_TORCH_NAMES = frozenset(
    f"torch {name}{end}"
    for end, names in {
        "Storage": "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble "
        "ComplexFloat",
        "": "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex128 "
        "complex64",
    }.items()
    for name in names.split()
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do about it."""


def check_archive(path: Path, max_bytes: int) -> bool:
    """Check a file written by ``torch.save`` without unpickling it.

    The file has to be whole (check sums), not larger than declared or allowed, uncompressed, and
    its pickle may only name the classes that tensors and plain containers are made of. This comes
    before ``torch.load(weights_only=True)``, which checks again, and is stricter: it does not
    honor what other code has added with ``torch.serialization.add_safe_globals``.

    Args:
        path: An existing file.
        max_bytes: Largest accepted size.

    Returns:
        Whether it is a zip archive, the format of ``torch.save`` since PyTorch 1.6.

    Raises:
        CheckpointError: If the file is damaged, hostile or no checkpoint.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> path.write_text("no checkpoint") and None
        >>> check_archive(path, max_bytes=2**20)
        Traceback (most recent call last):
        ...
        lightning_mnp.checkpoints.inspection.CheckpointError: Expected ...model.pt to be a
        checkpoint written by `torch.save`, but it starts with b'no c'. Safetensors files need the
        ending .safetensors.
    """
    with path.open("rb") as file:
        magic = file.read(len(ZIP_MAGIC))
        if magic == ZIP_MAGIC:
            _check_zip(path, max_bytes)
            return True
        if not magic.startswith(PICKLE_MAGIC):
            raise CheckpointError(
                f"Expected {printable(str(path))} to be a checkpoint written by `torch.save`, but "
                f"it starts with {magic!r}. Safetensors files need the ending .safetensors."
            )
        file.seek(0)
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        for _ in range(LEGACY_PICKLES):
            _check_pickle(head, path)
    return False


def _check_zip(path: Path, max_bytes: int) -> None:
    """Check sizes, check sums and the pickle of a zip archive."""
    shown = printable(str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                raise CheckpointError(f"{shown} is refused: it holds two members of one name.")
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                    raise CheckpointError(
                        f"{shown} is refused: its member {printable(member.filename)} is "
                        f"compressed or encrypted (declared size {member.file_size:,} bytes), "
                        "which `torch.save` never does. Save the checkpoint again with it."
                    )
            declared = sum(member.file_size for member in members)
            if declared > min(max_bytes, path.stat().st_size):
                raise CheckpointError(
                    f"{shown} is refused: its members declare {declared:,} bytes, but the file "
                    f"has {path.stat().st_size:,} and the limit is {max_bytes:,}."
                )
            pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in names):
                raise CheckpointError(
                    f"{shown} is a zip archive but no checkpoint with weights: expected one member "
                    f"data.pkl and no TorchScript. Save `model.state_dict()` with `torch.save`."
                )
            if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{shown} is refused: its data.pkl is larger than {MAX_PICKLE_BYTES:,} bytes."
                )
            damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(
                    f"{shown} is damaged: the check sum of its member {printable(damaged)} is "
                    "wrong. Get the file again."
                )
            _check_pickle(io.BytesIO(archive.read(pickles[0])), path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged directory breaks zipfile in many ways
        raise CheckpointError(
            f"{shown} is damaged: it starts like a zip archive but cannot be read as one "
            f"({printable(str(error))}). Get the file again."
        ) from error


def _check_pickle(stream: io.BytesIO, path: Path) -> None:
    """Walk over the instructions of one pickle, run none, refuse what could do harm."""
    shown = printable(str(path))
    tuples = _Tuples()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            tuples.follow(opcode, argument)
            if tuples.deepest > MAX_DEPTH:
                raise CheckpointError(
                    f"{shown} is refused: its pickle puts tuples into tuples more than "
                    f"{MAX_DEPTH:,} deep, which checkpoints do not need, and which would break "
                    "what reads them."
                )
            if tuples.shared > MAX_SHARED_ITEMS:
                raise CheckpointError(
                    f"{shown} is refused: its pickle puts tuples into tuples again and again, "
                    "which would take for ever to read and which checkpoints do not need."
                )
            if opcode.name in ("GLOBAL", "INST") and not (
                argument in _ALLOWED_GLOBALS or argument in _ALLOWED_TORCH_NAMES
            ):
                raise CheckpointError(
                    f"{shown} is refused and nothing in it was run: besides weights it holds "
                    f"{printable(str(argument).replace(' ', '.'))}, which unpickling would import "
                    "and could call. Ask for a file with the state dict alone, or .safetensors."
                )
            if opcode.name == "PROTO" and argument != 2:
                raise CheckpointError(
                    f"{shown} is refused: expected pickle protocol 2, the default of `torch.save`, "
                    f"but got {argument}. Save the state dict again with `torch.save`."
                )
            if opcode.name == "STACK_GLOBAL" or opcode.name.startswith("EXT"):
                raise CheckpointError(
                    f"{shown} is refused and nothing in it was run: its pickle uses the "
                    f"instruction {opcode.name}, which checkpoints do not need."
                )
    except CheckpointError:
        raise
    except Exception as error:  # arbitrary bytes break the disassembler in many ways
        raise CheckpointError(
            f"{shown} is damaged or no checkpoint: its pickle cannot be read "
            f"({printable(str(error))}). Get the file again."
        ) from error


class _Size(NamedTuple):
    """What is below an object: items of tuples, and how deep they are in each other."""

    items: int = 0
    depth: int = 0


class _Tuples:
    """Counts the items of tuples that a pickle uses more than once, and how deep tuples are.

    A tuple that holds one tuple twice, which holds another twice, and so on, is written in a few
    bytes. As a key of a dict it is hashed, item by item, as often as it occurs: without an end.
    Hashing goes down into tuples by calls in C, which exhaust the stack of the process.
    """

    def __init__(self) -> None:
        self.shared = 0
        self.deepest = 0
        self._stack: list[_Size | None] = []  # None for a mark
        self._memo: dict[object, _Size] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Follow one instruction; IndexError or KeyError where it has nothing to work on."""
        name = opcode.name
        if name.endswith("PUT"):
            self._memo[argument] = self._stack[-1] or _Size()
        elif name.endswith("GET"):
            self._use(self._memo[argument])
        elif name == "DUP":
            self._use(self._stack[-1] or _Size())
        elif name == "MARK":
            self._stack.append(None)
        else:
            items = self._pop(opcode)
            size = _Size()
            if name.startswith("TUPLE"):
                below = sum(item.items for item in items)
                depth = 1 + max((item.depth for item in items), default=0)
                size = _Size(len(items) + below, depth)
                self.deepest = max(self.deepest, depth)
            self._stack.extend(size for _ in opcode.stack_after)

    def _use(self, size: _Size) -> None:
        self.shared += size.items
        self._stack.append(size)

    def _pop(self, opcode: pickletools.OpcodeInfo) -> list[_Size]:
        """Take from the stack what an instruction takes, and give it without marks."""
        before = opcode.stack_before
        items = []
        if pickletools.markobject in before:
            while (item := self._stack.pop()) is not None:
                items.append(item)
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            items.append(self._stack.pop() or _Size())
        return items
