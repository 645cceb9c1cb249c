"""The fastest attention kernel for each shape, of PyTorch's and FlashInfer's, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from measure import milliseconds
from paged import HEAD_DIMS, PagedDecode, installed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
CPU = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def sdpa(
    backend: SDPBackend, causal: bool, scale: float, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    shape, grouped = q.shape, q.size(1) != k.size(1)
    if grouped and q.size(2) == 1:  # the heads of a group are rows that see the same keys
        q, grouped = q.reshape(q.size(0), k.size(1), -1, q.size(3)), False
    with sdpa_kernel(backend):
        o = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return o.reshape(shape)


@cache
def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_decode(scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex()(q, k, v, scale=scale, enable_gqa=q.size(1) != k.size(1))


class FastestAttention:
    """Attention that keeps, for each shape, the way that was fastest when it first came.

    q is (B, Hq, rows, d), k and v are (B, Hkv, rows', d); with `causal`, rows = rows'.
    """

    def __init__(self, scale: float, device: torch.device) -> None:
        self.scale, self.device = scale, device
        self.picked: dict[tuple[int, int, bool], tuple[str, Way]] = {}

    def names(self) -> dict[str, str]:
        """What was picked for how many rows and, as a power of two, keys."""
        return {
            f"{rows} x {2**bits // 2}+" + ", causal" * causal: name
            for (rows, bits, causal), (name, _) in self.picked.items()
        }

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        shape = (q.size(2), k.size(2).bit_length(), causal)
        if shape not in self.picked:
            # A long causal call is tried on its last rows.
            part = slice(-8192, None) if causal else slice(None)
            self.picked[shape] = self.pick(q[:, :, part], k[:, :, part], v[:, :, part], causal)
        return self.picked[shape][1](q, k, v)

    def ways(self, rows: int, head_dim: int, causal: bool) -> dict[str, Way]:
        if self.device.type != "cuda":
            return {"sdpa": partial(sdpa, CPU, causal, self.scale)}
        found = {
            name: partial(sdpa, getattr(SDPBackend, name.upper()), causal, self.scale)
            for name in ("flash_attention", "efficient_attention", "cudnn_attention")
        }
        if rows == 1:
            found["math"] = partial(sdpa, SDPBackend.MATH, causal, self.scale)
        if rows == 1 and head_dim in HEAD_DIMS and installed():
            found["flashinfer"] = PagedDecode(self.scale, tensor_cores=False)
            found["flashinfer_tensor_cores"] = PagedDecode(self.scale, tensor_cores=True)
        return found

    def pick(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool
    ) -> tuple[str, Callable[..., Tensor]]:
        """The fastest way that computes this and agrees with the others."""
        ways = self.ways(q.size(2), q.size(3), causal)
        if len(ways) == 1:
            return next(iter(ways.items()))
        took: dict[str, float] = {}
        expected = None
        for name, way in ways.items():
            expected = self.try_way(name, way, (q, k, v), expected, took)
        # FlexAttention compiles for seconds: only where no kernel reads keys and values as fast as
        # a copy of the keys does, which moves as many bytes.
        copying = milliseconds(k.clone, self.device, 5)
        if q.size(2) == 1 and k.size(2) >= 8192 and min(took.values(), default=1e9) > 1.3 * copying:
            ways["flex_attention"] = partial(flex_decode, self.scale)
            name = "flex_attention"
            self.try_way(name, ways[name], (q, k, v), expected, took)
        if not took:
            raise RuntimeError(
                f"no attention takes queries {tuple(q.shape)}, keys {tuple(k.shape)}"
            )
        best = min(took, key=lambda name: took[name])
        return best, ways[best]

    def try_way(
        self,
        name: str,
        way: Callable[..., Tensor],
        qkv: tuple[Tensor, Tensor, Tensor],
        expected: Tensor | None,
        took: dict[str, float],
    ) -> Tensor | None:
        """Times a way that is right; the output that others must agree with."""
        try:
            o = way(*qkv).float()
            if expected is None or (o - expected).norm() <= 0.02 * expected.norm():
                took[name] = milliseconds(partial(way, *qkv), self.device, 5)
            return o if expected is None else expected
        except Exception:  # each kernel has its own way to say "not this shape"
            return expected
