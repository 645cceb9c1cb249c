"""torch.ops.tlinformer.window_attention against explicit attention in float64."""

import re

import pytest
import torch
from conftest import CUDA_HEAD_SIZES
from torch.nn.functional import scaled_dot_product_attention

from tlinformer.ops import window_attention

# (B, Hq, Hkv, M, N, d); N = None: no context
SHAPES = [
    (2, 4, 2, 37, 150, 36),
    (1, 12, 12, 16, 64, 36),
    (3, 6, 1, 17, 65, 12),
    (1, 2, 2, 1, 1, 8),
    (2, 3, 3, 1, 200, 64),
    (1, 4, 4, 130, 1, 5),
    (2, 8, 8, 260, 140, 20),
    (1, 2, 1, 9, 11, 260),
    (2, 4, 2, 33, None, 12),
    (1, 1, 1, 5, 0, 1),
    (1, 2, 1, 0, 3, 4),
]
SMALL = (1, 4, 2, 3, 5, 4)
# Those with head sizes that every device takes.
EVERYWHERE = [
    *[shape for shape in SHAPES if shape[-1] in (36, 64)],
    (2, 4, 2, 300, 3000, 36),
    (1, 2, 1, 130, None, 128),
    (2, 2, 2, 1, 0, 40),
    (1, 2, 2, 0, 7, 32),
]


def dense(shape):
    return torch.randn(shape, dtype=torch.float64)


def poisoned_slice(shape):
    """Random values as a slice of a larger tensor that is NaN everywhere else."""
    larger = torch.full([n + 2 for n in shape], float("nan"), dtype=torch.float64)
    view = larger[1:-1, 1:-1, 1:-1, 1:-1]
    view.copy_(dense(shape))
    return view


def inputs(shape, make=dense):
    torch.manual_seed(sum(n or 0 for n in shape))
    b, hq, hkv, m, n, d = shape
    tensors = [make((b, heads, m, d)) for heads in (hq, hkv, hkv)]
    return tensors + ([] if n is None else [make((b, hkv, n, d)) for _ in range(2)])


def attend(query, key, value, scale, causal):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf"))
    return scores.softmax(-1) @ value


def reference(query, key, value, context_key=None, context_value=None, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = attend(query, key, value, scale, causal=True)
    if context_key is not None:
        output = output + attend(query, context_key, context_value, scale, causal=False)
    return output


def moved(tensors, place):
    """The tensors on the device and in the dtype of `place`; slices stay slices of NaN."""
    inside = (slice(1, -1),) * 4
    return [x.to(*place) if x._base is None else x._base.to(*place)[inside] for x in tensors]


def tolerance(tensors, exact, scale):
    """In 16 bits twice the error of eager PyTorch, and a little."""
    if tensors[0].dtype == torch.float32:
        return 1e-5
    eager = reference(*tensors, scale=scale)
    errors = (eager.double() - exact).abs()
    return 2 * float(errors.max() if errors.numel() else 0) + 1e-4


@pytest.mark.parametrize("make", [dense, poisoned_slice])
@pytest.mark.parametrize("shape", EVERYWHERE)
def test_every_place(every_place, shape, make):
    tensors = moved(inputs(shape, make), every_place)
    for scale in (None, -0.3, 0.0):
        exact = reference(*(x.double() for x in tensors), scale=scale)
        ours = window_attention(*tensors, scale=scale)
        assert ours.dtype == every_place.dtype
        assert ours.device == tensors[0].device
        assert ours.is_contiguous()
        atol = tolerance(tensors, exact, scale)
        torch.testing.assert_close(ours.double(), exact, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", CUDA_HEAD_SIZES)
def test_cuda_takes_any_strides(gpu, d, dtype):
    tensors = moved(inputs((2, 4, 2, 37, 150, d)), (gpu.device, dtype))
    expected = window_attention(*tensors)
    for swap in ((1, 2), (0, 2), (2, 3), (0, 3)):
        strided = [x.transpose(*swap).contiguous().transpose(*swap) for x in tensors]
        assert torch.equal(window_attention(*strided), expected)
    flat = [torch.cat([x.new_zeros(1), x.flatten()]) for x in tensors]
    shifted = [x[1:].view(y.shape) for x, y in zip(flat, tensors, strict=True)]
    assert torch.equal(window_attention(*shifted), expected)
    shared = tensors[1][:, :, :1].expand_as(tensors[1])
    same = window_attention(tensors[0], shared.contiguous(), *tensors[2:])
    assert torch.equal(window_attention(tensors[0], shared, *tensors[2:]), same)


def test_cuda_follows_the_current_stream(gpu):
    tensors = moved(inputs(SHAPES[0]), gpu)
    expected = window_attention(*tensors)
    zeros = [torch.zeros_like(x) for x in tensors]
    stream = torch.cuda.Stream(gpu.device)
    stream.wait_stream(torch.cuda.current_stream(gpu.device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for to, x in zip(zeros, tensors, strict=True):
            to.copy_(x)
        ours = window_attention(*zeros)
    stream.synchronize()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("make", [dense, poisoned_slice])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, make):
    tensors = inputs(shape, make)
    for scale in (None, 0.3):
        expected = reference(*tensors, scale=scale)
        for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
            ours = window_attention(*(x.to(dtype) for x in tensors), scale=scale)
            assert ours.dtype == dtype
            assert ours.is_contiguous()
            torch.testing.assert_close(ours.double(), expected, atol=atol, rtol=0)


def test_bfloat16_is_computed_in_float32():
    tensors = [x.bfloat16() for x in inputs(SHAPES[0], poisoned_slice)]
    ours = window_attention(*tensors)
    exact = reference(*(x.double() for x in tensors))
    assert ours.dtype == torch.bfloat16
    # Off by the rounding of the result alone: half a unit in the last of 8 bits.
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_matches_scaled_dot_product_attention():
    query, key, value, context_key, context_value = inputs(SHAPES[1])
    expected = scaled_dot_product_attention(
        query, key, value, is_causal=True
    ) + scaled_dot_product_attention(query, context_key, context_value)
    ours = window_attention(query, key, value, context_key, context_value)
    torch.testing.assert_close(ours, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_any_strides(dtype, atol):
    tensors = [x.to(dtype) for x in inputs(SHAPES[0])]

    def check(*strided):
        expected = reference(*(x.double() for x in strided))
        ours = window_attention(*strided).double()
        torch.testing.assert_close(ours, expected, atol=atol, rtol=0)

    for swap in ((1, 2), (0, 2), (2, 3), (0, 3)):
        check(*(x.transpose(*swap).contiguous().transpose(*swap) for x in tensors))
    shared = tensors[1][:, :, :1].expand_as(tensors[1])
    check(tensors[0], shared, *tensors[2:])


def test_large_scores_do_not_overflow():
    tensors = inputs(SHAPES[0])
    ours = window_attention(*(x.float() for x in tensors), scale=1e4)
    assert ours.isfinite().all()
    alone = window_attention(*tensors, scale=1e6)  # in the limit, the best key's value
    best = (tensors[0] @ tensors[3].repeat_interleave(2, 1).mT).argmax(-1)
    context = tensors[4].repeat_interleave(2, 1).take_along_dim(best[..., None], 2)
    window = attend(*tensors[:3], 1e6, causal=True)
    torch.testing.assert_close(alone - window, context, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_nan_input_reaches_its_own_rows_only(name, dtype):
    tensors = dict(zip(("query", "key", "value"), inputs((1, 8, 8, 140, None, 8)), strict=True))
    for row in (0, 20, 130):
        poisoned = {key: x.to(dtype, copy=True) for key, x in tensors.items()}
        poisoned[name][0, 0, row] = float("nan")
        nan = window_attention(**poisoned).isnan()
        last = row if name == "query" else 139
        assert nan[0, 0, row : last + 1].all()
        assert nan.sum() == (last + 1 - row) * 8


@pytest.mark.parametrize("shape", [SMALL, (1, 2, 2, 3, None, 4)])
def test_opcheck(shape):
    op = torch.ops.tlinformer.window_attention.default
    for requires_grad in (True, False):
        tensors = [x.requires_grad_(requires_grad) for x in inputs(shape)]
        torch.library.opcheck(op, (*tensors, *[None] * (5 - len(tensors)), 0.5))


@pytest.mark.parametrize("shape", [SHAPES[0], (1, 2, 2, 33, None, 64)])
def test_opcheck_on_cuda(gpu, shape):
    op = torch.ops.tlinformer.window_attention.default
    tensors = [x.requires_grad_() for x in moved(inputs(shape), gpu)]
    torch.library.opcheck(op, (*tensors, *[None] * (5 - len(tensors)), 0.5))


@pytest.mark.parametrize("shape", [SMALL, (2, 2, 2, 3, None, 2), (1, 2, 1, 1, 1, 2)])
def test_gradients(shape):
    tensors = [x.requires_grad_() for x in inputs(shape)]
    assert torch.autograd.gradcheck(window_attention, tensors)
    assert torch.autograd.gradgradcheck(window_attention, tensors, fast_mode=True)


def test_gradients_keep_the_dtype(every_place):
    tensors = [x.requires_grad_() for x in moved(inputs((1, 4, 2, 3, 5, 36)), every_place)]
    window_attention(*tensors).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in tensors]
    reference(*exact).sum().backward()
    for ours, expected in zip(tensors, exact, strict=True):
        assert ours.grad.dtype == every_place.dtype
        torch.testing.assert_close(ours.grad.double(), expected.grad, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    tensors = [x.requires_grad_() for x in inputs(SMALL)]

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(*tensors):
        return window_attention(*tensors).square().sum()

    grads = torch.autograd.grad(compiled(*tensors), tensors)
    expected = torch.autograd.grad(reference(*tensors).square().sum(), tensors)
    torch.testing.assert_close(grads, expected)


def replaced(**changes):
    names = ("query", "key", "value", "context_key", "context_value")
    arguments = dict(zip(names, inputs(SMALL), strict=True))
    return {**arguments, **changes}


ERRORS = {
    "query is (4, 3, 4), must be (batch,": {"query": dense((4, 3, 4))},
    "query is (1, 4, 3, 0), must be": {"query": dense((1, 4, 3, 0))},
    "key is (2, 3, 4), must be (batch,": {"key": dense((2, 3, 4))},
    "number of heads that divides the query's 4": {"key": dense((1, 3, 3, 4))},
    "key is (1, 2, 2, 4), must be (1, 2, 3, 4)": {"key": dense((1, 2, 2, 4))},
    "key is (2, 2, 3, 4), must be (1, 2, 3, 4)": {"key": dense((2, 2, 3, 4))},
    "value is (1, 2, 3, 5), must be (1, 2, 3, 4)": {"value": dense((1, 2, 3, 5))},
    "value is Float, query is Double": {"value": dense((1, 2, 3, 4)).float()},
    "context_key is (1, 4, 5, 4), must be (1, 2, 5, 4)": {"context_key": dense((1, 4, 5, 4))},
    "context_key is (5, 4), must be": {"context_key": dense((5, 4))},
    "context_value is (1, 2, 6, 4), must be (1, 2, 5, 4)": {"context_value": dense((1, 2, 6, 4))},
    "context_key is Half, query is Double": {"context_key": dense((1, 2, 5, 4)).half()},
    "only context_key was given": {"context_value": None},
    "only context_value was given": {"context_key": None},
    "scale is nan, must be finite": {"scale": float("nan")},
    "scale is inf, must be finite": {"scale": float("inf")},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        window_attention(**replaced(**ERRORS[message]))


def test_unsupported_dtypes_and_devices_are_errors():
    half = {name: x.half() for name, x in replaced().items()}
    with pytest.raises(ValueError, match=r"query is Half, must be Float, Double or BFloat16"):
        window_attention(**half)
    sparse = {name: x.to_sparse() for name, x in replaced().items()}
    with pytest.raises(NotImplementedError, match="window_attention"):
        window_attention(**sparse)


def test_cuda_errors(gpu):
    query, *rest = moved(inputs(SHAPES[0]), gpu)
    with pytest.raises(ValueError, match=r"query is Float, must be BFloat16 or Half on CUDA"):
        window_attention(*(x.float() for x in (query, *rest)))
    with pytest.raises(ValueError, match=r"head size on CUDA must be one of 32 36 40 48 64 80 96"):
        window_attention(*moved(inputs(SMALL), gpu))
    for tensors in ((query.cpu(), *rest), (query, rest[0].cpu(), *rest[1:])):
        with pytest.raises(ValueError, match=r"key and query are on different devices"):
            window_attention(*tensors)
