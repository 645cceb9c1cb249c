"""TLinFormer: linear-time generation over long contexts (arXiv 2508.20407).

The names below load on first use, so that `import tlinformer` itself stays quick.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlinformer.config import TLinFormerConfig
    from tlinformer.engine import Engine, plan_cache
    from tlinformer.model import TLinFormerForCausalLM
    from tlinformer.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "SamplingParams",
    "TLinFormerConfig",
    "TLinFormerForCausalLM",
    "plan_cache",
]

_HOMES = {
    "Engine": "engine",
    "SamplingParams": "sampling",
    "TLinFormerConfig": "config",
    "TLinFormerForCausalLM": "model",
    "plan_cache": "engine",
}


def _load_compiled_module() -> Any:
    if importlib.util.find_spec("tlinformer._C") is None:
        raise ImportError(
            f"tlinformer's compiled module is not in {__path__[0]}. Build it: `pip install .` in "
            "the repository; to run from inside the repository, where Python finds this folder "
            "first, `pip install -e .`"
        )
    # The compiled module needs their shared libraries; loaded here, they are found wherever
    # they are installed.
    import scipy_openblas32  # noqa: F401
    import torch  # noqa: F401

    return importlib.import_module("tlinformer._C")


if not TYPE_CHECKING:  # checkers see the imports above instead

    def __getattr__(name: str) -> Any:
        if name == "_C":
            return _load_compiled_module()
        if name in _HOMES:
            return getattr(importlib.import_module(f"tlinformer.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'tlinformer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
