"""Token steps of a `DecodeSession` as one CUDA graph: a launch a token instead of ten a layer.

No machine with a GPU was at hand: the buffers and their order are tested on the CPU with a stand-in for the graph, the
capture itself has never run. `make gpu-check` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from icae_fast.ops.shared_prefix_attention.plan import kept

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Capture(Protocol):
    """What a `StepGraph` asks of a device."""

    def run(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Call a function as `capture` will."""

    def capture(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Record a function without running it: gives what runs it on its inputs of then, and where its result is."""


class StepGraph:
    """Steps of the same rows, whose inputs stand in the same place every time.

    The first step runs as it is, which compiles kernels, measures their configurations and writes their tables; the
    second one is captured, and replayed from then on. Rows that leave make another `StepGraph` necessary.

    Args:
        compute: `compute(tokens, cos, sin)` gives (R, V) logits in the order of the rows; all else that it reads has to
            stay where it is, and it may not wait for the device.
        tables: cos and sin (positions, D / 2).
        positions: of each row's next token.
        tail_lengths: (R,) int32, which each step raises by one before it computes.
        order: places among the caller's tokens that the rows have.
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
        self._logits: torch.Tensor | None = None

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(R, V) logits of the token after `tokens` (R,), both in the caller's order."""
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
    """Captures functions one after the other into CUDA graphs, of which the last one lives.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._alive: tuple[object, ...] = ()

    def run(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See `Capture`. It is the stream that is captured later, for which the kernels' tables are then written."""
        caller = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            result = function()
        caller.wait_stream(self._stream)
        result.record_stream(caller)
        return result

    def capture(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """See `Capture`."""
        self._alive = ()  # the last graph's memory serves this one
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with kept() as tables, recording:
            result = function()
        self._alive = graph, tables
        return graph.replay, result


def capture_on(device: torch.device) -> Capture | None:
    """What captures steps on a device, None where they run as they are."""
    return CudaCapture(device) if device.type == "cuda" else None
