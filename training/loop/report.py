"""Measurements that a training run logs: losses by objective, speed, memory, and a passage restored from its slots."""

from __future__ import annotations

import difflib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from icae_fast import ICAE
from icae_fast.errors import OutputError
from icae_fast.training.evaluation.measures import exact_prefix
from icae_fast.training.loop.model import NAMES
from icae_fast.training.methods.curriculum import WARM

SAMPLES_FILE = "samples.jsonl"


class Scores:
    """Sums of losses, counts and numbers of correct predictions, by objective.

    Args:
        values: (len(NAMES), 3) fp64: sum of losses, count, and number correct. Default zeros.
    """

    def __init__(self, values: torch.Tensor | None = None) -> None:
        self.values = torch.zeros(len(NAMES), 3, dtype=torch.float64) if values is None else values

    @classmethod
    def of(cls, outputs: Mapping[str, torch.Tensor]) -> Scores:
        """Return the scores of a `TrainingModel`'s outputs, on their device."""
        return cls(torch.stack([outputs[key].double() for key in ("sums", "counts", "correct")], dim=1))

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.values + other.values)

    def means(self, prefix: str = "") -> dict[str, float]:
        """Return `loss` over all labelled tokens, and `loss_NAME` and `accuracy_NAME` of each objective that occurred.

        The warm start's loss has another scale, so it enters `loss` only if no other objective occurred.
        """
        rows = {name: row for name, row in zip(NAMES, self.values.tolist(), strict=True) if row[1]}
        scored = [row for name, row in rows.items() if name != WARM] or list(rows.values())
        if not scored:
            return {}
        logs = {f"{prefix}loss": sum(row[0] for row in scored) / sum(row[1] for row in scored)}
        for name, (total, count, right) in rows.items():
            logs |= {f"{prefix}loss_{name}": total / count, f"{prefix}accuracy_{name}": right / count}
        return logs


class LogInterval:
    """Sums over the optimiser steps since the last log line, over all processes.

    Its state is part of a checkpoint, so that a resumed run logs the same values as an uninterrupted one: sums are
    Python floats, which JSON stores exactly.

    Attributes:
        without_teacher: samples that were too long for a teacher, since training began.
        skipped_steps: optimiser steps dropped since training began.
        tokens, context_tokens: tokens seen since training began.
    """

    def __init__(self) -> None:
        self.skipped_steps = self.without_teacher = 0
        self.tokens = 0
        self.context_tokens = 0
        self._begin(Scores())

    def _begin(self, scores: Scores) -> None:
        self._scores = scores
        self._start, self._seconds_tokens, self._seconds_context = time.perf_counter(), 0, 0

    def add(self, scores: Scores, tokens: int, context_tokens: int) -> None:
        """Add one optimiser step.

        Args:
            scores: scores of the step.
            tokens: context and decoder tokens.
            context_tokens: context tokens.
        """
        self._scores += scores
        self.see(tokens, context_tokens)

    def see(self, tokens: int, context_tokens: int) -> None:
        """Count tokens without a loss, those of a dropped step."""
        self.tokens += tokens
        self.context_tokens += context_tokens
        self._seconds_tokens += tokens
        self._seconds_context += context_tokens

    def drain(self) -> dict[str, float]:
        """Return the values of a log line, mean losses and speed, and begin a new interval."""
        logs = self._scores.means()
        seconds = time.perf_counter() - self._start
        logs["tokens_per_second"] = round(self._seconds_tokens / seconds, 1)
        logs["context_tokens_per_second"] = round(self._seconds_context / seconds, 1)
        logs["tokens"] = self.tokens
        logs["context_tokens"] = self.context_tokens
        for name in ("skipped_steps", "without_teacher"):
            if n := getattr(self, name):
                logs[name] = n
        self._begin(Scores())
        return logs

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values for `load_state_dict`."""
        return {
            "scores": self._scores.values.tolist(),
            "skipped_steps": self.skipped_steps,
            "without_teacher": self.without_teacher,
            "tokens": self.tokens,
            "context_tokens": self.context_tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; speed is measured from now on."""
        self._begin(Scores(torch.tensor(state["scores"], dtype=torch.float64)))
        self.skipped_steps, self.without_teacher = state["skipped_steps"], state["without_teacher"]
        self.tokens, self.context_tokens = state["tokens"], state["context_tokens"]


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return peak memory in MB: of this process since its start on a CPU, of CUDA's allocator since the last call."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"peak_memory_mb": round(peak / 1e6, 1)}
    return {"peak_memory_mb": round(_peak_rss() / 1e6, 1)}


def _peak_rss() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024


def restoration(icae: ICAE, ids: Sequence[int], origin: str) -> dict[str, Any]:
    """Compress a passage and restore it greedily from its memory.

    Args:
        icae: model in evaluation mode.
        ids: the passage.
        origin: provenance of the passage.

    Returns:
        JSON values: `origin`; `original` and `restored`, texts, or ids without a tokenizer; `exact_prefix`, the share
            of the passage up to the first wrong token; `matched`, the share of its tokens in the longest matching
            blocks (`difflib`).
    """
    memory = icae.compress([list(ids)])[0]
    out = icae.restore(memory, max_new_tokens=len(ids) + 1, return_ids=True)
    restored = [int(i) for i in out if int(i) not in icae.eos_token_ids]
    passage = [int(i) for i in ids]
    icae.clear_kv()  # the next step changes the slots
    blocks = difflib.SequenceMatcher(None, passage, restored, autojunk=False).get_matching_blocks()
    show = icae.tokenizer.decode if icae.tokenizer else list
    return {
        "origin": origin,
        "original": show(passage),
        "restored": show(restored),
        "exact_prefix": exact_prefix(passage, restored),
        "matched": sum(b.size for b in blocks) / len(passage),
    }


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append a JSON line to a file; NaN becomes null.

    Raises:
        OutputError: the file cannot be written; a part of the line may be in it.
    """
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error}); checkpoints stand: free space, and start again to continue"
        ) from error
