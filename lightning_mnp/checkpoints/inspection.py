"""Inspection of a checkpoint file before anything in it is unpickled."""

from __future__ import annotations

import io
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lightning_mnp.checkpoints.printable import printable

__all__ = ["CheckpointError", "belongs_to_weights", "inspect_checkpoint"]

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
# What a file from before PyTorch 1.6 consists of: magic number, protocol, system, object, keys.
LEGACY_PICKLES = 5
MAX_PICKLE_BYTES = 64 * 2**20  # for the structure of a checkpoint, without its weights
# `torch.save` needs some 40 instructions for a tensor and 90 more for its state in Adam, and has
# about 2,000 objects on the stack at once, since it adds items to a dict by the thousand.
MAX_INSTRUCTIONS = 10**7
MAX_STACK = 10**5
MAX_DEPTH = 1000  # tuples inside each other
MAX_SHARED_ITEMS = 10**7  # items of containers that are used more than once, at each use

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


# Modules whose functions run commands or code, and what is harmless of Python's own names.
_CODE_MODULES = (
    "_posixsubprocess asyncio bdb cProfile cloudpickle code codeop commands ctypes dill doctest "
    "ftplib http importlib marshal multiprocessing nt os pdb pickle pip pkgutil posix profile pty "
    "pydoc requests runpy shelve shutil smtplib socket subprocess sys timeit urllib urllib2 venv "
    "webbrowser"
)
_CODE_OF_TORCH = ("torch load", "torch.serialization load", "torch.hub load", "torch.jit load")
_PLAIN_BUILTINS = (
    "bool bytes complex dict float frozenset int list long object range set slice str tuple "
    "unicode xrange"
)


# Instructions that add items to a list or a dict.
_GROWING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS"})


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why, and what to do about it."""


def belongs_to_weights(name: str) -> bool:
    """Return whether tensors and plain containers are made of a class or function.

    Args:
        name: Its full name, such as ``"collections.OrderedDict"``.

    Example:
        >>> belongs_to_weights("torch.FloatStorage"), belongs_to_weights("argparse.Namespace")
        (True, False)
    """
    return _belongs_to_weights(" ".join(name.rsplit(".", 1)))


def inspect_checkpoint(path: Path, max_bytes: int, *, foreign: bool = False) -> bool:
    """Check a file written by ``torch.save`` without unpickling it.

    The file must be undamaged (check sums), uncompressed, and not larger than it declares or than
    is allowed. Its pickle may only name the classes that tensors and plain containers are made of.
    ``torch.load(weights_only=True)`` checks the names again afterwards. This check is stricter: it
    ignores classes that other code has allowed by ``torch.serialization.add_safe_globals``.

    Args:
        path: An existing file.
        max_bytes: Largest accepted size in bytes.
        foreign: Whether the pickle may name other classes, for a reader that imports none of them.
            Names of what runs commands or code are refused all the same: such a file was made to
            attack whoever loads it.

    Returns:
        Whether it is a zip archive, the format of ``torch.save`` since PyTorch 1.6.

    Raises:
        CheckpointError: If the file is damaged, hostile or no checkpoint.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> path.write_text("no checkpoint") and None
        >>> inspect_checkpoint(path, max_bytes=2**20)
        Traceback (most recent call last):
        ...
        lightning_mnp.checkpoints.inspection.CheckpointError: Expected ...model.pt to be a
        checkpoint written by `torch.save`, but it starts with b'no c'. Safetensors files need the
        ending .safetensors.
    """
    with path.open("rb") as file:
        magic = file.read(len(ZIP_MAGIC))
        if magic == ZIP_MAGIC:
            _check_zip(path, max_bytes, foreign)
            return True
        if not magic.startswith(PICKLE_MAGIC):
            raise CheckpointError(
                f"Expected {printable(str(path))} to be a checkpoint written by `torch.save`, but "
                f"it starts with {magic!r}. Safetensors files need the ending .safetensors."
            )
        file.seek(0)
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        left = MAX_INSTRUCTIONS
        for _ in range(LEGACY_PICKLES):
            left -= _check_pickle(head, path, foreign, left)
    return False


def _check_zip(path: Path, max_bytes: int, foreign: bool) -> None:
    """Check the sizes, the check sums and the pickle of a zip archive."""
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
            _check_pickle(io.BytesIO(archive.read(pickles[0])), path, foreign)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged directory breaks zipfile in many ways
        raise CheckpointError(
            f"{shown} is damaged: it starts like a zip archive but cannot be read as one "
            f"({printable(str(error))}). Get the file again."
        ) from error


def _check_pickle(stream: io.BytesIO, path: Path, foreign: bool, most: int | None = None) -> int:
    """Check the instructions of one pickle, without running any of them; return their number."""
    shown = printable(str(path))
    containers = _Containers()
    most = MAX_INSTRUCTIONS if most is None else most
    count = 0
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), 1):
            containers.follow(opcode, argument)
            if count > most or containers.waiting > MAX_STACK:
                limit = (
                    f"has more than {MAX_INSTRUCTIONS:,} instructions"
                    if count > most
                    else f"puts more than {MAX_STACK:,} objects aside"
                )
                raise CheckpointError(
                    f"{shown} is refused: its pickle {limit}, which would take long to read and "
                    "which checkpoints do not need. Ask for a file with the state dict alone, or "
                    ".safetensors."
                )
            if containers.deepest > MAX_DEPTH:
                raise CheckpointError(
                    f"{shown} is refused: its pickle puts tuples into tuples more than "
                    f"{MAX_DEPTH:,} deep, which checkpoints do not need, and which would break "
                    "what reads them."
                )
            if containers.shared > MAX_SHARED_ITEMS:
                raise CheckpointError(
                    f"{shown} is refused: its pickle uses the same tuples or lists again and "
                    "again, which would take for ever to read and which checkpoints do not need."
                )
            if opcode.name in ("GLOBAL", "INST"):
                _check_name(str(argument), foreign, shown)
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
    return count


def _check_name(pickled: str, foreign: bool, shown: str) -> None:
    """Check the module and the name of a class or function that a pickle mentions."""
    if _belongs_to_weights(pickled) or (foreign and not _runs_code(*pickled.split(" ", 1))):
        return
    remedy = (
        "No ordinary training writes that: do not load the file with anything else."
        if foreign
        else "Ask for a file with the state dict alone, or .safetensors."
    )
    raise CheckpointError(
        f"{shown} is refused and nothing in it was run: besides weights it holds "
        f"{printable(pickled.replace(' ', '.'))}, which unpickling would import and could call. "
        f"{remedy}"
    )


def _belongs_to_weights(pickled: str) -> bool:
    return pickled in _ALLOWED_GLOBALS or pickled in _ALLOWED_TORCH_NAMES


def _runs_code(module: str, name: str) -> bool:
    if module in ("builtins", "__builtin__"):
        return name not in _PLAIN_BUILTINS.split()
    # A name with dots leads to whatever a module has imported itself.
    return (
        "." in name
        or module.split(".")[0] in _CODE_MODULES.split()
        or f"{module} {name}" in _CODE_OF_TORCH
    )


@dataclass
class _Size:
    """Size of an object: number of items in it, and how deep the tuples in it go."""

    items: int = 0
    depth: int = 0


class _Containers:
    """Follows a pickle and counts how deep tuples go and how many items are used again.

    A few bytes can describe a tuple that holds another tuple twice, which holds a third one twice,
    and so on. Used as the key of a dict, it is hashed item by item, each item at each use, which
    never ends. And hashing tuples inside each other takes a C call for each level, which can
    exhaust the stack of the process. A list or a dict that is stored once can be handed to many
    calls, each of which copies it.

    Attributes:
        shared: Number of items of tuples, lists and dicts that were used again.
        deepest: Number of tuples inside each other, at most.
    """

    def __init__(self) -> None:
        self.shared = 0
        self.deepest = 0
        self._stack: list[_Size | None] = []  # None for a mark
        self._memo: dict[object, _Size] = {}

    @property
    def waiting(self) -> int:
        """Number of objects and marks on the stack."""
        return len(self._stack)

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Follow one instruction; raise IndexError or KeyError if an operand is missing."""
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
            if name in _GROWING:  # the container itself goes on, also where it is stored
                size = items[-1]
                size.items += len(items) - 1
            elif name == "BUILD":
                size = items[-1]
            elif name.startswith("TUPLE"):
                below = sum(item.items for item in items)
                depth = 1 + max((item.depth for item in items), default=0)
                size = _Size(len(items) + below, depth)
                self.deepest = max(self.deepest, depth)
            self._stack.extend(size for _ in opcode.stack_after)

    def _use(self, size: _Size) -> None:
        self.shared += size.items
        self._stack.append(size)

    def _pop(self, opcode: pickletools.OpcodeInfo) -> list[_Size]:
        """Remove from the stack what an instruction takes, and return it without marks."""
        before = opcode.stack_before
        items = []
        if pickletools.markobject in before:
            while (item := self._stack.pop()) is not None:
                items.append(item)
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            items.append(self._stack.pop() or _Size())
        return items
