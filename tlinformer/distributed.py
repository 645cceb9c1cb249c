"""Several processes that train one model, started by torchrun: DDP or FSDP2.

Without torchrun every function here does what one process needs, which is mostly nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .device import launched
from .layer import Layer

Result = TypeVar("Result")
# Checkpoints hold whole tensors, so that another number of processes can go on from them.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins torchrun's processes, if there are any: NCCL on GPUs, Gloo on the CPU."""
    if not launched() or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # what `any_process` exchanges lies on the CPU
    # The others wait while the first process tokenises.
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def first_alone(work: Callable[[], Result]) -> Result:
    """`work` in the first process, then in the others, which find the files that it made."""
    if rank() > 0:
        any_process(False)  # returns when the first process gets there
    result = work()
    if rank() == 0:
        any_process(False)
    return result


def total(value: torch.Tensor) -> torch.Tensor:
    """`value`, now the sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process. All must call it; the GPUs need not wait for it."""
    return bool(total(torch.tensor(float(flag))))


def whole(value: torch.Tensor) -> torch.Tensor:
    """`value` itself, or what its shards in all processes make together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def parallelize(model: nn.Module, strategy: str, device: torch.device, compile: bool) -> nn.Module:
    """What to call instead of `model`, so that backward leaves the mean gradient of all processes.

    "fsdp" shards `model` itself. A layer is the unit, and its two verbs with parameters gather it.
    """
    if dist.is_initialized() and strategy == "fsdp":
        # It warns of in-place changes of the views that `project` returns; nothing makes any.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(device.type, (world_size(),))
        for layer in [m for m in model.modules() if isinstance(m, Layer)]:
            fully_shard(layer, mesh=mesh)
            for verb in ("project", "finish"):
                register_fsdp_forward_method(layer, verb)
        fully_shard(model, mesh=mesh)
    called = model
    if compile:  # every step has the same shapes
        called = cast(nn.Module, torch.compile(model, dynamic=False))
    if dist.is_initialized() and strategy == "ddp":
        called = DistributedDataParallel(called)
    return called


def synchronize_gradients(called: nn.Module, on: bool) -> None:
    """Whether the next backward exchanges gradients or, amid an accumulation, only adds them up."""
    if isinstance(called, DistributedDataParallel):
        called.require_backward_grad_sync = on  # what its no_sync() does
    elif root := next((m for m in called.modules() if isinstance(m, FSDPModule)), None):
        root.set_requires_gradient_sync(on)


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """The state of `model`, or of its `optimizer`, by parameter name on the first process's CPU.

    All processes must call it.
    """
    if optimizer is None:
        return get_model_state_dict(model, options=WHOLE)
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load_whole_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
) -> None:
    """The inverse of `whole_state`; every process passes the whole."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, model_state, options=options)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
