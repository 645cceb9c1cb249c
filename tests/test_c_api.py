"""The C interface through ctypes, as another language would use it; it lies in the module too."""

import ctypes
from ctypes import CFUNCTYPE, POINTER, byref, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import pytest
import torch

from tlinformer import _C, Engine, SamplingParams, TLinFormerForCausalLM, __version__

SHIPPED = Path(__file__).parents[1] / "models/tlinformer-prose-8m"
OnToken = CFUNCTYPE(c_int, c_void_p, c_int64, c_int32)


class EngineOptions(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("max_context", c_int64),
        ("batch_size", c_int64),
        ("memory_limit", c_int64),
        ("dtype", c_int32),
        ("num_threads", c_int32),
        ("device", c_int32),
        ("device_index", c_int32),
    )


class Sampling(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("repetition_penalty", c_double),
        ("top_k", c_int64),
        ("seed", ctypes.c_uint64),
        ("stop_token_ids", POINTER(c_int32)),
        ("num_stop_token_ids", c_int64),
    )


@pytest.fixture(scope="module")
def library():
    loaded = ctypes.CDLL(_C.__file__)
    loaded.tlin_version.restype = loaded.tlin_last_error.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def engine(library):
    model, made = c_void_p(), c_void_p()
    assert library.tlin_model_open(str(SHIPPED).encode(), byref(model)) == 0
    options = EngineOptions()
    library.tlin_engine_options_init(byref(options))
    options.max_context, options.num_threads = 400, 1
    assert library.tlin_engine_create(model, byref(options), byref(made)) == 0
    library.tlin_model_close(model)
    yield made
    library.tlin_engine_destroy(made)


def test_it_draws_the_tokens_of_the_python_engine(library, engine):
    ids = torch.arange(300, dtype=torch.int32)[None]
    peer = Engine(TLinFormerForCausalLM.from_pretrained(SHIPPED), max_context=400, num_threads=1)
    peer.prefill(ids)
    prompt = (POINTER(c_int32) * 1)((c_int32 * 300)(*ids[0].tolist()))
    assert library.tlin_engine_prefill(engine, prompt, byref(c_int64(300)), c_int64(1), 0, 0) == 0
    sampling, tokens, length = Sampling(), (c_int32 * 20)(), c_int64()
    library.tlin_sampling_init(byref(sampling))
    streamed = []

    @OnToken
    def on_token(_user, sequence, token):
        streamed.append(token)
        return 1

    for sampling.temperature, sampling.seed in ((0.0, 0), (0.8, 7)):
        streamed.clear()
        status = library.tlin_engine_generate(
            engine, c_int64(20), byref(sampling), tokens, byref(length), on_token, None
        )
        assert status == 0, library.tlin_last_error()
        want = peer.generate(20, SamplingParams(sampling.temperature, seed=sampling.seed))
        assert list(tokens) == streamed == want[0].tolist()
        assert length.value == 20


def test_failures_are_codes_with_a_text(library, engine):
    assert library.tlin_version().decode() == __version__
    model = c_void_p()
    assert library.tlin_model_open(b"/nowhere", byref(model)) == 4
    assert b"/nowhere/config.json" in library.tlin_last_error()
    assert library.tlin_engine_generate(engine, c_int64(1), None, None, None, None, None) == 1
    assert b"needs a prefill" in library.tlin_last_error()


def test_the_device_must_be_one_that_this_build_has(library):
    model, made, options = c_void_p(), c_void_p(), EngineOptions()
    assert library.tlin_model_open(str(SHIPPED).encode(), byref(model)) == 0
    library.tlin_engine_options_init(byref(options))
    options.max_context, options.device = 400, 2
    assert library.tlin_engine_create(model, byref(options), byref(made)) == 1
    assert b"device is 2" in library.tlin_last_error()
    if not _C.has_cuda:
        options.device = 1
        assert library.tlin_engine_create(model, byref(options), byref(made)) == 1
        assert b"has no CUDA backend" in library.tlin_last_error()
    library.tlin_model_close(model)
