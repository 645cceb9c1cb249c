from __future__ import annotations

import dataclasses
import json
import math

import pytest
from conftest import make_config

from tlinformer.config import TLinFormerConfig


def test_derived_sizes() -> None:
    config = TLinFormerConfig(vocab_size=50257, hidden_size=432, num_attention_heads=12)
    assert config.head_dim == 36
    assert config.num_key_value_heads == 12
    assert config.intermediate_size == 1280
    assert config.num_layers == 8
    assert (config.history_window, config.generation_window) == (256, 256)
    assert (config.rope_theta, config.layer_norm_eps, config.dropout) == (10000.0, 1e-5, 0.0)
    assert config.variant == "tlinformer"


@pytest.mark.parametrize(("width", "expected"), [(96, 256), (98, 512), (432, 1280), (512, 1536)])
def test_intermediate_size_rule(width: int, expected: int) -> None:
    config = TLinFormerConfig(vocab_size=8, hidden_size=width, num_attention_heads=1)
    assert config.intermediate_size == expected


def test_constant_history_window() -> None:
    assert {make_config(history_window=7).history_window_at(c) for c in (0, 1, 10**6)} == {7}


@pytest.mark.parametrize(
    ("history", "coefficient", "expected"),
    [(0, 12.0, 8), (1, 12.0, 8), (2, 12.0, 16), (1024, 12.0, 88), (2**20, 12.0, 168), (9, 1.0, 8)],
)
def test_auto_history_window(history: int, coefficient: float, expected: int) -> None:
    config = make_config(history_window="auto", history_window_coefficient=coefficient)
    assert config.history_window_at(history) == expected


def test_auto_history_window_rejects_negative_lengths() -> None:
    with pytest.raises(ValueError, match="history_length is -1"):
        make_config().history_window_at(-1)


def test_round_trip_through_json() -> None:
    config = make_config(history_window="auto", dropout=0.25, num_key_value_heads=1)
    assert TLinFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_is_frozen_and_hashable() -> None:
    config = make_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 12  # type: ignore[misc]
    assert {config: 1}[make_config()] == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 2**31),
        ("vocab_size", True),
        ("vocab_size", 8.0),
        ("hidden_size", "24"),
        ("num_attention_heads", -2),
        ("num_key_value_heads", 0),
        ("num_blocks", 0),
        ("block_depth", 1),
        ("history_window", 0),
        ("history_window", "automatic"),
        ("generation_window", 0),
        ("generation_window", None),
        ("intermediate_size", 0),
        ("rope_theta", 0.0),
        ("rope_theta", math.inf),
        ("layer_norm_eps", math.nan),
        ("layer_norm_eps", "small"),
        ("variant", "transformer"),
        ("history_window_coefficient", -1.0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", False),
    ],
)
def test_bad_field_is_named_with_its_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        make_config(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 25}, "hidden_size is 25; num_attention_heads, 2, must divide it"),
        ({"hidden_size": 6}, "head size 3 must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4; it must divide"),
    ],
)
def test_contradictory_sizes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_from_dict_names_unknown_and_missing_fields() -> None:
    with pytest.raises(ValueError, match=r"unknown config fields \['head_dim', 'layers'\]"):
        make_config(layers=3, head_dim=12)
    with pytest.raises(ValueError, match=r"missing config fields \['vocab_size', 'hidden_size'\]"):
        TLinFormerConfig.from_dict({"num_attention_heads": 2})
    with pytest.raises(ValueError, match="must be a mapping of fields, not list"):
        TLinFormerConfig.from_dict([])  # type: ignore[arg-type]
