from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import make_ids
from torch import Tensor

from tlinformer.model import CausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
MakeModel = Callable[..., CausalLM]


def greedy(model: CausalLM, ids: Tensor, count: int) -> Tensor:
    """The likeliest token after the other, by the scoring forward. ids: (L)."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids[None])[0, -1].argmax()[None]])
    return ids


@pytest.mark.parametrize("variant", ["tlinformer", "tconstformer"])
def test_greedy_follows_the_scoring_forward(variant: str, small_model: MakeModel) -> None:
    model = small_model(torch.float32, variant=variant)
    ids = make_ids(model.config, 2, 7)
    tokens = model.generate(ids, max_new_tokens=15)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, torch.stack([greedy(model, row, 15) for row in ids]))
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


def test_prompts_of_different_lengths(small_model: MakeModel) -> None:
    model = small_model(torch.float32)
    prompts = [make_ids(model.config, 1, n, seed=n)[0] for n in (1, 9, 4)]
    tokens = model.generate(prompts, max_new_tokens=6)
    assert isinstance(tokens, list)
    for prompt, row in zip(prompts, tokens, strict=True):
        assert torch.equal(row, greedy(model, prompt, 6))


def test_stop_tokens_end_a_sequence(small_model: MakeModel) -> None:
    model = small_model(torch.float32)
    prompts = list(make_ids(model.config, 2, 5))
    whole = model.generate(prompts, max_new_tokens=8)
    stop = int(whole[0][5])
    stopped = model.generate(prompts, max_new_tokens=8, stop_token_ids=[stop])
    assert torch.equal(stopped[0], whole[0][:6])


def test_sampling_follows_its_seed(small_model: MakeModel) -> None:
    model = small_model(torch.float32)
    ids = make_ids(model.config, 1, 5)
    draws = [
        model.generate(ids, max_new_tokens=12, temperature=2.0, top_k=20, top_p=0.9, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    near_greedy = model.generate(ids, max_new_tokens=12, temperature=2.0, top_k=1)
    assert torch.equal(near_greedy[0], greedy(model, ids[0], 12))


def test_bad_arguments_are_named(small_model: MakeModel) -> None:
    model = small_model(torch.float32)
    ids = make_ids(model.config, 1, 5)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        model.generate(ids, max_new_tokens=-1)
    with pytest.raises(ValueError, match=r"input_ids has shape \(5,\)"):
        model.generate(ids[0], max_new_tokens=2)
    with pytest.raises(ValueError, match="holds 53"):
        model.generate(torch.tensor([[53]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="batch_size"):
        model.generate([], max_new_tokens=2)
