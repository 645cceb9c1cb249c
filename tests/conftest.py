"""Fixtures that the whole suite shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tlinformer.config import TLinFormerConfig
from tlinformer.model import CausalLM, TLinFormerForCausalLM

GOLDEN = Path(__file__).parent / "golden"
NO_GPU = "no GPU"


class Golden(NamedTuple):
    config: TLinFormerConfig
    input_ids: Tensor  # (B, L) int64
    logits: Tensor  # (B, L, V) float32, computed in float64
    state_dict: dict[str, Tensor]


@pytest.fixture(params=sorted(GOLDEN.glob("*.npz")), ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each file of golden vectors."""
    with np.load(request.param) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
        config = TLinFormerConfig.from_dict(json.loads(str(file["config"])))
    ids, logits = arrays.pop("input_ids").long(), arrays.pop("logits")
    weights = {name.removeprefix("param:"): array for name, array in arrays.items()}
    return Golden(config, ids, logits, weights)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device; the tests of a GPU are skipped, and counted, where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return torch.device(request.param)


def make_config(**changes: object) -> TLinFormerConfig:
    """A small model with uneven sizes; `changes` replace its fields."""
    sizes: dict[str, object] = {
        "vocab_size": 53,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_blocks": 2,
        "block_depth": 3,
        "history_window": 5,
        "generation_window": 4,
        "intermediate_size": 40,
    }
    return TLinFormerConfig.from_dict(sizes | changes)


def make_model(
    config: TLinFormerConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    cls: type[CausalLM] = TLinFormerForCausalLM,
) -> CausalLM:
    """A model in evaluation mode whose every parameter matters: no bias is 0, no norm weight 1."""
    model = cls(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm.weight" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            elif name == "embed_tokens.weight":
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.size(1) ** 0.5)
    return model.to(dtype).eval()


def make_ids(config: TLinFormerConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more threads, and wait for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_model() -> Callable[..., CausalLM]:
    """`small_model(dtype=..., seed=..., **config fields)` -> model in evaluation mode."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> CausalLM:
        return make_model(make_config(**changes), seed, dtype)

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much of the suite this machine could not run."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if NO_GPU in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests skipped for lack of a GPU")
