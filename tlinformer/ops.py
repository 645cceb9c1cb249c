"""Attention as torch operators, for eager mode, autograd and torch.compile.

window_attention   of one window; on CUDA its gradient comes from ranged_attention
ranged_attention   of all windows of a sequence in one launch, with dropout: what training on CUDA
                   calls

`window_attention_forward` is the former's kernel, and `ranged_attention_backward` the latter's
gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tlinformer import _C  # defines torch.ops.tlinformer


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
        (B, Hq, M, d), contiguous, of the query's dtype. Differentiable in all five tensors; on CUDA
        once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the device has no kernel for the dtype or
            head size, or only one of the context tensors is given.
        NotImplementedError: the tensors are on another device, or on CUDA and this build is for the
            CPU only.
    """
    return torch.ops.tlinformer.window_attention(
        query, key, value, context_key, context_value, scale
    )


_definitions = torch.library.Library("tlinformer", "IMPL")


def _window_attention(query, key, value, context_key, context_value, scale=None):
    tensors = [x for x in (query, key, value, context_key, context_value) if x is not None]
    arguments = (query, key, value, context_key, context_value)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if learns and any(x.is_cuda for x in tensors):
        return torch.ops.tlinformer.ranged_attention(*arguments, [], scale)[0]
    return torch.ops.tlinformer.window_attention_forward(*arguments, scale)


_definitions.impl("window_attention", _window_attention, "CompositeImplicitAutograd")


@torch.library.register_fake("tlinformer::window_attention_forward")
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
    "tlinformer::window_attention_forward", _backward, setup_context=_setup_context
)

HAS_CUDA = _C.has_cuda
HEAD_SIZES = (32, 36, 40, 48, 64, 80, 96, 128)  # that CUDA kernels are compiled for
MOST_SEGMENTS = 128  # of a launch (csrc/cuda/attention/ranged_attention.h)


def takes_ranges(query: Tensor, segments: int) -> bool:
    """Whether `ranged_attention` has a kernel for a query (B, rows, Hq, d) and so many segments."""
    return (
        HAS_CUDA
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[3] in HEAD_SIZES
        and 0 < segments <= MOST_SEGMENTS
    )


def ranged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[tuple[int, int, int, int, int]],
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of ranges of rows to ranges of keys, on CUDA: what a layer of training needs.

    A segment (query, rows, window, context, context_rows) is the output rows that follow those of
    the segment before it, for the query rows from ``query`` on. The i-th reads, with a softmax
    each, the keys window ... window + i, and all ``context_rows`` keys from ``context`` on; the
    two terms are added. ``window`` = -1 and ``context_rows`` = 0 leave a term out. Segments may
    overlap in queries and in keys.

    Args:
        query: (B, rows, Hq, d), bfloat16 or float16, d and strides as in `window_attention`.
        key, value: (B, other rows, Hkv, d), same dtype.
        segments: at most MOST_SEGMENTS.
        scale: of the scores; 1/√d when None.
        dropout: probability, below 1, to drop one of the probabilities; which ones follows from
            torch's random state of the device.

    Returns:
        (B, sum of the segments' rows, Hq, d), contiguous. Differentiable, once.

    Raises:
        ValueError, RuntimeError: shapes, dtypes or ranges do not fit.
        NotImplementedError: not on CUDA, or this build is for the CPU only.
    """
    seed = None
    if dropout > 0:
        seed = torch.randint(-(2**62), 2**62, (1,), dtype=torch.int64, device=query.device)
    flat = [number for segment in segments for number in segment]
    heads = (x.transpose(1, 2) for x in (query, key, value))
    output, _, _ = torch.ops.tlinformer.ranged_attention(
        *heads, None, None, flat, scale, dropout, seed, True
    )
    return output.transpose(1, 2)


def _like_rows(x, heads, rows, rows_first):
    """New (B, heads, rows, d); with `rows_first`, in memory (B, rows, heads, d)."""
    if rows_first:
        return x.new_empty(x.shape[0], rows, heads, x.shape[3]).transpose(1, 2)
    return x.new_empty(x.shape[0], heads, rows, x.shape[3])


@torch.library.register_fake("tlinformer::ranged_attention")
def _fake_ranged(
    query,
    key,
    value,
    context_key,
    context_value,
    segments,
    scale=None,
    dropout=0.0,
    seed=None,
    rows_first=False,
):
    rows, reads_both = query.shape[2], context_key is not None and context_key.shape[2] > 0
    if segments:
        rows = sum(segments[1::5])
        entries = zip(segments[1::5], segments[2::5], segments[4::5], strict=True)
        reads_both = any(n > 0 and window >= 0 and m > 0 for n, window, m in entries)
    output = _like_rows(query, query.shape[1], rows, rows_first)
    terms = _like_rows(query, 2 * query.shape[1], rows if reads_both else 0, rows_first)
    lines = (2, *query.shape[:2], rows)
    return output, terms, query.new_empty(lines, dtype=torch.float32)


@torch.library.register_fake("tlinformer::ranged_attention_backward")
def _fake_ranged_backward(
    grad,
    query,
    key,
    value,
    context_key,
    context_value,
    output,
    terms,
    log_sum_exp,
    segments,
    scale=None,
    dropout=0.0,
    seed=None,
    rows_first=False,
):
    tensors = (query, key, value, context_key, context_value)
    return tuple(
        query.new_empty(0) if x is None else _like_rows(query, x.shape[1], x.shape[2], rows_first)
        for x in tensors
    )


def _ranged_setup(ctx, inputs, output):
    *tensors, ctx.segments, ctx.scale, ctx.dropout, seed, ctx.rows_first = inputs
    ctx.save_for_backward(*tensors, *output, seed)
    ctx.set_materialize_grads(False)


def _ranged_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    *tensors, seed = ctx.saved_tensors
    grads = torch.ops.tlinformer.ranged_attention_backward(
        grad, *tensors, ctx.segments, ctx.scale, ctx.dropout, seed, ctx.rows_first
    )
    context = grads[3:] if tensors[3] is not None else (None, None)
    return *grads[:3], *context, *(None,) * 5


torch.library.register_autograd(
    "tlinformer::ranged_attention", _ranged_backward, setup_context=_ranged_setup
)


def _refuse_twice(ctx, *_):
    raise RuntimeError(
        "the gradient of window_attention on CUDA is not differentiable itself; compute second "
        "derivatives in float64 on the CPU"
    )


torch.library.register_autograd("tlinformer::ranged_attention_backward", _refuse_twice)
