"""Slot KV as the caches of transformers, for `base_model.generate` and the base model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from icae_fast.kv.segments import KVSegment


def dynamic_cache(config: Any, paths: Sequence[Sequence[KVSegment]], copies: int = 1) -> DynamicCache:
    """A `DynamicCache` that has read one path a row, shorter ones padded on the left.

    Rows that are the same are one row expanded: the cache grows by concatenation and reorders by indexing, which is
    when they become several. The path itself is copied, since `reset` wrote into the cache's tensors in transformers
    5.0.

    Args:
        config: the base model's, which says what layers have a sliding window.
        paths: for each row segments one behind the other, at least one token in all.
        copies: rows for each path, next to each other, as beam search wants them.
    """
    cache = DynamicCache(config=config)
    for layer, (keys, values) in zip(cache.layers, _layers(paths, copies), strict=True):
        layer.lazy_initialization(keys, values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = keys.shape[2]
            keys, values = (t[:, :, -layer.sliding_window + 1 :] for t in (keys, values))
        layer.keys, layer.values = keys, values
    return cache


def static_cache(config: Any, paths: Sequence[Sequence[KVSegment]], max_cache_len: int, copies: int = 1) -> StaticCache:
    """A `StaticCache` with room for `max_cache_len` tokens a row, filled as `dynamic_cache` fills its own."""
    cache = StaticCache(config=config, max_cache_len=max_cache_len)
    for i, (keys, values) in enumerate(_layers(paths, copies)):
        cache.update(keys, values, i)
    return cache


def _layers(paths: Sequence[Sequence[KVSegment]], copies: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's keys and values, (rows, Hkv, length, D)."""
    alike = len({tuple(map(id, path)) for path in paths}) == 1
    for layer in range(len(paths[0][0].keys)):
        both = []
        for name in ("keys", "values"):
            rows = [torch.cat([getattr(s, name)[layer] for s in p]) for p in (paths[:1] if alike else paths)]
            if alike:
                stacked = rows[0].expand(len(paths) * copies, -1, -1, -1)
            else:
                # Masked, and not 0: transformers 5.0 counts a static cache's tokens by their keys that are not.
                stacked = pad_sequence(rows, batch_first=True, padding_value=1.0, padding_side="left")
                stacked = stacked.repeat_interleave(copies, 0)
            both.append(stacked.transpose(1, 2))
        yield both[0], both[1]
