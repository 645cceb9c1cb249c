"""What a training run measures of itself: metrics.jsonl, TensorBoard, FLOPs and memory."""

from __future__ import annotations

import importlib.util
import json
import resource
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .config import TLinFormerConfig
from .recipe import build_model

# Dense bfloat16 TFLOP/s in the vendor's data sheets, for the names that CUDA gives the devices.
PEAK_TFLOPS = {"A100": 312, "L40S": 362, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250}


def check_tensorboard() -> None:
    """Raises ImportError with the way out, before anything else takes time."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard is set, but the package is missing: pip install tensorboard, or leave "
            "--tensorboard out; metrics.jsonl has the same figures"
        )


class MetricsLog:
    """Appends to ``metrics.jsonl`` and, with ``tensorboard``, to event files beside it.

    Goes on after ``step``: what was logged later will be logged again and is dropped first,
    likewise a last line that a killed process left unfinished.
    """

    def __init__(self, output: Path, step: int, tensorboard: bool):
        self.path = output / "metrics.jsonl"
        kept = []
        if step and self.path.is_file():
            for line in self.path.read_text().splitlines(keepends=True):
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
                kept.append(line)
        self.path.write_text("".join(kept))
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(
                str(output / "tensorboard"), purge_step=step + 1 if step else None
            )

    def add(self, step: int, epoch: float, values: dict[str, float | None]) -> None:
        """One line; the names that begin with ``valid_`` get a section of TensorBoard's own."""
        values = {name: value for name, value in values.items() if value is not None}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
        if self.writer:
            for name, value in values.items():
                tag = name.replace("valid_", "valid/") if "valid_" in name else f"train/{name}"
                self.writer.add_scalar(tag, value, step)
            self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def training_flops(architecture: str, config: TLinFormerConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward over one sequence, matrix products only.

    Recomputation does not count, and causal attention counts whole, as is usual for MFU.
    """
    with torch.device("meta"):
        model = build_model(architecture, config)
        ids = torch.zeros(1, sequence_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    return counter.get_total_flops()


def peak_flops(
    device: torch.device, dtype: torch.dtype | None, given: float | None
) -> float | None:
    """FLOP/s that the device could reach, for MFU; None where neither known nor ``given``.

    Args:
        dtype: autocast type; the table knows bfloat16 only.
        given: TFLOP/s.
    """
    if given:
        return given * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((PEAK_TFLOPS[word] * 1e12 for word in words if word in PEAK_TFLOPS), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held on ``device``; on the CPU, its largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
