"""Registration of packed models with transformers, without importing transformers for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# What every model of transformers is loaded by. Nothing that the quantizer imports may import it: it could be half-way.
_MODELS = "transformers.modeling_utils"
_QUANTIZER = "llm_surgeon.inference.quantizer"


def register() -> None:
    """Register the packed format now, where transformers' models are imported already, or as soon as they are."""
    if _MODELS in sys.modules:
        importlib.import_module(_QUANTIZER)
    else:
        sys.meta_path.insert(0, _BesideModels())


class _BesideModels(MetaPathFinder):
    """Finds ``transformers.modeling_utils`` where Python would, and imports the quantizer once that has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == _MODELS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_QUANTIZER)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
