"""Entry module of pretraining: `python -m icae_fast.training.pretrain CONFIG.yaml`, or under `accelerate launch -m`."""

from __future__ import annotations

from collections.abc import Sequence

from icae_fast.cli.app import main_of


def main(argv: Sequence[str] | None = None) -> None:
    """Run `icae-fast pretrain`.

    Args:
        argv: arguments of the command, default those of the process.
    """
    main_of("pretrain", argv)


if __name__ == "__main__":
    main()
