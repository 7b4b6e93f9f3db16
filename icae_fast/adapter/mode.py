"""LoRA without training: fused into the projection on the fly, or merged into a second copy of the weights."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Sequence
from typing import Literal

import torch

from icae_fast.adapter.lora import FACTORS, PROJECTIONS, LoRAAdapter
from icae_fast.backbone.lora import MergedQKV, PackedLoRA
from icae_fast.backbone.packing import packed_qkv
from icae_fast.backbone.stack import Backbone
from icae_fast.config import ICAEConfig
from icae_fast.ops import fingerprint, lora_qkv_rope

AdapterMode = Literal["auto", "fused", "merged"]

MEMORY_SHARE = 0.25  # largest share of the available memory that "auto" takes for merged weights
PAYS = 0.95  # "auto" merges below this share of the fused projection's time
_MAX_ROWS = 512
_GPU_ROWS = 8192  # with fewer rows the launch overhead dominates the time
_ROUNDS = 6
_SECONDS = 0.3  # after this time two rounds are enough

_TIMING = threading.Lock()  # concurrent timings would disturb each other


class EncoderWeights:
    """The adapter mode of one encoder, and its merged weights with a fingerprint of their sources.

    Copies and pickles keep the mode but no merged weights.

    Attributes:
        mode: see `ICAE.adapter_mode`.
        in_use: mode of the last call without gradients, "fused" or "merged"; None before the first.
    """

    def __init__(self, mode: AdapterMode = "auto") -> None:
        self.mode = mode
        self.in_use: str | None = None
        self._lock = threading.Lock()
        self._chosen: dict[tuple, str] = {}
        self._held: tuple[tuple, list[MergedQKV]] | None = None

    def __reduce__(self) -> tuple:
        return EncoderWeights, (self.mode,)

    def free(self) -> None:
        """Free the merged weights; a running call keeps its reference."""
        with self._lock:
            self._held = None

    def get(
        self, backbone: Backbone, adapter: LoRAAdapter, config: ICAEConfig, *, dropout: bool = True
    ) -> Sequence[PackedLoRA] | Sequence[MergedQKV]:
        """Return each layer's packed LoRA, or its merged weights where nothing is trained.

        Args:
            backbone: the base model's layer stack.
            adapter: the LoRA factors.
            config: rank and span sizes, for the timing of `"auto"`.
            dropout: see `LoRAAdapter.pack`.
        """
        weight = backbone.embedding
        drops = dropout and adapter.training and adapter.dropout_p > 0
        if torch.is_grad_enabled() or drops:
            return adapter.pack(weight.dtype, dropout=dropout)
        with self._lock:
            self.in_use = self._choose(backbone, config)
            if self.in_use == "merged":
                return self._merged(backbone, adapter)
        return adapter.pack(weight.dtype, dropout=dropout)

    def _choose(self, backbone: Backbone, config: ICAEConfig) -> str:
        if self.mode != "auto":
            return self.mode
        weight = backbone.embedding
        setting = (weight.dtype, weight.device, torch.get_num_threads())
        if setting not in self._chosen:
            fits = self._held is not None or (merged_bytes(backbone) <= MEMORY_SHARE * available_memory(weight.device))
            self._chosen[setting] = "merged" if fits and merging_pays(backbone, config) else "fused"
        return self._chosen[setting]

    def _merged(self, backbone: Backbone, adapter: LoRAAdapter) -> list[MergedQKV]:
        # The key is a fingerprint of the bytes themselves: a write through `.data` leaves no other trace.
        tensors: list[torch.Tensor] = [p for *_, p in adapter.named_factors()]
        for layer in backbone.view:
            tensors += (m.weight for m in layer.qkv)
        key = (fingerprint(tensors), tuple(t.dtype for t in tensors), tensors[0].device, adapter.scale)
        if self._held is None or self._held[0] != key:
            self._held = None  # freed first, so that memory never holds two merged copies
            self._held = key, merge(backbone, adapter)
        return self._held[1]


def merge(backbone: Backbone, adapter: LoRAAdapter) -> list[MergedQKV]:
    """Merge LoRA into each layer: W' = W + s B A for q and v, summed in fp32 (fp64 for fp64) and rounded once."""
    q_size, kv_size = (n * backbone.head_dim for n in (backbone.num_q_heads, backbone.num_kv_heads))
    merged = []
    # Autocast would compute the product in its narrow dtype, and the merged weights outlive it.
    with torch.no_grad(), torch.autocast(backbone.embedding.device.type, enabled=False):
        for layer, factors in zip(backbone.view, adapter.factors, strict=True):
            weight = packed_qkv(layer)[0].clone()
            wide = torch.promote_types(weight.dtype, torch.float32)
            for p, part in zip(PROJECTIONS, (weight[:q_size], weight[-kv_size:]), strict=True):
                a, b = (factors[f"{p}_{f}"].to(wide) for f in FACTORS)
                part.copy_(torch.addmm(part.to(wide), b, a, alpha=adapter.scale))
            merged.append(MergedQKV(weight))
    return merged


def merged_bytes(backbone: Backbone) -> int:
    """Return the bytes of merged weights: (Hq + 2 Hkv) D d elements a layer."""
    b = backbone
    elements = b.n_layers * (b.num_q_heads + 2 * b.num_kv_heads) * b.head_dim * b.hidden_size
    return elements * b.embedding.dtype.itemsize


def merging_pays(backbone: Backbone, config: ICAEConfig) -> bool:
    """Return whether the projection is clearly faster with merged weights, timed once a process for these sizes."""
    b, weight = backbone, backbone.embedding
    on_gpu = weight.device.type == "cuda"
    rows = _GPU_ROWS if on_gpu else min(config.max_span_tokens + config.memory_size, _MAX_ROWS)
    with _TIMING:
        return _timed(
            rows, b.hidden_size, b.num_q_heads, b.num_kv_heads, b.head_dim, config.lora_rank, weight.dtype,
            weight.device, torch.get_num_threads(),
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _timed(
    rows: int, d: int, q_heads: int, kv_heads: int, head_dim: int, rank: int, dtype: torch.dtype, device: torch.device,
    threads: int,
) -> bool:  # fmt: skip
    """Time the projection with LoRA and without, and return whether the latter takes less than `PAYS` of the time."""

    # The time of a matrix product does not depend on values; random ones would advance the caller's generator.
    def filled(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.full(shape, 0.01, dtype=dtype, device=device)

    x, weight = filled(rows, d), filled((q_heads + 2 * kv_heads) * head_dim, d)
    a, b = filled(2 * rank, d), filled((q_heads + kv_heads) * head_dim, rank)
    table = filled(rows, head_dim // 2, dtype=torch.promote_types(dtype, torch.float32))
    best = [float("inf")] * 2
    begin = time.perf_counter()
    for i in range(_ROUNDS):
        for j, (lora_a, lora_b) in enumerate(((a, b), (None, None))):
            start = time.perf_counter()
            lora_qkv_rope(
                x, weight, None, lora_a, lora_b, table, table, num_q_heads=q_heads, num_kv_heads=kv_heads,
                lora_scale=1.0,
            )  # fmt: skip
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[j] = min(best[j], time.perf_counter() - start)
        if i > 0 and time.perf_counter() - begin > _SECONDS:
            break
    return best[1] < PAYS * best[0]


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device, on the CPU within the container's limit if any."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(min(_free_memory(), _container_memory()))


def _free_memory() -> int:
    try:
        return _fields("/proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        pass
    try:  # the total memory, where the free memory is unknown
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def _container_memory(folder: str = "/sys/fs/cgroup") -> float:
    try:
        with open(f"{folder}/memory.max") as limit, open(f"{folder}/memory.current") as used:
            cached = _fields(f"{folder}/memory.stat")["inactive_file"]
            return int(limit.read()) - int(used.read()) + cached
    except (OSError, KeyError, ValueError):  # no cgroup, or the limit is "max"
        return float("inf")


def _fields(path: str) -> dict[str, int]:
    with open(path) as file:
        return {name: int(value) for name, value, *_ in map(str.split, file)}
