"""Registration of packed models with transformers, without importing transformers for it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# What every model of transformers is loaded by, and the last of what the quantizer needs.
_NEEDED = "transformers.modeling_utils"
_QUANTIZER = "llm_surgeon.packed.quantizer"


def register() -> None:
    """Register the packed format now, where transformers' models are imported already, or as soon as they are."""
    if _NEEDED in sys.modules:
        importlib.import_module(_QUANTIZER)
    else:
        sys.meta_path.insert(0, _AfterModelingUtils())


class _AfterModelingUtils(MetaPathFinder):
    """Lets the other finders find ``transformers.modeling_utils``, and imports the quantizer once that has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _NEEDED in sys.modules and not _importing():  # what was put off
            sys.meta_path.remove(self)
            importlib.import_module(_QUANTIZER)
        if fullname != _NEEDED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if _importing(module.__name__):  # a module that the quantizer may need: at the first import after that
                sys.meta_path.insert(0, self)
            else:
                importlib.import_module(_QUANTIZER)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _importing(but: str = "") -> bool:
    """Whether a module of this package, or that of transformers' models, is half-way through its import."""
    names = [name for name in sys.modules if name != but and (name == _NEEDED or name.startswith("llm_surgeon."))]
    return any(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False) for name in names)
