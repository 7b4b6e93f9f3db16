"""The two kinds of training run: pretraining and instruction fine-tuning.

Source: Ge et al., arXiv 2307.06945, sections 2.2 (pretraining) and 2.3 (fine-tuning).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from icae_fast import ICAE
from icae_fast.training.data.samples import InstructionDraw, PretrainingDraw
from icae_fast.training.loop import train as runs
from icae_fast.training.loop.settings import Settings

Recipe = Callable[[Settings], Path]


def pretrain(settings: Settings) -> Path:
    """Train an adapter to restore and to continue texts, from rows with a `text`.

    Returns:
        The folder of the finished adapter.

    Raises:
        ICAEError: any failure, as one error; checkpoints that were already written stay.
        KeyboardInterrupt: Ctrl-C or SIGTERM; see `icae_fast.training.loop.train.train`.
    """
    return runs.train(settings, _pretraining_draw)


def finetune(settings: Settings) -> Path:
    """Train an adapter to answer prompts about a context, from rows with `input`, `prompt` and `answer`.

    Returns:
        The folder of the finished adapter.

    Raises:
        ICAEError: any failure, as one error; checkpoints that were already written stay.
        KeyboardInterrupt: Ctrl-C or SIGTERM; see `icae_fast.training.loop.train.train`.
    """
    return runs.train(settings, _instruction_draw)


RECIPES: dict[str, Recipe] = {"pretrain": pretrain, "finetune": finetune}


def _pretraining_draw(icae: ICAE, settings: Settings) -> PretrainingDraw:
    data = settings.data
    return PretrainingDraw(
        icae, excerpts=data.excerpts_per_document, spans=data.spans, max_target_tokens=data.max_target_tokens,
        lm_token=data.lm_token,
    )  # fmt: skip


def _instruction_draw(icae: ICAE, settings: Settings) -> InstructionDraw:
    data = settings.data
    return InstructionDraw(
        icae, max_context_tokens=data.max_context_tokens, max_answer_tokens=data.max_answer_tokens,
        on_long_row=data.on_long_row,
    )  # fmt: skip
