"""Peers whose state does not grow, through flash-linear-attention (a GPU and Triton).

Depth, width, vocabulary and tied embeddings are those of the size; the width of the MLP (Mamba-2:
the depth) makes the parameters as many, and a row says how many. The recurrent step is one CUDA
graph over fixed states.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from peers import Graphed
from sizes import transformer_flops, weight_count
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tlinformer import TLinFormerConfig


def provide_mamba_kernels() -> None:
    """Makes mamba_ssm's Triton kernels importable, all that Mamba-2 needs of it.

    The package's own imports want the compiled scan of Mamba-1, which no wheel has; without it
    flash-linear-attention, when it is imported, finds no kernels and quietly goes without.
    """
    spec = importlib.util.find_spec("mamba_ssm")
    if spec and spec.submodule_search_locations and "mamba_ssm" not in sys.modules:
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["mamba_ssm"] = package


class Linear(Graphed):
    """A model of flash-linear-attention; `kind` names its classes."""

    kind = ""
    piece = 65536  # tokens of a prefill's call
    needs: tuple[str, ...] = ("fla.models", "transformers", "triton")

    @classmethod
    def shape(cls, config: TLinFormerConfig, units: int) -> dict[str, Any]:
        """Heads as its authors choose them for a width, and what makes the parameters equal."""
        raise NotImplementedError

    @classmethod
    def missing(cls) -> str:
        provide_mamba_kernels()
        for name in cls.needs:
            try:
                if importlib.util.find_spec(name) is None:
                    return name
            except ImportError as error:  # of a package above it, or of what that needs
                return f"{name} ({' '.join(str(error).split())[:100]})"
        return "" if torch.cuda.is_available() else "a GPU, which its kernels need"

    @classmethod
    def build(cls, config: TLinFormerConfig, units: int) -> Any:
        models = importlib.import_module("fla.models")
        sizes = {"num_hidden_layers": config.num_layers} | cls.shape(config, units)
        own = getattr(models, f"{cls.kind}Config")(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            tie_word_embeddings=True,
            fuse_cross_entropy=False,
            **sizes,
        )
        model = getattr(models, f"{cls.kind}ForCausalLM")(own)
        model.tie_weights()
        return model

    @classmethod
    def make(cls, config: TLinFormerConfig, device: torch.device, dtype: torch.dtype) -> Any:
        def count(units: int) -> int:
            with torch.device("meta"):
                return sum(p.numel() for p in cls.build(config, units).parameters())

        least = count(1)
        units = 1 + round((weight_count(config) - least) / (count(2) - least))
        torch.manual_seed(0)
        with torch.device(device):
            model = cls.build(config, max(1, units))
        model = model.to(device, dtype).eval().requires_grad_(False)
        model.tlinformer_config = config
        return model

    def __init__(self, model: Any, max_context: int, batch: int) -> None:
        super().__init__(model, max_context, batch)
        self.config = model.tlinformer_config
        self.cache: Any = None
        self.states: list[tuple[Any, Any]] = []  # of each layer: fixed tensors, their structure
        self.saved: list[Tensor] = []

    @classmethod
    def model_of(cls) -> Any:
        return cls

    @classmethod
    def reference(cls, model: Any, ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    @classmethod
    def state_bytes(cls, config: TLinFormerConfig, context: int, batch: int, element: int) -> int:
        return 0  # `measured_state` tells; it does not depend on the context

    @classmethod
    def prefill_flops(cls, config: TLinFormerConfig, length: int) -> float:
        return transformer_flops(config, length, 0)

    def measured_state(self) -> int:
        return sum(t.numel() * t.itemsize for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        leaves = tree_leaves([self.cache[i] for i in range(len(self.cache))])
        return [t for t in leaves if isinstance(t, Tensor)]

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        self.cache, logits = None, None
        for piece in ids.split(self.piece, 1):
            out = self.model(
                piece.to(self.device), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
            self.cache, logits = out.past_key_values, out.logits
        self._fix()
        return logits[:, -1]

    def fill(self, length: int) -> None:
        """The state of a short prompt: its size and the cost of a token are those of any."""
        super().fill(min(length, 256))

    def _fix(self) -> None:
        """From now on the states stay where they are."""
        self.states = []
        for i in range(len(self.cache)):
            leaves, structure = tree_flatten(self.cache[i])
            fixed = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
            self.states.append((fixed, structure))
            self.cache[i].update(tree_unflatten(fixed, structure))

    def tokens(self) -> Callable[[int], Any]:
        self.saved = [t.clone() for t in self._tensors()]
        return super().tokens()

    def rewind(self) -> None:
        for fixed, saved in zip(self._tensors(), self.saved, strict=True):
            fixed.copy_(saved)
        self.token.zero_()

    def forward(self) -> Tensor:
        out = self.model(
            self.token[:, None], past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        for i, (fixed, structure) in enumerate(self.states):
            new, _ = tree_flatten(self.cache[i])
            for to, value in zip(fixed, new, strict=True):
                if isinstance(to, Tensor) and to is not value:
                    to.copy_(value)
            self.cache[i].update(tree_unflatten(fixed, structure))
        return out.logits[:, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        self.token.copy_(tokens)
        return self.forward()

    def detail(self) -> dict[str, Any]:
        count = sum(p.numel() for p in self.model.parameters())
        return super().detail() | {"parameters": count, "state_bytes": self.measured_state()}


class GLA(Linear):
    label, kind = "GLA", "GLA"

    @classmethod
    def shape(cls, config: TLinFormerConfig, units: int) -> dict[str, Any]:
        return {"num_heads": 4, "intermediate_size": 8 * units}


class GatedDeltaNet(Linear):
    label, kind = "Gated DeltaNet", "GatedDeltaNet"

    @classmethod
    def shape(cls, config: TLinFormerConfig, units: int) -> dict[str, Any]:
        # Keys of 3/4 of the width, values twice as wide; heads of 256 at most.
        heads = max(3, config.hidden_size * 3 // 4 // 256)
        size = config.hidden_size * 3 // 4 // heads // 4 * 4
        return {"num_heads": heads, "head_dim": size, "intermediate_size": 8 * units}


class Mamba2(Linear):
    label, kind = "Mamba-2", "Mamba2"
    piece = 2**30  # all at once: with a state it takes one token
    needs = (*Linear.needs, "mamba_ssm")  # without it flash-linear-attention has no fast kernels

    @classmethod
    def missing(cls) -> str:
        if without := super().missing():
            return without
        layer = importlib.import_module("fla.layers.mamba2")
        return "" if layer.is_fast_path_available else "the kernels of mamba_ssm"

    @classmethod
    def shape(cls, config: TLinFormerConfig, units: int) -> dict[str, Any]:
        # It has no MLP: there are more layers instead. Twice the width, in heads of 48 or 64.
        size = 64 if config.hidden_size % 32 == 0 else 48
        heads = 2 * config.hidden_size // size
        return {"num_heads": heads, "head_dim": size, "num_hidden_layers": units}
