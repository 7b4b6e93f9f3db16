"""Warn where a memory goes beyond what the adapter was trained with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from icae_fast.errors import UntrainedSizeWarning

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore


def warn_beyond_training(core: ICAECore, contexts: Iterable[Sequence[int]]) -> None:
    """Warn, once for a model, where contexts have more or longer spans than the adapter was trained with.

    Args:
        core: the model; without a record of its training (`core.trained`) nothing is known and nothing said.
        contexts: tokens of each span of each context.
    """
    trained = core.trained
    if trained is None or core.warned_of_size:
        return
    for spans in contexts:
        if len(spans) > trained.max_spans:
            found = f"a memory has {len(spans)} spans, and the adapter was trained with at most {trained.max_spans}"
            remedy = "compress the text in parts, or restore it by restore_by_span"
        elif max(spans, default=0) > trained.span_tokens:
            found = f"a span has {max(spans)} tokens, and the adapter was trained with at most {trained.span_tokens}"
            remedy = "lower compression_rate"
        else:
            continue
        core.warned_of_size = True
        warnings.warn(
            f"{found}: what is read from it may be wrong or empty; {remedy}", UntrainedSizeWarning, stacklevel=4
        )
        return
