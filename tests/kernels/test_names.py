"""Names of the package: public ones from `surgeon_kernels` alone, and no function in a module's place."""

import importlib
import pkgutil
import sys
import types

import pytest

import surgeon_kernels

pytest.importorskip("triton")


def test_every_public_name_is_there_and_no_module():
    found = [getattr(surgeon_kernels, name) for name in surgeon_kernels.__all__]
    assert len(found) >= 45 and not any(isinstance(value, types.ModuleType) for value in found)


def test_a_family_holds_its_modules_alone():
    for info in pkgutil.walk_packages(surgeon_kernels.__path__, "surgeon_kernels."):
        module, (family, _, name) = importlib.import_module(info.name), info.name.rpartition(".")
        assert getattr(sys.modules[family], name) is module
        if info.ispkg:
            public = {name for name in vars(module) if not name.startswith("_")}
            assert all(isinstance(getattr(module, name), types.ModuleType) for name in public), info.name
