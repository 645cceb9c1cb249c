"""torch.ops.tlinformer.ranged_attention, and the gradient of window_attention on CUDA."""

import pytest
import torch
from conftest import CUDA_HEAD_SIZES, make_config, make_ids, make_model
from test_ops import EVERYWHERE, inputs, moved, reference

from tlinformer import _C
from tlinformer.layer import attend
from tlinformer.ops import MOST_SEGMENTS, ranged_attention, takes_ranges, window_attention

# Windows of a compress layer with overlapping histories, and rows of these that read them.
SEGMENTS = [
    (0, 40, 0, 0, 0),
    (40, 40, 40, 0, 40),
    (80, 33, 80, 0, 80),
    (20, 20, -1, 0, 40),
    (45, 35, -1, 0, 80),
    (7, 0, 0, 0, 0),
]


def sequence(heads, kv_heads, d, batch=2, rows=120):
    """q, k and v (B, rows, heads, d) and a gradient of the output, in float64."""
    torch.manual_seed(d)
    made = [
        torch.randn(batch, rows, n, d, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)
    ]
    total = sum(segment[1] for segment in SEGMENTS)
    return [*made, torch.randn(batch, total, heads, d, dtype=torch.float64)]


def by_pytorch(q, k, v):
    ranges = [
        ((a, a + n), (b, b + n) if b >= 0 else (0, 0), (c, c + m)) for a, n, b, c, m in SEGMENTS
    ]
    return attend(q, k, v, *(list(r) for r in zip(*ranges, strict=True))).unflatten(-1, q.shape[2:])


def learn(function, tensors, grad):
    """The function's value, and the gradients of the tensors."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def assert_twice_as_good(ours, eager, exact):
    """At most twice as far from float64 as eager PyTorch in the same dtype, and a little."""
    for x, y, z in zip(ours, eager, exact, strict=True):
        assert x.dtype == y.dtype and x.shape == z.shape
        if z.numel():
            bound = 2 * (y.double() - z).abs().max() + 1e-4
            assert (x.double() - z).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("d", CUDA_HEAD_SIZES)
def test_ranges_and_their_gradients(gpu, d, heads, kv_heads, dtype):
    *tensors, grad = (x.to(gpu.device, dtype) for x in sequence(heads, kv_heads, d))
    exact = learn(by_pytorch, [x.double() for x in tensors], grad.double())
    eager = learn(by_pytorch, tensors, grad)
    ours = learn(lambda *x: ranged_attention(*x, SEGMENTS), tensors, grad)
    assert_twice_as_good(ours, eager, exact)
    assert all(x.is_contiguous() for x in ours)
    again = learn(lambda *x: ranged_attention(*x, SEGMENTS), tensors, grad)
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", EVERYWHERE)
def test_gradient_of_a_window(gpu, shape, dtype):
    tensors = moved(inputs(shape), (gpu.device, dtype))
    grad = torch.randn_like(tensors[0])
    exact = learn(reference, [x.double() for x in tensors], grad.double())
    eager = learn(reference, tensors, grad)
    assert_twice_as_good(learn(window_attention, tensors, grad), eager, exact)
    strided = [x.mT.contiguous().mT for x in tensors]
    assert_twice_as_good(learn(window_attention, strided, grad.mT.contiguous().mT), eager, exact)


def mix(x):
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def kept(seed, head, rows, keys, group, probability):
    """(rows, keys) bool: what csrc/cuda/attention/dropout_bits.cuh says, in Python."""
    low, high = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF)
    of_rows = mix(low ^ mix(high + head & 0xFFFFFFFF))
    of_keys = mix(of_rows ^ 0x9E3779B9)
    a = mix(of_rows ^ (2 * torch.arange(rows) + group) * 0x9E3779B1 & 0xFFFFFFFF) | 1
    b = mix(of_keys ^ torch.arange(keys) * 0x9E3779B1 & 0xFFFFFFFF)
    # The lowest 32 bits of the product; 64 would overflow.
    high_part = (a[:, None] >> 16) * b & 0xFFFF
    bits = (a[:, None] & 0xFFFF) * b + (high_part << 16) & 0xFFFFFFFF
    return bits >= int(probability * 2**32)


def test_dropped_probabilities_are_independent():
    mask = torch.stack([kept(3 << 40, h, 300, 500, h % 2, 0.2) for h in range(8)]).double() - 0.8
    assert abs(mask.mean()) < 2e-3
    for other in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(1, 2), mask.roll((1, 1), (1, 2))):
        assert abs((mask * other).mean()) < 0.16 * 5e-3
    square = mask * mask.roll(1, 1)
    assert abs((square * square.roll(1, 2)).mean()) < 0.16**2 * 5e-3 + 1e-4


def test_dropout_on_cuda(gpu):
    probability, seed = 0.25, (-5 << 35) + 77
    q, k, v, grad = (x.to(gpu.device, torch.float16) for x in sequence(2, 2, 36))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flat = [number for segment in SEGMENTS for number in segment]
    on_device = torch.tensor([seed], device=gpu.device)

    def ours(q, k, v):
        op = torch.ops.tlinformer.ranged_attention
        return op(q, k, v, None, None, flat, None, probability, on_device, True)[0]

    def exact(q, k, v):
        lines = []
        for line in range(4):
            b, h = divmod(line, 2)
            masks = [kept(seed, line, 168, 120, g, probability).to(q.device) for g in (0, 1)]
            out, row = [], 0
            for start, n, window, context, m in SEGMENTS:
                if n == 0:
                    continue
                x = q[b, h, start : start + n]
                total = torch.zeros_like(x)
                for g, (first, count) in enumerate(((window, n), (context, m))):
                    if first < 0 or count == 0:
                        continue
                    s = x @ k[b, h, first : first + count].mT / 6
                    if g == 0:
                        s = s.masked_fill(torch.ones_like(s).triu(1) > 0, float("-inf"))
                    mask = masks[g][row : row + n, first : first + count] / (1 - probability)
                    total = total + (s.softmax(-1) * mask) @ v[b, h, first : first + count]
                out.append(total)
                row += n
            lines.append(torch.cat(out))
        return torch.stack(lines).unflatten(0, (2, 2))

    grad = grad.transpose(1, 2)
    want = learn(exact, [x.double() for x in (q, k, v)], grad.double())
    for x, y in zip(learn(ours, (q, k, v), grad), want, strict=True):
        assert (x.double() - y).abs().max() < 0.01


def test_dropout_follows_the_random_state(gpu):
    q, k, v, _ = (x.to(*gpu) for x in sequence(2, 2, 36))
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made += [ranged_attention(q, k, v, SEGMENTS, dropout=0.5) for _ in range(2)]
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[4])


def test_opcheck_of_ranges(gpu):
    q, k, v, _ = (x.to(*gpu).transpose(1, 2) for x in sequence(4, 2, 36))
    flat = [0, 40, 0, 0, 70, 30, 50, 40, 20, 60]  # both terms everywhere: no output is undefined
    seed = torch.tensor([5], device=gpu.device)
    for rows_first in (True, False):
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        arguments = (*tensors, None, None, flat, 0.5, 0.2, seed, rows_first)
        torch.library.opcheck(torch.ops.tlinformer.ranged_attention.default, arguments)


def test_model_learns_alike_compiled_and_not(gpu):
    config = make_config(hidden_size=72, num_attention_heads=2, block_depth=4, vocab_size=61)
    model = make_model(config, dtype=torch.float32).train()
    ids = make_ids(config, 2, 23)

    def grads(run, ids, dtype=torch.bfloat16):
        with torch.autocast(ids.device.type, dtype, enabled=dtype == torch.bfloat16):
            loss = run(ids).float().logsumexp(-1).mean()
        return [x.cpu() for x in torch.autograd.grad(loss, list(model.parameters()))]

    exact = grads(model, ids, torch.float32)
    rounded = [(y - x).norm() for y, x in zip(grads(model, ids), exact, strict=True)]
    model.to(gpu.device)
    for run in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        for ours, x, error in zip(grads(run, ids.to(gpu.device)), exact, rounded, strict=True):
            assert (ours - x).norm() <= 2 * error + 1e-4


def test_second_derivatives_on_cuda_are_an_error(gpu):
    tensors = [x.requires_grad_() for x in moved(inputs(EVERYWHERE[0]), gpu)]
    (grad,) = torch.autograd.grad(window_attention(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="compute second derivatives in float64 on the CPU"):
        grad.sum().backward()


def test_ranges_that_do_not_fit_are_errors(gpu):
    q, k, v, _ = (x.to(*gpu) for x in sequence(2, 2, 36))
    for segments, words in (
        ([(100, 30, -1, 0, 5)], "30 queries from 100 on is out of range; there are 120"),
        ([(0, 30, 100, 0, 0)], "30 window keys from 100 on is out of range"),
        ([(0, 30, -1, 100, 30)], "30 context keys from 100 on is out of range"),
        ([(0, 1, 0, 0, 0)] * (MOST_SEGMENTS + 1), "a launch takes at most 128"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=words):
            ranged_attention(q, k, v, segments)
    with pytest.raises(ValueError, match="seed is missing"):
        torch.ops.tlinformer.ranged_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), None, None, [0, 1, 0, 0, 0], None, 0.5
        )


def test_which_queries_have_a_kernel():
    query = torch.zeros(1, 4, 2, 36, dtype=torch.bfloat16)
    assert not takes_ranges(query, 1)
    if torch.cuda.is_available() and _C.has_cuda:
        assert takes_ranges(query.cuda(), MOST_SEGMENTS)
        for x, n in ((query.cuda(), MOST_SEGMENTS + 1), (query.float().cuda(), 1)):
            assert not takes_ranges(x, n)
    with pytest.raises(NotImplementedError, match="ranged_attention"):
        ranged_attention(query, query, query, [(0, 4, 0, 0, 0)])


@pytest.mark.parametrize("rows_first", [False, True])
def test_shapes_without_a_device(rows_first):
    with torch.device("meta"):
        q, k = (torch.empty(2, h, 120, 36, dtype=torch.bfloat16) for h in (4, 2))
    op = torch.ops.tlinformer.ranged_attention
    flat = [number for segment in SEGMENTS for number in segment]
    for leaf in (q, k):
        leaf.requires_grad_()
    output, terms, log_sum_exp = op(q, k, k, None, None, flat, rows_first=rows_first)
    assert output.shape == (2, 4, 168, 36) and terms.shape == (2, 8, 168, 36)
    assert log_sum_exp.shape == (2, 2, 4, 168) and log_sum_exp.dtype == torch.float32
    assert output.transpose(1, 2).is_contiguous() == rows_first
    output.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape
    _, terms, _ = op(q, k, k, None, None, [0, 5, 0, 0, 0])
    assert terms.numel() == 0
