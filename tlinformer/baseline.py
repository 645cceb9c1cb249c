"""The paper's "Base": a decoder-only Transformer of the same layers, for comparison (paper §4)."""

from __future__ import annotations

from torch import Tensor

from .layer import attend, rope_table
from .model import CausalLM


class TransformerForCausalLM(CausalLM):
    """Pre-norm Transformer with nb * P causal layers and TLinFormer's parameter names and count.

    The windows of the config have no effect. Its attention is PyTorch's own everywhere.
    """

    def hidden_states(self, input_ids: Tensor, first: int = 0) -> Tensor:
        """Token ids (B, L), integers -> (B, L - first, D): what the head turns into logits."""
        x = self.embed_tokens(input_ids)
        rope, rows = rope_table(self.config, x.size(1), x), [(0, x.size(1))]
        dropout = self.config.dropout if self.training else 0.0
        for block in self.blocks:
            for layer in block.layers:
                q, k, v = layer.project(x, rope)
                x = layer.finish(x, attend(q, k, v, rows, rows, [(0, 0)], dropout))
        return self.norm(x[:, first:])
