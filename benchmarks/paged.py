"""FlashInfer's decode attention, where it is installed, on caches as they lie in memory."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

PAGE = 16  # rows
HEAD_DIMS = (64, 128)  # that its kernels are compiled for


@cache
def installed() -> bool:
    """With what compiles its kernels."""
    found = shutil.which("nvcc") and shutil.which("ninja")
    return bool(found and importlib.util.find_spec("flashinfer"))


@cache
def workspace(device: torch.device) -> Tensor:
    """For the parts of a softmax: one call after another uses it."""
    return torch.zeros(2**27, dtype=torch.uint8, device=device)


class PagedDecode:
    """One row a sequence: q (B, Hq, 1, d), k and v (B, Hkv, rows, d), views of larger caches.

    A cache's rows count as pages that lie one after another. What a call plans for a shape it
    keeps, so that a CUDA graph can be captured from the second call on.
    """

    def __init__(self, scale: float, tensor_cores: bool) -> None:
        self.scale, self.tensor_cores = scale, tensor_cores
        self.planned: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = q.shape, k.shape, k.stride()
        if key not in self.planned:
            self.planned[key] = self.plan(q, k, v)
        return self.planned[key](q, k, v)

    def plan(self, q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        batch, heads, rows, d = k.shape
        whole = batch == 1 or k.stride(0) % (PAGE * d) == 0
        if k.stride() != v.stride() or k.stride()[2:] != (d, 1) or not whole:
            raise ValueError(f"keys of strides {k.stride()}, values of {v.stride()}: no pages")
        pages = -(-rows // PAGE)
        first = torch.arange(batch) * (k.stride(0) // (PAGE * d))
        indices = (first[:, None] + torch.arange(pages)).flatten()
        shape = (int(indices[-1]) + 1, heads, PAGE, d)
        strides = (PAGE * d, k.stride(1), d, 1)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace(q.device), "HND", use_tensor_cores=self.tensor_cores
        )
        wrapper.plan(
            (torch.arange(batch + 1) * pages).int(),
            indices.int().to(q.device),
            torch.full((batch,), (rows - 1) % PAGE + 1, dtype=torch.int32),
            q.size(1),
            heads,
            d,
            PAGE,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
            sm_scale=self.scale,
        )

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cached = k.as_strided(shape, strides), v.as_strided(shape, strides)
            return wrapper.run(q[:, :, 0], cached)[:, :, None]

        return run
