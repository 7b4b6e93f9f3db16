"""The output of the training forward, whose logits are computed when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class LazyTensor:
    """A tensor that is computed at the first call of `tensor` and kept from then on.

    Args:
        compute: returns it.
    """

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute: Callable[[], torch.Tensor] | None = compute
        self._tensor: torch.Tensor | None = None

    def tensor(self) -> torch.Tensor:
        """Return the tensor."""
        if self._compute is not None:
            self._tensor, self._compute = self._compute(), None
        assert self._tensor is not None
        return self._tensor

    def __repr__(self) -> str:
        return f"LazyTensor({'not computed' if self._compute else self._tensor})"


class TrainingOutput(dict[str, Any]):
    """A dictionary that computes a lazy entry when it is asked for by its name.

    `out["logits"]`, `out.get("logits")` and `dict(out)` compute the entry. `out.items()` and `out.values()` do not, and
    show a `LazyTensor` there: trainers and wrappers (accelerate, DDP) look through all values of an output, and the
    entry may be as large as the rest of a training step.
    """

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, LazyTensor):
            value = self[name] = value.tensor()
        return value

    def __iter__(self) -> Iterator[str]:  # with an own iterator, `dict(out)` reads entries by name
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry, or `default` if there is none."""
        return self[name] if name in self else default  # noqa: SIM401 - this is what `self.get` is

    def pop(self, name: str, *default: Any) -> Any:
        """Remove an entry and return it, or `default` if there is none."""
        value = super().pop(name, *default)
        return value.tensor() if isinstance(value, LazyTensor) else value
