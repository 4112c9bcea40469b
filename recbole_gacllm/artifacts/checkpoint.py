"""The weights of a RecBole checkpoint, read without running what is in it.

RecBole's checkpoint is a pickle of protocol 4 with a whole ``Config`` in it, which PyTorch's
``weights_only`` does not read. A pickle runs code by naming functions to be called. Here every name
but those that make a tensor gives :class:`_Unread`, which does nothing and holds nothing.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_gacllm.errors import GaCLLMError

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Unread:
    """In the place of anything but a tensor, a plain value or a container of these."""

    def __new__(cls, *_: Any, **__: Any) -> _Unread:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _nothing(self, *_: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = add = _nothing  # what a pickle fills an object with


def _tensor(flat: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """As ``torch._utils._rebuild_tensor_v2``; bounds are checked."""
    return flat.as_strided(tuple(size), tuple(stride), offset)


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Weights(pickle.Unpickler):
    """Reads ``data.pkl`` of PyTorch's zip file, whose storages are records beside it."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        [content] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        super().__init__(io.BytesIO(archive.read(content)))
        self._archive, self._root = archive, content.removesuffix(".pkl")
        self._flat: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _NAMES.get((module, name), _Unread)

    def persistent_load(self, saved: Any) -> Tensor:
        _, dtype, key, *_ = saved
        if key not in self._flat:
            data = bytearray(self._archive.read(f"{self._root}/{key}"))
            self._flat[key] = (
                torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            )
        return self._flat[key]


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and other parameters of a checkpoint, on the CPU.

    Of the other parameters those are returned that are tensors, plain values, or lists and dicts of
    these. What else RecBole's models keep there (arrays and sparse matrices of EASE and ItemKNN,
    modules that are in the state dict) their constructors make from the data.

    Raises:
        GaCLLMError: If the file is no checkpoint of RecBole.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            loaded = _Weights(archive).load()
        state, others = dict(loaded["state_dict"]), dict(loaded.get("other_parameter") or {})
    except OSError:
        raise
    except Exception as error:  # what a damaged or hostile pickle raises is its own choice
        raise GaCLLMError(f"{file} is not a checkpoint of RecBole: {error}") from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise GaCLLMError(f"{file} is not a checkpoint of RecBole: not all weights are tensors")
    return state, {name: value for name, value in others.items() if _is_read(value)}


def _is_read(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_read, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_read, value))
    return value is None or isinstance(value, (Tensor, str, int, float, bool))


_refusals: list[None] = []  # one for each block that is entered


@contextmanager
def no_pickles() -> Iterator[None]:
    """Refuse, in this process, every pickle that names a class or a function.

    While RecBole works with the configuration of somebody else's run, which may name a saved data
    set, saved data loaders, pretrained weights or an array of objects.
    """
    _watch_pickles()
    _refusals.append(None)
    try:
        yield
    finally:
        _refusals.pop()


@functools.cache  # an audit hook stays for the life of the process
def _watch_pickles() -> None:
    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" and _refusals:
            raise GaCLLMError(
                f"the run's configuration leads to a pickle that asks for {'.'.join(arguments)}; "
                "pickles can run any code, so none is read of a run"
            )

    sys.addaudithook(refuse)
