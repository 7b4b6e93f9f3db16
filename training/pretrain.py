"""Pretraining: an adapter learns to restore and to continue texts. `python -m icae_fast.training.pretrain CONFIG.yaml`.

Source: Ge et al., arXiv 2307.06945, section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from icae_fast import ICAE
from icae_fast.training.data.samples import PretrainingDraw
from icae_fast.training.loop import train as runs
from icae_fast.training.loop.settings import Settings


def run(settings: Settings) -> Path:
    """Pretrain on rows with a `text`; gives the finished adapter's folder.

    Raises:
        ICAEError: whatever is wrong, one error; checkpoints that were written stand.
    """
    return runs.train(settings, _draw)


def _draw(icae: ICAE, settings: Settings) -> PretrainingDraw:
    data = settings.data
    return PretrainingDraw(
        icae, windows=data.windows_per_document, spans=data.spans, max_target_tokens=data.max_target_tokens,
        lm_token=data.lm_token,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """`icae-fast pretrain` with these arguments, by default the process's own."""
    from icae_fast.cli.app import main_of

    main_of("pretrain", argv)


if __name__ == "__main__":
    main()
