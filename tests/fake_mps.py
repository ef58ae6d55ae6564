"""An MPS device emulated on the CPU: tensors that say they are on "mps", and refuse what a Mac's GPU refuses.

Code that asks ``tensor.device.type == "mps"`` takes its MPS branch. Every operation runs on a CPU tensor inside, after
it was checked against what is known of the backend: no float64 and no float8, no operation with tensors of two
devices, no operation that torch has no MPS kernel for (its own table of operators says so).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchgen
import yaml
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
DEVICE = torch.device("mps", 0)
BACKING = torch.device("meta")
FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
PLAIN = (torch.Tensor, torch.nn.Parameter)
FORBIDDEN = frozenset({torch.float64, torch.complex128, *FLOAT8})
COPIES = frozenset({aten._to_copy.default, aten.copy_.default})
# Indices of a tensor on a device may stay on the CPU, with every backend.
INDEXING = frozenset({aten.index.Tensor, aten.index_put_.default, aten.index_put.default})
COMPOSITE = frozenset(
    {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
)


class MpsError(RuntimeError):
    """What a real MPS device would refuse."""


class MpsTensor(torch.Tensor):
    """Reports MPS as its device; its values are in ``inner``, on the CPU.

    To torch's own C++ it is a meta tensor, because autograd wants a guard of the backend, which the MPS of this
    build of torch lacks.
    """

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_mps = property(lambda self: True)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "MpsTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=BACKING,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"MpsTensor({self.inner!r})"

    def tolist(self) -> Any:
        """A list, which torch does not make of wrappers."""
        return self.inner.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = memo[id(self)] = type(self)(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        copy._is_param = isinstance(self, torch.nn.Parameter)
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented if _has_strangers(types) else _run(func, args, kwargs or {})


class CallMode(TorchFunctionMode):
    """Reads the devices that Python code asks for.

    "mps" becomes "mps:0", since torch would ask the missing backend for its current index; and a wish for a real
    meta tensor is remembered.
    """

    wants_meta = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args = tuple(DEVICE if _names(value, "mps") else value for value in args)
        kwargs = {key: DEVICE if _names(value, "mps") else value for key, value in (kwargs or {}).items()}
        if func == torch.Tensor.data.__set__ and any(isinstance(value, MpsTensor) for value in args):
            return _set_data(*args)
        before = self.wants_meta
        self.wants_meta = any(_names(value, "meta") for value in (*args, *kwargs.values()))
        try:
            return func(*args, **kwargs)
        finally:
            self.wants_meta = before


class MpsMode(TorchDispatchMode):
    """Catches what makes tensors on the device: factories and copies to it."""

    def __init__(self, calls: CallMode) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _has_strangers(types):
            return NotImplemented
        if kwargs.get("device") == BACKING and not self.calls.wants_meta:
            kwargs["device"] = DEVICE  # torch's C++ makes a tensor beside one of ours
        if not _concerns_mps(args, kwargs):
            return func(*args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)  # in inference mode operators arrive that are made of others
        return _run(func, args, kwargs) if parts is NotImplemented else parts


@contextmanager
def device() -> Iterator[None]:
    """While it lasts there is an MPS device: torch says so, and "mps" is a place for tensors."""
    lift = torch._C._only_lift_cpu_tensors()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    calls = CallMode()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", lambda: True))
        for name in ("empty_cache", "synchronize"):
            stack.enter_context(mock.patch.object(torch.mps, name, lambda: None))
        # torch.tensor(..., device="mps") makes its tensor on the CPU and then copies it like any other.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
        # A module that is moved keeps its parameters, as on a real device; by their data it would get new ones.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        stack.enter_context(calls)
        stack.enter_context(MpsMode(calls))
        yield


@cache
def has_kernel(operator: str) -> bool:
    """Whether an operator such as "add.Tensor" runs on MPS: it has a kernel there or is made of others that may."""
    entry = _operators().get(operator)
    if entry is None:
        return True
    if "structured_delegate" in entry:
        return has_kernel(entry["structured_delegate"])
    keys = {key.strip() for names in entry.get("dispatch", {"MPS": ""}) for key in names.split(",")}
    return bool(keys & {"MPS", *COMPOSITE})


@cache
def _operators() -> dict[str, dict[str, Any]]:
    table = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(table.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].split("(")[0]: entry for entry in entries}


def _set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """``tensor.data = data``, between devices too; torch cannot do it where one of them is a wrapper."""
    fresh = data.detach()
    if isinstance(tensor, torch.nn.Parameter):
        fresh = torch.nn.Parameter(fresh, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, fresh)


def _names(value: Any, kind: str) -> bool:
    return isinstance(value, (str, torch.device)) and str(value) == kind


def _has_strangers(types: Any) -> bool:
    """Whether there are other libraries' tensors, whose operations come here for the tensors that they hold."""
    return not all(kind in PLAIN or issubclass(kind, MpsTensor) for kind in types)


def _is_mps(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type == "mps"


def _concerns_mps(args: Any, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, MpsTensor) or _is_mps(value) for value in tree_flatten((args, kwargs))[0])


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation, on the tensors inside; its results are on the device that real torch would put them on."""
    inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    ours = [value for value in inputs if isinstance(value, MpsTensor)]
    _check(func, args, kwargs, inputs, ours)
    inner_args, inner_kwargs = tree_map_only(MpsTensor, lambda tensor: tensor.inner, (args, kwargs))
    wanted = kwargs.get("device")
    if _is_mps(wanted):
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if not _is_mps(wanted) and wanted is not None:
        return result
    # A view of a normal tensor is a normal tensor, also in inference mode.
    inference = torch.is_inference_mode_enabled() and not (func.is_view and not inputs[0].is_inference())
    with torch.inference_mode(inference):
        wrapped = tree_map_only(torch.Tensor, lambda tensor: _wrap(func, tensor), result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours else wrapped


def _check(func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], ours: list[MpsTensor]) -> None:
    """Raise what the device would raise before it starts."""
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "aten" and not has_kernel(f"{name}.{func._schema.overload_name}".rstrip(".")):
        raise MpsError(f"{func} has no kernel on mps")
    if kwargs.get("generator") is not None:
        raise MpsError(f"{func} on mps was given a generator of the {kwargs['generator'].device}")
    strangers = [tensor for tensor in inputs if not isinstance(tensor, MpsTensor) and tensor.ndim]
    may_mix = func in COPIES or (func in INDEXING and isinstance(args[0], MpsTensor))
    if ours and strangers and not may_mix:
        raise MpsError(f"{func} mixes tensors on mps and {strangers[0].device} {tuple(strangers[0].shape)}")


def _wrap(func: Any, tensor: torch.Tensor) -> MpsTensor:
    if tensor.dtype in FORBIDDEN:
        raise MpsError(f"{func} would put {tensor.dtype} {tuple(tensor.shape)} on mps")
    return MpsTensor(tensor)
