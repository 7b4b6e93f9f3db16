"""How the adapter meets the base weights where nothing is trained: LoRA on the fly, or merged into second weights."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch

from icae_fast.adapter.lora import FACTORS, PROJECTIONS
from icae_fast.backbone.lora import MergedQKV, PackedLoRA
from icae_fast.backbone.packing import packed_qkv
from icae_fast.errors import InvalidInputError
from icae_fast.ops import fingerprint, lora_qkv_rope

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE

AdapterMode = Literal["auto", "fused", "merged"]

MEMORY_SHARE = 0.25  # of the memory that is available, the most that "auto" takes for second weights
PAYS = 0.95  # of the time of the fused projection; less of a gain is not worth the memory
_MOST_ROWS = 512
_GPU_ROWS = 8192  # of fewer a launch takes longer than its work, and it is launches that would be compared
_ROUNDS = 6
_SECONDS = 0.3  # after which two rounds are enough

_TIMING = threading.Lock()  # two timings at once would disturb one another


class EncoderWeights:
    """What the encoder of one `ICAE` runs with: the adapter's mode, and merged weights with what they were made of.

    Copies and pickles keep the mode alone.

    Attributes:
        mode: see `AdapterModeMixin.adapter_mode`.
        in_use: "fused" or "merged", or None before the first call without gradients.
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
        """Let go of merged weights; a call under way goes on with its own reference."""
        with self._lock:
            self._held = None

    def get(self, icae: ICAE, *, dropout: bool = True) -> Sequence[PackedLoRA] | Sequence[MergedQKV]:
        """Each layer's LoRA, or its merged weights where nothing is trained; see `LoRAAdapter.pack` for `dropout`."""
        drops = dropout and icae.adapter.training and icae.adapter.dropout_p > 0
        if torch.is_grad_enabled() or drops:
            return icae.adapter.pack(icae.dtype, dropout=dropout)
        with self._lock:
            self.in_use = self._choose(icae)
            if self.in_use == "merged":
                return self._merged(icae)
        return icae.adapter.pack(icae.dtype, dropout=dropout)

    def _choose(self, icae: ICAE) -> str:
        if self.mode != "auto":
            return self.mode
        setting = (icae.dtype, icae.device, torch.get_num_threads())
        if setting not in self._chosen:
            fits = self._held is not None or (merged_bytes(icae) <= MEMORY_SHARE * available_memory(icae.device))
            self._chosen[setting] = "merged" if fits and merging_pays(icae) else "fused"
        return self._chosen[setting]

    def _merged(self, icae: ICAE) -> list[MergedQKV]:
        # Made of the very bytes that are there now: writes through `.data` leave no other trace.
        tensors = [p for *_, p in icae.adapter.named_factors()]
        for layer in icae.backbone.view:
            tensors += (m.weight for m in layer.qkv)
        key = (fingerprint(tensors), tuple(t.dtype for t in tensors), icae.device, icae.adapter.scale)
        if self._held is None or self._held[0] != key:
            self._held = None  # before there are new ones: not twice the memory
            self._held = key, merge(icae)
        return self._held[1]


def merge(icae: ICAE) -> list[MergedQKV]:
    """Each layer's W' = W + s B A for q and v, summed in fp32 (fp64 for fp64) and rounded once; k is copied."""
    q_size, kv_size = (n * icae.backbone.head_dim for n in (icae.backbone.num_q_heads, icae.backbone.num_kv_heads))
    merged = []
    # Autocast would do the product in its narrow dtype, and the weights outlive it.
    with torch.no_grad(), torch.autocast(icae.device.type, enabled=False):
        for layer, factors in zip(icae.backbone.view, icae.adapter.layers, strict=True):
            weight = packed_qkv(layer)[0].clone()
            wide = torch.promote_types(weight.dtype, torch.float32)
            for p, part in zip(PROJECTIONS, (weight[:q_size], weight[-kv_size:]), strict=True):
                a, b = (factors[f"{p}_{f}"].to(wide) for f in FACTORS)
                part.copy_(torch.addmm(part.to(wide), b, a, alpha=icae.adapter.scale))
            merged.append(MergedQKV(weight))
    return merged


def merged_bytes(icae: ICAE) -> int:
    """Bytes of merged weights: (Hq + 2 Hkv) D d elements a layer."""
    b = icae.backbone
    return b.n_layers * (b.num_q_heads + 2 * b.num_kv_heads) * b.head_dim * b.hidden_size * icae.dtype.itemsize


def merging_pays(icae: ICAE) -> bool:
    """Is the projection with merged weights clearly the faster one? Timed once a process for sizes like these."""
    b, config = icae.backbone, icae.config
    rows = min(config.max_span_tokens + config.memory_size, _MOST_ROWS) if icae.device.type != "cuda" else _GPU_ROWS
    with _TIMING:
        return _timed(
            rows, b.hidden_size, b.num_q_heads, b.num_kv_heads, b.head_dim, config.lora_rank, icae.dtype, icae.device,
            torch.get_num_threads(),
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _timed(rows, d, q_heads, kv_heads, head_dim, rank, dtype, device, threads) -> bool:
    # Values do not matter to a matrix product's time, and random ones would move the caller's generator.
    def filled(*shape, dtype=dtype):
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
    """Bytes that may still be taken on a device; on the CPU within the limit of the container, where there is one."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(_free_memory(), _container_memory())


def _free_memory() -> float:
    try:
        return _fields("/proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        pass
    try:  # all there is, where it is unknown how much is taken
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def _container_memory(folder: str = "/sys/fs/cgroup") -> float:
    try:
        with open(f"{folder}/memory.max") as limit, open(f"{folder}/memory.current") as used:
            cached = _fields(f"{folder}/memory.stat")["inactive_file"]
            return int(limit.read()) - int(used.read()) + cached
    except (OSError, KeyError, ValueError):  # none, or the limit is "max"
        return float("inf")


def _fields(path: str) -> dict[str, int]:
    with open(path) as file:
        return {name: int(value) for name, value, *_ in map(str.split, file)}


class AdapterModeMixin:
    """The part of `ICAE` that says how the adapter is applied."""

    encoder_weights: EncoderWeights

    @property
    def adapter_mode(self) -> AdapterMode:
        """How LoRA is applied where nothing is trained (`compress`, `extend`, `encode` under `no_grad`).

        * `"fused"`: on the fly inside `lora_qkv_rope`; no further weights.
        * `"merged"`: with second q, k and v weights W' = W + alpha / r * B A, summed in fp32 and rounded once.
        * `"auto"`: whichever of the two a timing of one layer's projection finds faster at the first call, and
          fused where merging saves less than a twentieth of it or would take more than a quarter of the available
          memory. The outcome decides how slots round: set a mode for the same bits on every machine.

        Merged weights take (Hq + 2 Hkv) D d elements a layer, k's copied among them since the op takes one block: in
        bf16 33 MB for SmolLM2-135M, 1.6 GB for Mistral-7B and 3.2 GB for Llama-2-7B. They are no part of the state
        dict, are looked at in every call and made again when LoRA factors or base weights hold other bytes, however
        those came there, and stay until `free_merged_weights`.

        Where W is narrow, a part of the delta below half a unit in the last place of W is lost, and the rest is
        rounded with W'. In bf16 SmolLM2's slots lie as near to the fp32 ones, and to the baseline's, as fused ones do,
        even where most of a small delta is lost: bf16 activations are rounded as coarsely (docs/design.md).

        With gradients or LoRA dropout everything is fused, and the decoder has no adapter.

        Raises:
            InvalidInputError: set to another value.
        """
        return self.encoder_weights.mode

    @adapter_mode.setter
    def adapter_mode(self, mode: AdapterMode) -> None:
        if not isinstance(mode, str) or mode not in get_args(AdapterMode):
            raise InvalidInputError(f"adapter_mode is {mode!r}; it must be one of {', '.join(get_args(AdapterMode))}")
        self.encoder_weights.mode = mode

    @property
    def adapter_mode_in_use(self) -> str | None:
        """`"fused"` or `"merged"`, as the last call without gradients ran; None before the first."""
        return self.encoder_weights.in_use

    def free_merged_weights(self) -> None:
        """Let go of merged weights; the next call that wants them makes them again."""
        self.encoder_weights.free()

    def extra_repr(self) -> str:
        """For `repr`: the adapter's mode, and the one in use."""
        used = self.adapter_mode_in_use
        return f"adapter_mode={self.adapter_mode!r}" + (f" ({used} in use)" if used else "")
