"""Fixtures that the whole suite shares."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tlinformer import _C, data
from tlinformer.config import TLinFormerConfig
from tlinformer.engine import Engine
from tlinformer.model import CausalLM, TLinFormerForCausalLM

GOLDEN = Path(__file__).parent / "golden"
NO_GPU = "no GPU"
NO_CUDA = "built without the CUDA engine"
CUDA_HEAD_SIZES = (32, 36, 40, 48, 64, 80, 96, 128)


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


class Place(NamedTuple):
    """Where an engine runs and the dtype it computes in there."""

    device: torch.device
    dtype: torch.dtype

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    def config(self, **changes: object) -> TLinFormerConfig:
        """`make_config`, with the next head size that CUDA kernels are compiled for."""
        config = make_config(**changes)
        if self.device.type == "cpu":
            return config
        heads = config.num_attention_heads
        size = next((s for s in CUDA_HEAD_SIZES if s >= config.head_dim), CUDA_HEAD_SIZES[-1])
        return make_config(**changes | {"hidden_size": heads * size})

    def model(self, seed: int = 0, **changes: object) -> CausalLM:
        """A small model of this dtype on this device."""
        return make_model(self.config(**changes), seed, self.dtype).to(self.device)

    def noise(self, model: CausalLM, ids: Tensor, want: Tensor) -> float:
        """How far from `want` (B, L, V), the exact logits of ids (B, L), an engine may come.

        In 16 bits: twice as far as eager PyTorch with the same weights on the same device.
        """
        if self.exact:
            return 2e-4 + 1e-4 * float(want.abs().max())
        with torch.no_grad():
            eager = model(ids.to(self.device)).cpu().double()
        return 2 * float((eager - want).abs().max()) + 1e-3

    def check_greedy(self, model: CausalLM, ids: Tensor, prompt: int) -> None:
        """Tokens ids[:, prompt:] are the likeliest, but where rounding may choose another."""
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            want = exact(ids.to(self.device)).cpu()
        logits = want[:, prompt - 1 : -1]
        short = logits.max(-1).values - logits.gather(-1, ids[:, prompt:, None].cpu())[..., 0]
        assert short.max() <= 2 * self.noise(model, ids, want)
        assert (short == 0).float().mean() > 0.9


def _places(*names: str) -> list[Any]:
    dtypes = [(name, *name.split("-")) for name in names]
    return [pytest.param((where, getattr(torch, dtype)), id=name) for name, where, dtype in dtypes]


def _make_place(where: str, dtype: torch.dtype) -> Place:
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    if where == "cuda" and not _C.has_cuda:
        pytest.skip(NO_CUDA)
    return Place(torch.device(where), dtype)


@pytest.fixture(params=_places("cpu-float32", "cuda-bfloat16"), scope="module")
def place(request: pytest.FixtureRequest) -> Place:
    """Every device with its usual dtype."""
    return _make_place(*request.param)


EVERY = ("cpu-float32", "cpu-bfloat16", "cuda-bfloat16", "cuda-float16")


@pytest.fixture(params=_places(*EVERY), scope="module")
def every_place(request: pytest.FixtureRequest) -> Place:
    """Every device with every dtype."""
    return _make_place(*request.param)


@pytest.fixture(params=_places("cuda-bfloat16"), scope="module")
def gpu(request: pytest.FixtureRequest) -> Place:
    """The GPU alone."""
    return _make_place(*request.param)


def poison(engine: Engine) -> None:
    """Makes the engine's memory NaN; on CUDA its workspace holds constants, so the cache alone."""
    for region in engine.plan.regions:
        if engine.device.type == "cpu" or region.name != "workspace":
            engine.arena[region.offset : region.offset + region.bytes].fill_(0xFF)


def engine_of(model: Any, max_context: int, **options: Any) -> Engine:
    """An engine whose memory is NaN wherever nothing was written yet."""
    engine = Engine(model, max_context=max_context, **options)
    poison(engine)
    return engine


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.txt, valid.txt and the tokenizer that suits them."""
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "whale", "sea", "ship", "captain", "sailed", "and", "spoke", "of", "storms"]
    order = np.random.default_rng(0).integers(len(words), size=3000)
    written = " ".join(words[i] for i in order)
    (folder / "train.txt").write_text(written[:14000])
    (folder / "valid.txt").write_text(written[14000:15000])
    data.train_tokenizer([folder / "train.txt"], 270).save(str(folder / "tokenizer.json"))
    return folder


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
    """Say how much of the suite this machine or this build could not run."""
    for reason, words in (
        (NO_GPU, "for lack of a GPU"),
        (NO_CUDA, f"because tlinformer is {NO_CUDA}"),
    ):
        skipped = terminalreporter.stats.get("skipped", [])
        count = sum(reason in str(report.longrepr) for report in skipped)
        if count:
            terminalreporter.write_line(f"{count} tests skipped {words}")
