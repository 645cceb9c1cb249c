"""`tlinformer info`: what is installed, what it can use, what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import tlinformer

from .inputs import AsJson


def collect() -> dict[str, Any]:
    """Versions, devices and build; `advice` says what is missing and what to do about it."""
    advice = []
    info: dict[str, Any] = {
        "tlinformer": tlinformer.__version__,
        "python": platform.python_version(),
    }
    for package in ("torch", "numpy", "safetensors", "tokenizers", "pyyaml", "scipy-openblas32"):
        try:
            info[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            info[package] = None
            advice.append(f"{package} is missing: pip install {package}")
    try:
        info["engine"] = f"CPU, {tlinformer._C.instruction_set()}"
        if tlinformer._C.has_cuda:
            info["engine"] += "; CUDA"
    except ImportError as error:
        info["engine"] = None
        advice.append(str(error))
    info["cpus"] = os.cpu_count()
    if info["torch"]:
        import torch

        info["threads"] = torch.get_num_threads()
        gpus = range(torch.cuda.device_count())
        info["gpus"] = [torch.cuda.get_device_name(i) for i in gpus]
        if gpus and info["engine"] and "CUDA" not in info["engine"]:
            advice.append(
                "there is a GPU, but this build's engine runs on the CPU only (training uses the "
                "GPU): TLINFORMER_CUDA=1 pip install --no-build-isolation . says what is missing"
            )
    info["advice"] = advice
    return info


def find_cmake_package() -> Path:
    """The folder of tlinformerConfig.cmake. Raises RuntimeError where the build left none."""
    folder = Path(tlinformer.__file__).parent / "cpp/lib/cmake/tlinformer"
    if not (folder / "tlinformerConfig.cmake").is_file():
        raise RuntimeError(f"{folder} is missing; install tlinformer again: pip install .")
    return folder


def info_command(
    as_json: AsJson = False,
    cmake_dir: Annotated[
        bool,
        typer.Option("--cmake-dir", help="Print the folder that CMake's tlinformer_DIR names."),
    ] = False,
) -> None:
    """Show versions, devices and the build, and what to do about what is missing."""
    if cmake_dir:
        print(find_cmake_package())
        return
    info = collect()
    if as_json:
        print(json.dumps(info))
        return
    console = Console()
    advice = info.pop("advice")
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in info.items():
        shown = ", ".join(value) or "none" if isinstance(value, list) else value
        table.add_row(name, str(shown) if shown is not None else "[red]missing[/]")
    console.print(table)
    for line in advice:
        console.print(f"- {line}", markup=False)
    if not advice:
        console.print("Everything needed is here.")
