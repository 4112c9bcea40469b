"""A device without hardware: CPU tensors in a wrapper that the CPU's own cannot be mixed with.

It stands for CUDA where there is none: what raises there for tensors of two devices raises here,
and everything else is computed by the CPU's kernels with the CPU's draws, so that a program must
give the CPU's numbers to the bit. It shows nothing of CUDA's kernels, number types or memory.

Importing it names PyTorch's spare backend for the whole process, so it belongs into one of its own.
Tensors are made on ``DEVICE`` inside ``with FakeDevice():``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
NAME = "fakegpu"
COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
# CUDA takes indices of the host here; their place among the arguments is the second.
TAKES_HOST_INDICES = (
    *(aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put_.default),
    *(aten.index_put.default, aten._index_put_impl_.default),
)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
# Under autocast operations stay in their precision, where CUDA's go to half of it.
_AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_AUTOCAST.fallback(torch.library.fallthrough_kernel)
DEVICE = torch.device(NAME, 0)


class _OnDevice(Tensor):
    """A tensor of the device; ``raw`` has its numbers."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> _OnDevice:
        like: dict[str, Any] = {"dtype": raw.dtype, "device": DEVICE, "requires_grad": False}
        if raw.layout is torch.strided:
            like |= {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        made: _OnDevice = torch.Tensor._make_wrapper_subclass(cls, raw.size(), **like)
        made.raw = raw
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{NAME}: {self.raw}"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """Inside it tensors can be made on ``DEVICE``, and brought there and back."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The CPU's operation on the CPU's numbers; its results are where a GPU would leave them."""
    ours = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _OnDevice)]
    if ours and function not in COPIES:
        _refuse_host_tensors(function, args, kwargs)
    if function is aten._pin_memory.default:
        return args[0]
    asked = kwargs.get("device")
    to_host = asked is not None and torch.device(asked).type == "cpu"
    to_device = asked is not None and torch.device(asked).type == NAME
    result = function(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
    if function is aten.copy_.default:
        return args[0]
    known = {id(tensor.raw): tensor for tensor in ours}  # in-place operations return their argument

    def placed(leaf: Any) -> Any:
        if id(leaf) in known:
            return known[id(leaf)]
        stays = to_device or (ours and not to_host)
        return _OnDevice(leaf) if stays and isinstance(leaf, Tensor) else leaf

    return tree_map(placed, result)


def _refuse_host_tensors(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where CUDA would: for tensors of the host that are more than a number."""

    def at_fault(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and not isinstance(leaf, _OnDevice) and leaf.dim() > 0

    checked: Any = (args, kwargs)
    if function in TAKES_HOST_INDICES and isinstance(args[0], _OnDevice):
        checked = (args[0], args[2:], kwargs)
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(checked) if at_fault(leaf)]
    if shapes:
        raise RuntimeError(
            f"{function}: Expected all tensors to be on the same device, {NAME} and cpu {shapes}"
        )


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, _OnDevice):
        return leaf.raw
    is_ours = isinstance(leaf, torch.device) and leaf.type == NAME
    return torch.device("cpu") if is_ours else leaf
