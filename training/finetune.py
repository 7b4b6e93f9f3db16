"""Fine-tuning: an adapter learns to answer prompts about a context. `python -m icae_fast.training.finetune
CONFIG.yaml`.

Source: Ge et al., arXiv 2307.06945, section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from icae_fast import ICAE
from icae_fast.training.data.samples import InstructionDraw
from icae_fast.training.loop import train as runs
from icae_fast.training.loop.settings import Settings


def run(settings: Settings) -> Path:
    """Fine-tune on rows with `input`, `prompt` and `answer`; gives the finished adapter's folder.

    Raises:
        ICAEError: whatever is wrong, one error; checkpoints that were written stand.
    """
    return runs.train(settings, _draw)


def _draw(icae: ICAE, settings: Settings) -> InstructionDraw:
    data = settings.data
    return InstructionDraw(
        icae, max_context_tokens=data.max_context_tokens, max_answer_tokens=data.max_answer_tokens,
        on_long_row=data.on_long_row,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """`icae-fast finetune` with these arguments, by default the process's own."""
    from icae_fast.cli.app import main_of

    main_of("finetune", argv)


if __name__ == "__main__":
    main()
