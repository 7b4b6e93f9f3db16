"""Slot KV as transformers caches, for `base_model.generate` and the base model's forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from icae_fast.errors import InvalidInputError
from icae_fast.kv.segments import KVSegment


class ReadCache(DynamicCache):
    """A `DynamicCache` that has read a memory, which assisted decoding refuses instead of answering wrongly.

    Assisted decoding (`assistant_model`, `prompt_lookup_num_tokens`) reads the whole input again behind the cache, but
    what is cached stands in the input as zeros or as arbitrary ids. It begins by this call, before anything is read.
    """

    n_read = 0

    def activate_past_recording(self) -> None:
        """Keep what windows would drop, for `crop`; see transformers.

        Raises:
            InvalidInputError: nothing was read behind the memory.
        """
        if self.get_seq_length() == self.n_read:
            raise InvalidInputError(
                "assisted decoding reads the whole input again, and a memory's slots are no tokens; call generate "
                "without assistant_model and prompt_lookup_num_tokens"
            )
        super().activate_past_recording()


def dynamic_cache(config: Any, paths: Sequence[Sequence[KVSegment]], copies: int = 1) -> DynamicCache:
    """Return a `DynamicCache` that has read one path per row; shorter paths are padded on the left.

    Equal rows are one row expanded. The cache grows by concatenation and reorders by indexing, which copies them. The
    path itself is copied, because `reset` writes into the cache's tensors in transformers 5.0.

    Args:
        config: of the base model; names the layers with a sliding window.
        paths: consecutive segments for each row, at least one token in total.
        copies: adjacent rows for each path, as beam search needs them.
    """
    cache = ReadCache(config=config)
    cache.n_read = max(sum(s.length for s in path) for path in paths)
    layers: list[Any] = cache.layers
    for layer, (keys, values) in zip(layers, _layers(paths, copies), strict=True):
        layer.lazy_initialization(keys, values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = keys.shape[2]
            keys, values = (t[:, :, -layer.sliding_window + 1 :] for t in (keys, values))
        layer.keys, layer.values = keys, values
    return cache


def static_cache(config: Any, paths: Sequence[Sequence[KVSegment]], max_cache_len: int, copies: int = 1) -> StaticCache:
    """Return a `StaticCache` with a capacity of `max_cache_len` tokens per row, filled like `dynamic_cache`."""
    cache = StaticCache(config=config, max_cache_len=max_cache_len)
    for i, (keys, values) in enumerate(_layers(paths, copies)):
        cache.update(keys, values, i)
    return cache


def _layers(paths: Sequence[Sequence[KVSegment]], copies: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each layer's keys and values, (rows, Hkv, length, D)."""
    alike = len({tuple(map(id, path)) for path in paths}) == 1
    for layer in range(len(paths[0][0].keys)):
        both = []
        for name in ("keys", "values"):
            rows = [torch.cat([getattr(s, name)[layer] for s in p]) for p in (paths[:1] if alike else paths)]
            if alike:
                stacked = rows[0].expand(len(paths) * copies, -1, -1, -1)
            else:
                # Padding is masked, and must not be 0: transformers 5.0 counts a static cache's non-zero keys.
                stacked = pad_sequence(rows, batch_first=True, padding_value=1.0, padding_side="left")
                stacked = stacked.repeat_interleave(copies, 0)
            both.append(stacked.transpose(1, 2))
        yield both[0], both[1]
