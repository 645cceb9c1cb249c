from __future__ import annotations

import pytest
import torch
from conftest import Place, make_ids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("variant", ["tlinformer", "tconstformer"])
def test_greedy_follows_the_scoring_forward(variant: str, place: Place) -> None:
    model = place.model(variant=variant)
    ids = make_ids(model.config, 2, 7)
    tokens = model.generate(ids, max_new_tokens=15)
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 22)
    assert torch.equal(tokens[:, :7], ids)
    place.check_greedy(model, tokens, 7)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


def test_prompts_of_different_lengths(place: Place) -> None:
    model = place.model()
    prompts = [make_ids(model.config, 1, n, seed=n)[0] for n in (1, 9, 4)]
    tokens = model.generate(prompts, max_new_tokens=6)
    assert isinstance(tokens, list)
    for prompt, row in zip(prompts, tokens, strict=True):
        assert torch.equal(row[: len(prompt)], prompt) and len(row) == len(prompt) + 6
        place.check_greedy(model, row[None], len(prompt))


def test_stop_tokens_end_a_sequence(place: Place) -> None:
    model = place.model()
    prompts = list(make_ids(model.config, 2, 5))
    whole = model.generate(prompts, max_new_tokens=8)
    stop = int(whole[0][5])
    stopped = model.generate(prompts, max_new_tokens=8, stop_token_ids=[stop])
    assert torch.equal(stopped[0], whole[0][:6])


def test_sampling_follows_its_seed(place: Place) -> None:
    model = place.model()
    ids = make_ids(model.config, 1, 5)
    draws = [
        model.generate(ids, max_new_tokens=12, temperature=4.0, top_k=20, top_p=0.9, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    near_greedy = model.generate(ids, max_new_tokens=12, temperature=2.0, top_k=1)
    place.check_greedy(model, near_greedy, 5)


def test_bad_arguments_are_named(place: Place) -> None:
    model = place.model()
    ids = make_ids(model.config, 1, 5)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        model.generate(ids, max_new_tokens=-1)
    with pytest.raises(ValueError, match=r"input_ids has shape \(5,\)"):
        model.generate(ids[0], max_new_tokens=2)
    with pytest.raises(ValueError, match="holds 53"):
        model.generate(torch.tensor([[53]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="batch_size"):
        model.generate([], max_new_tokens=2)
