"""The frozen base model in shares (FSDP2), the adapter whole in each process (DDP).

Nearly all memory of a training process that does not depend on its batch is the frozen weights: 13.5 GB for Llama-2-7B
in bf16, against 1.1 GB of an adapter of rank 128 with its gradient and AdamW's moments in fp32. So the former are
sharded alone, and optimiser, clipping and checkpoints are what they are without. (FSDP2 could not shard the slots'
gain, which has no dimension.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch
from torch.nn.parallel import DistributedDataParallel

from icae_fast.errors import ConfigError
from icae_fast.training.loop.model import TrainingModel

log = logging.getLogger(__name__)

_ASKED = "ACCELERATE_USE_FSDP"

# Options of FSDP2 that are not supported: the value that is refused, Accelerate's default, and why.
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": ("true", "false", "the shares of the weights stay on the GPUs"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("true", "false", "the section memory says what is computed again"),
    "FSDP_RESHARD_AFTER_FORWARD": ("false", "true", "weights are always let go of behind their layer"),
}


def check_launch(environ: Mapping[str, str] = os.environ) -> None:
    """Raise where `accelerate launch` asks for sharding that there is none of.

    Args:
        environ: the process's variables, by which `accelerate launch` tells its options.

    Raises:
        ConfigError: it is DeepSpeed's, FSDP1's, or with options of FSDP2 that are not supported.
    """
    if _says(environ, "ACCELERATE_USE_DEEPSPEED", "true", "false"):
        raise ConfigError(
            "accelerate is launched with DeepSpeed, which waits for calls of layers whose weights this package reads "
            "by itself; launch with --multi_gpu (DDP), or --use_fsdp --fsdp_version 2"
        )
    if not _says(environ, _ASKED, "true", "false"):
        return
    if not _says(environ, "FSDP_VERSION", "2", "1"):
        raise ConfigError("accelerate is launched with FSDP1; add --fsdp_version 2, or launch with --multi_gpu (DDP)")
    for name, (refused, default, why) in _REFUSED.items():
        if _says(environ, name, refused, default):
            option = f"--{name.lower()}"
            raise ConfigError(
                f"accelerate is launched with {option} {refused}, but {why}; launch with {option} {default}"
            )


def _says(environ: Mapping[str, str], name: str, value: str, default: str) -> bool:
    return environ.get(name, default).lower() == value


def take_over_launch() -> bool:
    """Whether `accelerate launch` asks for FSDP; from now on, Accelerate takes that for an ordinary launch.

    Its own wrapping would shard the adapter as well and gather weights in hooks that are never called, and loading a
    model under it gives weights to the first process alone.
    """
    asked = _says(os.environ, _ASKED, "true", "false")
    if asked:
        os.environ[_ASKED] = "false"
    return asked


def shard_base_model(model: TrainingModel) -> None:
    """Have each process hold a share of the base model's weights alone.

    Layers are gathered one by one where they are read (`icae_fast.backbone.sharding`). Embeddings, final norm and
    head are one
    group, which FSDP2's own hooks gather for a call of the model and let go of behind its backward.

    Args:
        model: on the CPU or its device; all processes call this.

    Raises:
        ConfigError: this is the only process.
    """
    from torch.distributed.fsdp import fully_shard

    n_processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if n_processes == 1:
        raise ConfigError("FSDP needs several processes to share weights out to; launch without it, or more processes")
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in model.icae.backbone.model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=False, ignored_params=trained)
    log.info("the base model's weights are shared out to %d processes", n_processes)


def replicate_trained(model: TrainingModel, device: torch.device) -> DistributedDataParallel:
    """DDP around a model whose base is sharded: what is trained is kept in step, and the rest left alone.

    Args:
        model: of `shard_base_model`, on its device.
        device: this process's.
    """
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    return DistributedDataParallel(
        model, device_ids=None if device.type == "cpu" else [device], broadcast_buffers=False
    )
