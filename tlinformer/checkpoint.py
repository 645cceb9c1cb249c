"""A model on disk: `config.json` and `model.safetensors` in one directory."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import TLinFormerConfig
from .device import resolve_device

if TYPE_CHECKING:
    from .model import CausalLM

Model = TypeVar("Model", bound="CausalLM")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PARAMETER_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save(model: CausalLM, directory: str | os.PathLike[str]) -> None:
    """Write the config and the parameters in their own dtypes; a crash leaves no half file."""
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; save_pretrained needs a directory")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: t.detach().cpu().contiguous() for k, t in model.state_dict().items()}
    metadata = {"format": "pt", "architecture": type(model).__name__}
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))
    replace_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside `target`, then rename: readers see the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(Path(name))
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's files are private
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def load_config(directory: str | os.PathLike[str]) -> TLinFormerConfig:
    """The config in `directory`.

    Raises:
        FileNotFoundError, ValueError: naming the file and the cause.
    """
    if Path(directory).is_file():
        raise ValueError(f"{directory} is a file; name the directory with {CONFIG} and {WEIGHTS}")
    path = _existing(Path(directory) / CONFIG)
    try:
        return TLinFormerConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def load(
    cls: type[Model],
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """The model of class `cls` in `directory`; see `CausalLM.from_pretrained`."""
    place = resolve_device(str(device or "cpu"))
    config = load_config(directory)
    path = _existing(Path(directory) / WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            architecture = (file.metadata() or {}).get("architecture", cls.__name__)
            # Copies, because the file's own memory is unaligned, and anyone may truncate it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    if architecture != cls.__name__:
        raise ValueError(f"{path} holds a {architecture}, not a {cls.__name__}")
    if config.num_layers > len(tensors):  # before a hostile config builds a billion layers
        raise ValueError(
            f"{path} holds {len(tensors)} tensors, too few for the {config.num_layers} layers "
            f"of {CONFIG}"
        )
    try:
        with torch.device("meta"):
            model = cls(config)
    except RuntimeError as error:
        raise ValueError(f"{Path(directory) / CONFIG}: sizes beyond any memory: {error}") from error
    expected = model.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{path} lacks {len(missing)} tensors: {_some(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{path} holds {len(unexpected)} unknown tensors: {_some(unexpected)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, "
                f"{CONFIG} asks for {tuple(expected[name].shape)}"
            )
        if tensor.dtype not in PARAMETER_DTYPES:
            raise ValueError(
                f"{path}: {name} is {tensor.dtype}; parameters are floating point: "
                f"{', '.join(map(str, PARAMETER_DTYPES))}"
            )
    model.load_state_dict(tensors, assign=True)
    return model.to(device=place, dtype=dtype).eval()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; a model directory holds {CONFIG} and {WEIGHTS} "
            "(save_pretrained writes them)"
        )
    return path


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
