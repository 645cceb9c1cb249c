"""Where models and engines live."""

from __future__ import annotations

import os

import torch


def launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; "auto" prefers a GPU, "cuda" is a process's own under torchrun.

    Raises ValueError when it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; name auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and device.index is None and launched():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is '{device}', but this machine has no such GPU: PyTorch {torch.__version__} "
            f"sees {torch.cuda.device_count()}; take cpu, or a build of PyTorch with CUDA"
        )
    return device
