"""Token steps of a `DecodeSession` as one CUDA graph: one launch per token instead of ten per layer.

The buffers and their order are tested on the CPU with a stand-in for the graph. `make gpu-check` runs the capture;
docs/kernels.md has its figures on an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from icae_fast.ops.shared_prefix_attention.plan import kept

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Capture(Protocol):
    """What a `StepGraph` needs from a device."""

    def run(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Call a function under the conditions of `capture`."""

    def capture(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Record a function without running it; return a replay function and the tensor that holds its result."""


class StepGraph:
    """Token steps of a fixed set of rows over static input buffers.

    The first step runs eagerly, which compiles and autotunes kernels and writes their tables. The second is captured
    and replayed from then on. When rows leave, a new `StepGraph` is needed.

    Args:
        compute: `compute(tokens, cos, sin)` returns (R, V) logits in the order of the rows. Everything else that it
            reads must stay in place, and it must not synchronise with the device.
        tables: cos and sin (positions, D / 2).
        positions: position of each row's next token.
        tail_lengths: (R,) int32; each step increments it before computing.
        order: index among the caller's tokens of each row.
        capture: of the device.
    """

    def __init__(
        self,
        compute: Compute,
        tables: tuple[torch.Tensor, torch.Tensor],
        positions: Sequence[int],
        tail_lengths: torch.Tensor,
        order: Sequence[int],
        capture: Capture,
    ) -> None:
        device = tail_lengths.device
        self._compute, self._tables, self._capture = compute, tables, capture
        self._tail_lengths = tail_lengths
        self._positions = torch.tensor(positions, dtype=torch.int64, device=device)
        self._order = torch.tensor(order, dtype=torch.int64, device=device)
        self._back = torch.argsort(self._order)
        self._tokens = torch.zeros(len(order), dtype=torch.int64, device=device)
        self._warm = False
        self._replay: Callable[[], None] | None = None
        self._logits: torch.Tensor

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the (R, V) logits of the token after `tokens` (R,), both in the caller's order."""
        self._tokens.copy_(tokens)
        if not self._warm:
            self._warm = True
            return self._capture.run(self._run)
        if self._replay is None:
            self._replay, self._logits = self._capture.capture(self._run)
        self._replay()
        return self._logits.clone()  # the next step overwrites it

    def _run(self) -> torch.Tensor:
        self._tail_lengths += 1
        cos, sin = (t.index_select(0, self._positions) for t in self._tables)
        self._positions += 1
        logits = self._compute(self._tokens.index_select(0, self._order), cos, sin)
        return logits.index_select(0, self._back)


class CudaCapture:
    """Capture functions into CUDA graphs, one after the other; only the last graph stays alive.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._alive: tuple[object, ...] = ()

    def run(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See `Capture`. Runs on the stream that is captured later, so that the kernels' tables are written for it."""
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            result = function()
        caller.wait_stream(self._stream)
        result.record_stream(caller)
        return result

    def capture(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """See `Capture`."""
        self._alive = ()  # frees the last graph, whose memory pool this one reuses
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with kept() as tables, recording:
            result = function()
        self._alive = graph, tables
        return graph.replay, result


def capture_on(device: torch.device) -> Capture | None:
    """Return the capture for a device, or None where steps run eagerly."""
    return CudaCapture(device) if device.type == "cuda" else None
