"""Act on a module when it is imported, without importing it.

`import recbole_gacllm` must repair and extend RecBole, and must stay cheap: the children of the LLM
stages import this package too and never need RecBole. So nothing is imported here; a finder at the
head of ``sys.meta_path`` waits for the modules of interest (the idea of wrapt's post-import hooks).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_after: dict[str, list[Callable[[ModuleType], None]]] = {}
_around: dict[str, list[Callable[[], AbstractContextManager[None]]]] = {}
_aliases: dict[str, str] = {}
_absence: dict[str, str] = {}


def after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call ``callback(module)`` once module ``name`` is executed; at once if it is already there.

    The same callback for the same module is taken once.
    """
    callbacks = _after.setdefault(name, [])
    if callback not in callbacks:
        callbacks.append(callback)
        if name in sys.modules:
            callback(sys.modules[name])


def around_import(name: str, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Execute module ``name`` inside ``context()``; nothing happens if it is already there."""
    contexts = _around.setdefault(name, [])
    if context not in contexts:
        contexts.append(context)


def alias_module(name: str, target: str) -> None:
    """Let ``import name`` give module ``target``, imported when first asked for."""
    _aliases[name] = target


def explain_absence(name: str, message: str) -> None:
    """Let :class:`ModuleNotFoundError` say ``message`` where module ``name`` is not installed."""
    _absence[name] = message


def replaces(
    owner: Any, name: str, where: Callable[[Any], Any] | None = None
) -> Callable[[Callable[..., Any]], None]:
    """Let ``function(original, self, ...)`` be the method ``name`` of a class from now on.

    With ``where`` only of objects of which it is true.
    """

    def replace(function: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **keys: Any) -> Any:
            if where is not None and not where(self):
                return original(self, *args, **keys)
            return function(original, self, *args, **keys)

        setattr(owner, name, method)

    return replace


class Overlay:
    """A module with some names replaced."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Finder(MetaPathFinder):
    """Leaves finding to the other finders and adds our steps to their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _aliases:
            return ModuleSpec(fullname, _AliasLoader(_aliases[fullname]))
        if not any(fullname in steps for steps in (_after, _around, _absence)):
            return None
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    _extend(spec)
                    return spec
        if fullname in _absence:
            raise ModuleNotFoundError(_absence[fullname], name=fullname)
        return None


class _AliasLoader(Loader):
    """Puts another module in the place of the one that is being imported."""

    def __init__(self, target: str) -> None:
        self.target = target

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what stands in sys.modules after this call.
        sys.modules[module.__name__] = importlib.import_module(self.target)


def _extend(spec: ModuleSpec) -> None:
    """Add our steps to the loader of one spec; its class and all else stay as they are."""
    loader = spec.loader
    if loader is None:  # a namespace package has nothing to execute
        return
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        with ExitStack() as stack:
            for context in _around.get(spec.name, ()):
                stack.enter_context(context())
            execute(module)
        for callback in _after.get(spec.name, ()):
            callback(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]


sys.meta_path.insert(0, _Finder())
