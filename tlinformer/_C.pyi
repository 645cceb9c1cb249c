# The binding is not typed; tlinformer.engine is its typed face.
from typing import Any

def __getattr__(name: str) -> Any: ...
