"""The frozen base model sharded by FSDP2, with the whole adapter in each process (DDP).

The frozen weights are nearly all of a training process's memory that does not depend on the batch: 13.5 GB for
Llama-2-7B in bf16, against 1.1 GB for an adapter of rank 128 with its gradient and AdamW's moments in fp32. So only the
base model is sharded, and optimiser, clipping and checkpoints are the same as without sharding. (FSDP2 could not shard
the gain of the slots, which has no dimension.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from icae_fast.errors import ConfigError
from icae_fast.training.loop.model import TrainingModel

log = logging.getLogger(__name__)

_USES_FSDP = "ACCELERATE_USE_FSDP"

# Options of FSDP2 that are not supported: the rejected value, Accelerate's default, and the reason.
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": ("true", "false", "shards stay on the GPUs"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("true", "false", "the section memory sets what the backward recomputes"),
    "FSDP_RESHARD_AFTER_FORWARD": ("false", "true", "weights are always released after their layer"),
}


def check_launch(environ: Mapping[str, str] = os.environ) -> None:
    """Raise if `accelerate launch` requests sharding that is not supported.

    Args:
        environ: environment variables, by which `accelerate launch` passes its options. Default: the process's.

    Raises:
        ConfigError: DeepSpeed, FSDP1, or unsupported options of FSDP2.
    """
    if _is_set_to(environ, "ACCELERATE_USE_DEEPSPEED", "true", "false"):
        raise ConfigError(
            "accelerate is launched with DeepSpeed, which expects calls of layers, but this package reads their "
            "weights directly; launch with --multi_gpu (DDP), or --use_fsdp --fsdp_version 2"
        )
    if not _is_set_to(environ, _USES_FSDP, "true", "false"):
        return
    if not _is_set_to(environ, "FSDP_VERSION", "2", "1"):
        raise ConfigError("accelerate is launched with FSDP1; add --fsdp_version 2, or launch with --multi_gpu (DDP)")
    for name, (refused, default, why) in _REFUSED.items():
        if _is_set_to(environ, name, refused, default):
            option = f"--{name.lower()}"
            raise ConfigError(
                f"accelerate is launched with {option} {refused}, but {why}; launch with {option} {default}"
            )


def _is_set_to(environ: Mapping[str, str], name: str, value: str, default: str) -> bool:
    """Return whether a variable has a value, ignoring case."""
    return environ.get(name, default).lower() == value


def check_world(world_size: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise unless as many processes work together as the launch started.

    Otherwise each would train the whole run by itself, in the same folder.

    Args:
        world_size: number of processes that work together.
        environ: environment variables, among them the launch's `WORLD_SIZE`. Default: the process's.

    Raises:
        ConfigError: the numbers differ.
    """
    launched = environ.get("WORLD_SIZE", "1")
    if launched != str(world_size):
        raise ConfigError(
            f"WORLD_SIZE says that {launched} processes were launched, but {world_size} work{'s' * (world_size == 1)} "
            "together: launch by `accelerate launch` or torch.distributed.run (with train.use_cpu=true if there is no "
            "GPU), or unset WORLD_SIZE to train in one process"
        )


def take_over_launch() -> bool:
    """Return whether `accelerate launch` requests FSDP, and hide the request from Accelerate.

    Accelerate's own wrapping would also shard the adapter and would gather weights in hooks that are never called, and
    loading a model under it gives weights only to the first process.
    """
    asked = _is_set_to(os.environ, _USES_FSDP, "true", "false")
    if asked:
        os.environ[_USES_FSDP] = "false"
    return asked


def shard_base_model(model: TrainingModel) -> None:
    """Shard the base model's weights over the processes.

    Layers are gathered one at a time where they are read (`icae_fast.backbone.sharding`). Embeddings, final norm and
    head form one group, which FSDP2's hooks gather for a call of the model and release after its backward.

    Args:
        model: the model, on the CPU or its device; all processes call this.

    Raises:
        ConfigError: there is only one process.
    """
    from torch.distributed.fsdp import fully_shard

    n_processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if n_processes == 1:
        raise ConfigError(
            "FSDP needs several processes to shard weights over; launch without it, or with more processes"
        )
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in model.icae.backbone.view.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=False, ignored_params=trained)
    log.info("the base model's weights are sharded over %d processes", n_processes)


def replicate_trained(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Return DDP around a model with a sharded base: DDP synchronises trained parameters and ignores the rest.

    Args:
        model: the model after `shard_base_model`, on its device.
        device: device of this process.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    return DistributedDataParallel(
        model, device_ids=None if device.type == "cpu" else [device], broadcast_buffers=False
    )
