from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, make_config, make_ids, make_model
from reference import reference_logits, reference_transformer_logits
from torch import nn

from tlinformer.baseline import TransformerForCausalLM
from tlinformer.config import TLinFormerConfig
from tlinformer.layer import Layer, attend, rope_table, rotate
from tlinformer.model import CausalLM, TLinFormerForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
MakeModel = Callable[..., CausalLM]

# Every corner of the architecture: (config fields, batch, lengths of the sequence).
SHAPES: dict[str, tuple[dict[str, object], int, tuple[int, ...]]] = {
    "plain": ({}, 2, (1, 3, 4, 5, 8, 9, 22)),
    "window of one token": ({"generation_window": 1}, 1, (1, 2, 9)),
    "history window of one row": ({"history_window": 1}, 1, (4, 5, 14)),
    "history window never filled": ({"history_window": 64}, 1, (21,)),
    "history window smaller than window": ({"history_window": 3}, 2, (17,)),
    "history window not a multiple": ({"history_window": 10}, 1, (31,)),
    "no hidden layer": ({"block_depth": 2}, 2, (4, 19)),
    "two hidden layers": ({"block_depth": 4}, 1, (19,)),
    "one block": ({"num_blocks": 1}, 2, (4, 19)),
    "three blocks": ({"num_blocks": 3}, 1, (19,)),
    "one block of two layers": ({"num_blocks": 1, "block_depth": 2}, 1, (13,)),
    "head size 36": ({"hidden_size": 72}, 1, (18,)),
    "head size 2": ({"hidden_size": 6, "num_attention_heads": 3}, 1, (18,)),
    "grouped heads": ({"num_attention_heads": 6, "num_key_value_heads": 2}, 2, (4, 18)),
    "one key head": ({"num_attention_heads": 4, "num_key_value_heads": 1}, 1, (18,)),
    "auto": ({"history_window": "auto", "history_window_coefficient": 4.0}, 1, (50,)),
    "tconstformer": ({"variant": "tconstformer"}, 2, (4, 18)),
    "tconstformer, one block": ({"variant": "tconstformer", "num_blocks": 1}, 1, (18,)),
    "tconstformer, no hidden": ({"variant": "tconstformer", "block_depth": 2}, 1, (18,)),
    "other constants": ({"rope_theta": 100.0, "layer_norm_eps": 0.1}, 1, (18,)),
}
PAPER = TLinFormerConfig(vocab_size=50257, hidden_size=432, num_attention_heads=12)


def test_reference_matches_golden(golden: Golden) -> None:
    config, ids, logits, weights = golden
    ours = reference_logits(config, weights, ids)
    torch.testing.assert_close(ours, logits.double(), rtol=0, atol=1e-6)
    last = reference_logits(config, weights, ids, last_only=True)
    torch.testing.assert_close(last, ours[:, -1], rtol=0, atol=1e-12)


def test_model_matches_golden(golden: Golden, device: torch.device) -> None:
    config, ids, logits, weights = golden
    model = TLinFormerForCausalLM(config).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        ours = model.to(device)(ids.to(device)).cpu()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_model_matches_reference(shape: str, device: torch.device, small_model: MakeModel) -> None:
    changes, batch, lengths = SHAPES[shape]
    model = small_model(**changes).to(device)
    for length in lengths:
        ids = make_ids(model.config, batch, length)
        with torch.no_grad():
            ours = model(ids.to(device)).cpu()
        theirs = reference_logits(model.config, make_cpu_weights(model), ids)
        assert ours.shape == (batch, length, model.config.vocab_size)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def make_cpu_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("variant", ["tlinformer", "tconstformer"])
def test_gradients_match_reference(variant: str, small_model: MakeModel) -> None:
    model = small_model(variant=variant, num_key_value_heads=1)
    ids = make_ids(model.config, 2, 15)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pull = torch.randn(2, 15, model.config.vocab_size, dtype=torch.float64)
    ours = torch.autograd.grad((model(ids) * pull).sum(), parameters)
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    logits = reference_logits(model.config, dict(zip(names, copies, strict=True)), ids)
    theirs = torch.autograd.grad((logits * pull).sum(), copies)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert a.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_rows_computed_are_the_rows_needed(
    small_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """22 tokens in windows of 4: X has 22 rows, A 4 + 8 + ... + 20 = 60, Z 4 + 5 * 4 = 24."""
    model = small_model()
    projected, finished = [], []
    project, finish = Layer.project, Layer.finish

    def count_project(self: Layer, x: torch.Tensor, *args: object) -> object:
        q, k, v = project(self, x, *args)
        projected.append((q.size(1), k.size(1)))
        return q, k, v

    def count_finish(self: Layer, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        finished.append(x.size(1))
        return finish(self, x, o)

    monkeypatch.setattr(Layer, "project", count_project)
    monkeypatch.setattr(Layer, "finish", count_finish)
    model(make_ids(model.config, 1, 22))
    x, a, z = 22, 60, 24
    inner = [(x + z, x + z), (x, x + z)]
    assert projected == [(x, x), *inner, (x + z, x + a), *inner]
    assert finished == [x + z, x + z, x + a, x + z, x + z, x]


@pytest.mark.parametrize("budget", [0, 7, 40, 10**9])
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_logits_do_not_depend_on_grouping(
    budget: int, num_blocks: int, small_model: MakeModel
) -> None:
    model = small_model(num_blocks=num_blocks)
    ids = make_ids(model.config, 2, 30)
    whole = model(ids)  # with autograd there is one group
    model.history_row_budget = budget
    groups = []
    model.blocks[0].register_forward_hook(lambda *_: groups.append(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), whole, rtol=0, atol=1e-12)
    assert (len(groups) > 1) == (budget < 10**9)


@pytest.mark.parametrize("cls", [TLinFormerForCausalLM, TransformerForCausalLM])
def test_rows_from_a_position_on_are_those_of_all(cls: type[CausalLM]) -> None:
    model = make_model(make_config(), cls=cls)
    ids = make_ids(model.config, 2, 22)
    whole = model.hidden_states(ids)
    for first in (3, 4, 13, 21):
        part = model.hidden_states(ids, first)
        torch.testing.assert_close(part, whole[:, first:], rtol=0, atol=1e-12)


def test_positions_ignore_the_future_and_the_batch(small_model: MakeModel) -> None:
    model = small_model()
    ids = make_ids(model.config, 3, 22)
    with torch.no_grad():
        whole = model(ids)
        for length in (1, 4, 9, 21):
            part = model(ids[1:2, :length])
            torch.testing.assert_close(whole[1:2, :length], part, rtol=0, atol=1e-11)


def test_tconstformer_differs_only_behind_a_history(small_model: MakeModel) -> None:
    ids = make_ids(make_config(), 1, 12)
    with torch.no_grad():
        ours, other = (small_model(variant=v)(ids) for v in ("tlinformer", "tconstformer"))
    torch.testing.assert_close(ours[:, :4], other[:, :4], rtol=0, atol=1e-12)
    assert (ours[:, 4:] - other[:, 4:]).abs().amax(-1).min() > 1e-3


def test_rope_is_exact_at_a_million_tokens() -> None:
    config, far = make_config(), 1_000_000
    row = rope_table(config, far + 1, torch.empty(0))[0, far, 0]
    assert row.dtype == torch.float32
    for i, (cos, sin) in enumerate(row.tolist()):
        angle = Decimal(far) * Decimal(config.rope_theta) ** (Decimal(-2 * i) / config.head_dim)
        turn = float(angle % (2 * Decimal("3.14159265358979323846264338327950288")))
        assert (cos, sin) == pytest.approx((math.cos(turn), math.sin(turn)), abs=1e-7)


def test_rotation_keeps_low_precision_and_turns_in_float32() -> None:
    config = make_config()
    x = torch.randn(1, 9, 2, 12, dtype=torch.bfloat16)
    rope = rope_table(config, 9, x)
    assert rope.dtype == torch.float32
    turned = rotate(x, rope)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), rope).bfloat16())
    assert rope_table(config, 9, x.double()).dtype == torch.float64


def test_attend_batches_equal_windows() -> None:
    q, k = torch.randn(2, 14, 2, 6), torch.randn(2, 30, 2, 6)
    q_rows = [(0, 4), (4, 8), (8, 9), (9, 13), (13, 13), (13, 14)]
    own = [(0, 4), (4, 8), (8, 9), (0, 0), (3, 3), (0, 0)]
    context = [(0, 10), (10, 20), (20, 30), (2, 30), (0, 7), (5, 5)]
    together = attend(q, k, k, q_rows, own, context)
    apart = []
    for (a, b), (c, d), (e, f) in zip(q_rows, own, context, strict=True):
        x = torch.zeros(2, b - a, 12)
        if d > c and b > a:
            x = x + attend(q[:, a:b], k[:, c:d], k[:, c:d], [(0, b - a)], [(0, d - c)], [(0, 0)])
        if f > e and b > a:
            x = x + attend(q[:, a:b], k[:, e:f], k[:, e:f], [(0, b - a)], [(0, 0)], [(0, f - e)])
        apart.append(x)
    torch.testing.assert_close(together, torch.cat(apart, 1))
    assert not together[:, -1].any()


@pytest.mark.parametrize("cls", [TLinFormerForCausalLM, TransformerForCausalLM])
def test_paper_size(cls: type[CausalLM]) -> None:
    with torch.device("meta"):
        model = cls(PAPER)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 40.98
    assert model(torch.zeros(1, 600, dtype=torch.int64, device="meta")).shape == (1, 600, 50257)


def test_state_dict_names() -> None:
    names = set(TLinFormerForCausalLM(make_config()).state_dict())
    parts = ["attn_norm.weight", "attn_norm.bias", "mlp_norm.weight", "mlp_norm.bias"]
    parts += ["qkv_proj.weight", "qkv_proj.bias", "out_proj.weight", "out_proj.bias"]
    parts += ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    layers = {f"blocks.{b}.layers.{i}.{p}" for b in range(2) for i in range(3) for p in parts}
    assert names == layers | {"embed_tokens.weight", "norm.weight", "norm.bias"}


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    model = TLinFormerForCausalLM(make_config(hidden_size=240, vocab_size=500, block_depth=4))
    small = 0.02 / (2 * 2 * 4) ** 0.5
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert parameter.eq(1.0 if name.endswith("norm.weight") else 0.0).all(), name
        else:
            scaled = any(part in name for part in ("qkv_proj", "out_proj", "down_proj"))
            assert parameter.std().item() == pytest.approx(small if scaled else 0.02, rel=0.05)


def test_baseline_matches_reference(device: torch.device) -> None:
    model = make_model(make_config(num_key_value_heads=1), cls=TransformerForCausalLM).to(device)
    ids = make_ids(model.config, 2, 17)
    theirs = reference_transformer_logits(model.config, make_cpu_weights(model), ids)
    torch.testing.assert_close(model(ids.to(device)).cpu(), theirs, rtol=0, atol=1e-9)


def test_one_window_of_tlinformer_is_the_baseline() -> None:
    config = make_config(generation_window=16)
    ids = make_ids(config, 2, 16)
    ours, base = make_model(config)(ids), make_model(config, cls=TransformerForCausalLM)(ids)
    torch.testing.assert_close(ours, base, rtol=0, atol=1e-11)


def test_gradient_checkpointing_changes_memory_only(
    device: torch.device, small_model: MakeModel
) -> None:
    model = small_model(dropout=0.3).train().to(device)
    ids = make_ids(model.config, 2, 18).to(device)
    results, saved = [], []
    for on in (False, True):
        model.gradient_checkpointing = on
        assert model.gradient_checkpointing is on
        held = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += tensor.numel()
            return tensor

        torch.manual_seed(1)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            saved.append(held)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert saved[1] < 0.6 * saved[0]


def test_dropout_acts_in_training_only(small_model: MakeModel) -> None:
    model = small_model(dropout=0.3)
    ids = make_ids(model.config, 1, 14)
    torch.testing.assert_close(model(ids), small_model()(ids), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_dropout_reaches_probabilities_and_mlp_output(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(dropout=0.5)
    layer = Layer(config).train()
    x = torch.randn(1, 4, 24)
    rates: list[float] = []
    sdpa = F.scaled_dot_product_attention

    def record(*args: object, **kwargs: object) -> torch.Tensor:
        rates.append(kwargs["dropout_p"])  # type: ignore[arg-type]
        return sdpa(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    q, k, v = layer.project(x, rope_table(config, 4, x))
    layer.attend(q, k, v, [(0, 4)], [(0, 4)])
    layer.eval().attend(q, k, v, [(0, 4)], [(0, 4)])
    assert rates == [0.5, 0.0]
    kept = layer.train().finish(x, x) - (x + layer.out_proj(x))
    assert 0.2 < (kept == 0).double().mean() < 0.8


def test_bfloat16_autocast_is_close(device: torch.device, small_model: MakeModel) -> None:
    model = small_model(dtype=torch.float32).to(device)
    ids = make_ids(model.config, 2, 22).to(device)
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            rough = model(ids).float()
    scale = exact.abs().max()
    assert 0 < (rough - exact).abs().max() < 0.05 * scale
    model.to(torch.bfloat16)
    assert (model(ids).float() - exact).abs().max() < 0.1 * scale


@pytest.mark.parametrize("vocab_size", [53, 64, 65])
@pytest.mark.parametrize("cls", [TLinFormerForCausalLM, TransformerForCausalLM])
def test_loss_and_its_gradients_are_those_of_the_logits(
    cls: type[CausalLM], vocab_size: int
) -> None:
    model = make_model(make_config(vocab_size=vocab_size), dtype=torch.float32, cls=cls)
    ids = make_ids(model.config, 2, 23)
    plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(plain, list(model.parameters()))
    loss = model(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_torch_compile_has_no_graph_break(device: torch.device, small_model: MakeModel) -> None:
    model = small_model(num_key_value_heads=1).to(device)
    ids = make_ids(model.config, 1, 14).to(device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():  # compiling gradients, too, takes three times as long
        torch.testing.assert_close(compiled(ids), model(ids), rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled(ids, ids), model(ids, ids))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 4), "must be an int64 or int32 tensor, not torch.float32"),
        ([[1, 2]], "must be an int64 or int32 tensor, not list"),
        (torch.zeros(4, dtype=torch.int64), r"has shape \(4,\)"),
        (torch.zeros(1, 1, 4, dtype=torch.int64), r"has shape \(1, 1, 4\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"has shape \(1, 0\)"),
        (torch.zeros(0, 3, dtype=torch.int64), r"has shape \(0, 3\)"),
        (torch.tensor([[0, 53]]), r"holds 53; ids must be in 0 ... 52"),
        (torch.tensor([[-1, 2]]), r"holds -1; ids must be in 0 ... 52"),
    ],
)
def test_bad_input_is_named(ids: torch.Tensor, message: str, small_model: MakeModel) -> None:
    for model in (small_model(), make_model(make_config(), cls=TransformerForCausalLM)):
        with pytest.raises(ValueError, match=message):
            model(ids)


def test_int32_ids(small_model: MakeModel) -> None:
    model = small_model()
    ids = make_ids(model.config, 1, 9)
    assert torch.equal(model(ids.int()), model(ids))
