"""Attention of the window path as a torch operator, for eager mode, autograd and torch.compile."""

import torch
from torch import Tensor

from tlinformer import _C  # noqa: F401  (defines torch.ops.tlinformer)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context_key: Tensor | None = None,
    context_value: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention over the window plus full attention over the context, exact.

    softmax(causal(query · keyᵀ · scale)) · value + softmax(query · context_keyᵀ · scale) ·
    context_value: each term has a softmax of its own and the outputs are added (paper, section 3).
    Positions are not looked at: queries and keys come already rotated.

    Args:
        query: (B, Hq, M, d). On the CPU float32, float64 or bfloat16, of any head size d; on CUDA
            bfloat16 or float16, with d one of 32, 36, 40, 48, 64, 80, 96, 128. Those 16 bits are
            computed in float32; on CUDA the probabilities are rounded to them. Any strides; a
            strided last dimension costs a copy, as do rows on CUDA that are no multiple of 16 bytes
            apart (8 bytes for d = 36).
        key, value: (B, Hkv, M, d), same dtype; Hkv divides Hq, and query head h reads key/value
            head h // (Hq / Hkv).
        context_key, context_value: (B, Hkv, N, d), same dtype, or None. N = 0 is like None.
        scale: of the scores; 1/√d when None.

    Returns:
        (B, Hq, M, d), contiguous, of the query's dtype. Differentiable in all five tensors.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the device has no kernel for the dtype or
            head size, or only one of the context tensors is given.
        NotImplementedError: the tensors are on another device, or on CUDA and this build is for the
            CPU only.
    """
    return torch.ops.tlinformer.window_attention(
        query, key, value, context_key, context_value, scale
    )


@torch.library.register_fake("tlinformer::window_attention")
def _fake(query, key, value, context_key, context_value, scale=None):
    return query.new_empty(query.shape)


def _setup_context(ctx, inputs, output):
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale


def _attend_backward(grad, query, key, value, scale, causal):
    """Gradients of softmax(query · keyᵀ · scale) · value, the probabilities recomputed.

    Heads of grad and query are grouped, (B, Hkv, G, M, d); key and value are (B, Hkv, N, d).
    """
    scores = torch.einsum("bhgmd,bhnd->bhgmn", query, key) * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    probabilities = scores.softmax(-1)
    grad_value = torch.einsum("bhgmn,bhgmd->bhnd", probabilities, grad)
    grad_probabilities = torch.einsum("bhgmd,bhnd->bhgmn", grad, value)
    mean = (grad_probabilities * probabilities).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - mean) * scale
    grad_query = torch.einsum("bhgmn,bhnd->bhgmd", grad_scores, key)
    grad_key = torch.einsum("bhgmn,bhgmd->bhnd", grad_scores, query)
    return grad_query, grad_key, grad_value


def _backward(ctx, grad):
    query, key, *rest = ctx.saved_tensors
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = (key.shape[1], query.shape[1] // key.shape[1])

    def wide(x):
        return x.to(dtype)

    grad, grouped = (wide(x).unflatten(1, groups) for x in (grad, query))
    grad_query = torch.zeros_like(grouped)
    grads = []
    for keys, values, causal in ((key, rest[0], True), (*rest[1:], False)):
        if keys is None:
            grads += [None, None]
            continue
        of_query, *of_pair = _attend_backward(
            grad, grouped, wide(keys), wide(values), ctx.scale, causal
        )
        grad_query = grad_query + of_query
        grads += [x.to(query.dtype) for x in of_pair]
    return grad_query.flatten(1, 2).to(query.dtype), *grads, None


torch.library.register_autograd(
    "tlinformer::window_attention", _backward, setup_context=_setup_context
)
