"""A device that only pretends to be one: its tensors lie on the CPU, and refuse to meet others.

On a GPU, two tensors of one operation have to be on the same device, indices and single numbers
aside, and NumPy sees none of them. A mistake of that kind shows here as it would there, without a
GPU. What this device cannot show: other rounding, other random numbers, asynchronous execution,
memory that runs out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "NAME",
    "PretendedAccelerator",
    "PretendedTensor",
    "possible",
    "register",
    "trainer_options",
]

NAME = "pretended"

_COPIES = ("aten::copy_", "aten::_to_copy")
# A mask or indices may be on the CPU, whatever they are for.
_INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_SETUP = "_setup_privateuseone_for_python_backend"
_kept: list[Any] = []  # registrations last as long as their library


class PretendedTensor(Tensor):
    """A tensor on the pretended device.

    Attributes:
        held: The same values on the CPU.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendedTensor:
        with torch.inference_mode(False):  # what is made there has no count of its changes
            made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                layout=held.layout,
                device=torch.device(NAME, 0),
            )
        made.held = held
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"pretended({self.held!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)  # as if it were read for the CPU

    # torch does these in C, for plain tensors only.
    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy.")
        return self.held.numpy(force=True)

    def tolist(self) -> Any:
        return self.held.tolist()

    def __getitem__(self, place: Any) -> Tensor:
        return super().__getitem__(_indices(place))

    def __setitem__(self, place: Any, value: Any) -> None:
        super().__setitem__(_indices(place), value)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})


def _run(operation: Any, args: Any, kwargs: Any) -> Any:
    """Carry out an operation on what the tensors hold."""
    name, leaves = operation._schema.name, tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    pretended = {id(each.held): each for each in tensors if isinstance(each, PretendedTensor)}
    others = [each for each in tensors if not isinstance(each, PretendedTensor) and each.dim()]
    free = name in _COPIES or (name in _INDEXED and isinstance(tensors[0], PretendedTensor))
    if pretended and others and not free:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and {others[0].device}, in {operation}."
        )
    device = kwargs.get("device")
    inside_args, inside_kwargs = tree_map(_inside, (args, kwargs))
    if "pin_memory" in inside_kwargs:
        inside_kwargs["pin_memory"] = False
    found = operation(*inside_args, **inside_kwargs)
    if name == "aten::copy_":
        return args[0]
    if device is not None and torch.device(device).type != NAME:
        return found

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, PretendedTensor):
            return value
        return pretended[id(value)] if id(value) in pretended else PretendedTensor(value)

    return tree_map(outside, found)


def _indices(place: Any) -> Any:
    """Return lists as tensors, in an index of one or several dimensions."""
    if isinstance(place, tuple):
        return tuple(map(_indices, place))
    return torch.tensor(place, dtype=torch.long) if isinstance(place, list) else place


def _inside(value: Any) -> Any:
    if isinstance(value, PretendedTensor):
        return value.held
    here = isinstance(value, torch.device) and value.type == NAME
    return torch.device("cpu") if here else value


class _Module:
    """What torch asks of ``torch.<name of the device>``."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        assert torch.device(device).type == NAME

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False


class PretendedAccelerator(Accelerator):
    """Lets a Trainer run on the pretended device."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == NAME

    def teardown(self) -> None:
        return None

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, index) for index in range(devices)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def possible() -> bool:
    """Whether this version of torch takes devices that are made in Python; 2.6 does not."""
    return hasattr(backend_registration, _SETUP)


def register() -> None:
    """Make the device known, once in a process: there is no way back."""
    if _kept:
        return
    getattr(backend_registration, _SETUP)(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(
        lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1"
    )
    _kept.append(library)
    torch.tensor = _elsewhere_first(torch.tensor)
    torch.as_tensor = _elsewhere_first(torch.as_tensor)


def trainer_options() -> dict[str, Any]:
    """Make the device known, and return what a Trainer needs to run on it."""
    register()
    strategy = SingleDeviceStrategy(torch.device(NAME, 0), PretendedAccelerator())
    return {"accelerator": "auto", "strategy": strategy}


def _elsewhere_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make tensors on the CPU, then move them: torch makes them in C, past the library."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, PretendedTensor):
            device, data = device or data.device, data.held
        found = make(data, *args, **kwargs)
        return found if device is None else found.to(device)

    return made
