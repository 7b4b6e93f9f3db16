"""How the GPU check runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Options of a check.

    Args:
        device: "cuda", or "cpu" to try the code itself.
        small: use small models and one round.
        random: use SmolLM2's shape with random weights, so that its package need not be installed.
        jobs: processes that check ops.
    """

    device: str = "cuda"
    small: bool = False
    random: bool = False
    jobs: int = 1

    @property
    def rounds(self) -> int:
        """Interleaved rounds of a timing."""
        return 1 if self.small else 5
