"""Packages that are not installed, as far as a module imports from them: their classes keep what they are given."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock


class StandIn:
    """A class of such a package: keeps its keyword arguments as attributes."""

    class Config:
        """Its settings, kept likewise."""

        def __init__(self, **values: object) -> None:
            self.__dict__.update(values)

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


class _Module(ModuleType):
    """A module that has a class for every name that begins with a capital, and a mock for every other."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (StandIn,), {}) if name[0].isupper() else MagicMock(name=name)
        setattr(self, name, value)
        return value


class _Finder(MetaPathFinder, Loader):
    """Finds every module of some packages."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        found = fullname.partition(".")[0] in self.packages
        return ModuleSpec(fullname, self, is_package=True) if found else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stand_ins(*packages: str) -> Generator[None]:
    """Have stand-ins for packages, whether or not they are installed, and forget them afterwards."""
    finder = _Finder(packages)
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}
    _forget(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget(packages)
        sys.modules.update(before)


def _forget(packages: Sequence[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
