from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_ids, make_model
from safetensors.torch import load_file, save_file

from tlinformer import checkpoint
from tlinformer.baseline import TransformerForCausalLM
from tlinformer.model import CausalLM, TLinFormerForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory that holds a small float64 model."""
    make_model(make_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("cls", [TLinFormerForCausalLM, TransformerForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip(cls: type[CausalLM], dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(make_config(history_window="auto", dropout=0.1), dtype=dtype, cls=cls)
    model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    back = cls.from_pretrained(str(tmp_path / "a" / "b"))
    assert type(back) is cls
    assert back.config == model.config
    assert not back.training
    for (name, ours), theirs in zip(back.named_parameters(), model.parameters(), strict=True):
        assert ours.dtype == dtype, name
        assert ours.requires_grad
        assert torch.equal(ours, theirs), name
    ids = make_ids(model.config, 1, 9)
    assert torch.equal(back(ids), model(ids))


def test_dtype_and_device_on_load(saved: Path, device: torch.device) -> None:
    model = TLinFormerForCausalLM.from_pretrained(saved, dtype=torch.float32, device=device)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, device.type)}


def test_saving_replaces_and_leaves_nothing_behind(saved: Path) -> None:
    other = make_model(make_config(), seed=1)
    other.save_pretrained(saved)
    back = TLinFormerForCausalLM.from_pretrained(saved)
    assert torch.equal(back.norm.weight, other.norm.weight)
    assert len(list(saved.iterdir())) == 2
    plain = saved / "plain"
    plain.touch()
    assert stat.S_IMODE((saved / "config.json").stat().st_mode) == stat.S_IMODE(
        plain.stat().st_mode
    )


def test_failed_save_keeps_the_old_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_model(make_config(), seed=1).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_save_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; save_pretrained needs a directory"):
        make_model(make_config()).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        TLinFormerForCausalLM.from_pretrained(saved)


def test_a_file_in_place_of_the_directory_is_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is a file; name the directory"):
        TLinFormerForCausalLM.from_pretrained(saved / "config.json")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"", "Expecting value"),
        (b"[1, 2]", "must be a mapping of fields, not list"),
        (b'{"vocab_size": 53', "Expecting"),
        (b"\xff\xfe\x00", "can't decode"),
        (b"[" * 100_000, "recursion"),
        (b'{"vocab_size": 53, "layers": 2}', r"unknown config fields \['layers'\]"),
        (b'{"vocab_size": 53}', "missing config fields"),
    ],
)
def test_broken_config_file_is_named(saved: Path, text: bytes, cause: str) -> None:
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"config.json: .*{cause}"):
        TLinFormerForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights_are_named(saved: Path, size: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is no readable safetensors file"):
        TLinFormerForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    "header",
    [
        {"norm.weight": {"dtype": "F32", "shape": [24], "data_offsets": [0, 10**15]}},
        {"norm.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 96]}},
        {"norm.weight": {"dtype": "F33", "shape": [24], "data_offsets": [0, 96]}},
        {"norm.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [96, 0]}},
        ["norm.weight"],
    ],
)
def test_hostile_header_is_an_error(saved: Path, header: object) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(96)
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="no readable safetensors file"):
        TLinFormerForCausalLM.from_pretrained(saved)
    (saved / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="no readable safetensors file"):
        TLinFormerForCausalLM.from_pretrained(saved)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["norm.bias"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(53, 24)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.bias"] = torch.zeros(1, 24)


def _retype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.bias"] = torch.zeros(24, dtype=torch.int64)


def _shrink(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.bias"] = torch.zeros(24).to(torch.float8_e5m2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "lacks 1 tensors: norm.bias"),
        (_add, "holds 1 unknown tensors: lm_head.weight"),
        (_reshape, r"norm.bias has shape \(1, 24\), config.json asks for \(24,\)"),
        (_retype, "norm.bias is torch.int64; parameters are floating point"),
        (_shrink, "norm.bias is torch.float8_e5m2; .*: torch.float64, .*, torch.bfloat16"),
    ],
)
def test_wrong_tensors_are_named(
    saved: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors:? {message}"):
        TLinFormerForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 2_000_000_000}, "holds 69 tensors, too few for the 6000000000 layers"),
        ({"num_blocks": 3}, r"lacks 33 tensors: blocks.2.layers.0.attn_norm.bias, .*\.\.\."),
        ({"num_blocks": 1}, r"holds 33 unknown tensors: blocks.1.layers.0.attn_norm.bias"),
        ({"vocab_size": 54}, r"embed_tokens.weight has shape \(53, 24\), .* asks for \(54, 24\)"),
        ({"hidden_size": 2**30, "vocab_size": 2**30}, "sizes beyond any memory|has shape"),
    ],
)
def test_config_that_does_not_fit_the_weights(
    saved: Path, changes: dict[str, object], message: str
) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        TLinFormerForCausalLM.from_pretrained(saved)


def test_architectures_are_not_confused(saved: Path) -> None:
    with pytest.raises(ValueError, match="holds a TLinFormerForCausalLM, not a Transformer"):
        TransformerForCausalLM.from_pretrained(saved)
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors, saved / "model.safetensors")  # a foreign file says nothing
    assert TransformerForCausalLM.from_pretrained(saved).config == make_config()
