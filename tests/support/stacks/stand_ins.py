"""Stand-ins for packages that a stack imports and that placing LoRA does not need, such as CUDA kernels."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def stand_in(*packages: str) -> None:
    """Let these packages be imported, with any name in them, as classes without content."""
    sys.meta_path.insert(0, _Finder(packages))


def skip_init(package: str, folder: str) -> None:
    """Let modules of a package be imported without its `__init__`, whose names are classes without content."""
    module = _Module(package)
    module.__path__ = [folder]
    module.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
    sys.modules[package] = module
    parent, _, leaf = package.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, module)


class _Made(type):
    """A class whose attributes are classes like it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _made(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if _decorates(args, kwargs) else super().__call__()


class _Instance:
    """An object that can be called, also as a decorator, and has any attribute."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if _decorates(args, kwargs) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _made(name)


def _decorates(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(args) == 1 and callable(args[0]) and not kwargs


def _made(name: str) -> Any:
    return _Made(name, (_Instance,), {})


class _Module(ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _made(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if any(name == package or name.startswith(package + ".") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""
