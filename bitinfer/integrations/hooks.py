"""Register with transformers when it is imported, whichever of the two libraries comes first.

transformers knows no plugins: a quantizer exists once somebody has put it into the tables of
``transformers.quantizers.auto``. That module takes seconds to import and not everybody who packs a layer needs it, so
``import bitinfer`` leaves a finder that waits for it.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

WATCHED = "transformers.quantizers.auto"


class _PostImportFinder(MetaPathFinder):
    """Lets the other finders find ``WATCHED`` and registers bitinfer right after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        # the loader was made for this one import, so nobody else sees the change
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register bitinfer's format with transformers, now if it is loaded, else at its import. Calling again is free."""
    if WATCHED in sys.modules:
        register()
    elif not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())


def register() -> None:
    """Import the integration, which registers itself; a transformers that it cannot work with gets a warning.

    A failure must not make ``import transformers`` fail for programs that only happen to have bitinfer loaded.
    """
    try:
        import_module("bitinfer.integrations.transformers")
    except Exception as error:
        version = getattr(sys.modules.get("transformers"), "__version__", "of unknown version")
        warnings.warn(
            f"bitinfer could not register with transformers {version}, so it will not load packed folders: "
            f"{type(error).__name__}: {error}. bitinfer works with transformers 5.17 to 5.x.",
            RuntimeWarning,
            stacklevel=2,
        )
