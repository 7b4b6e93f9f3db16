"""Greedy decoding of the frozen decoder from a memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from icae_fast.cache import DecoderCache
from icae_fast.errors import ContextTooLongError, InvalidInputError, NonFiniteError

if TYPE_CHECKING:
    from icae_fast.modeling import ICAE


@torch.no_grad()
def generate_greedy(
    icae: ICAE,
    prefix: Sequence[torch.Tensor],
    suffixes: Sequence[torch.Tensor],
    max_new_tokens: int,
    min_new_tokens: int = 0,
    streamer: Any = None,
) -> list[list[int]]:
    """Continue `prefix + suffix` for every suffix, one row each, all rows in one batch.

    The prefix (template and slots) is read once, whatever the number of rows, and not again in later calls while
    `icae.slot_kv` keeps it. A row ends with its first end-of-sequence token, which is returned with it as
    transformers' `generate` does; ids that ICAE adds to the vocabulary never compete.

    Args:
        icae: the model.
        prefix: (P_i, d) embeddings of the pieces that all rows share, one behind the other; may be empty.
        suffixes: (S_i, d) embeddings of each row, at least one token each.
        max_new_tokens: the most tokens that a row gets.
        min_new_tokens: tokens before which no row may end.
        streamer: a transformers streamer (`put`, `end`); for a single row.

    Returns:
        A list of token ids for each row.

    Raises:
        ContextTooLongError: a row would pass the base model's positions.
        InvalidInputError: token numbers out of range, or a streamer for several rows.
        NonFiniteError: the logits hold NaN.
    """
    n_prefix = sum(len(piece) for piece in prefix)
    _check(icae, n_prefix, suffixes, max_new_tokens, min_new_tokens, streamer)
    if max_new_tokens == 0:
        if streamer is not None:
            streamer.end()
        return [[] for _ in suffixes]
    lengths = [len(s) for s in suffixes]
    cache = DecoderCache(
        icae.backbone, len(suffixes), n_prefix + max(lengths) + max_new_tokens, icae.dtype, icae.device
    )
    cache.begin_with(icae.slot_kv.path(prefix))
    hidden = icae.backbone.forward(torch.cat(list(suffixes)), cache.append(lengths), cache=cache)
    return _decode(icae, hidden, cache, max_new_tokens, min_new_tokens, streamer)


def _check(icae, n_prefix, suffixes, max_new_tokens, min_new_tokens, streamer):
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise InvalidInputError(
            f"min_new_tokens={min_new_tokens} and max_new_tokens={max_new_tokens}: give 0 <= min <= max"
        )
    if streamer is not None and len(suffixes) > 1:
        raise InvalidInputError(f"a streamer shows one row and there are {len(suffixes)} prompts; pass one prompt")
    longest = n_prefix + max(len(s) for s in suffixes)
    if longest + max_new_tokens > icae.max_positions:
        raise ContextTooLongError(
            f"slots and prompt take {longest} positions and max_new_tokens={max_new_tokens} more, but the base model "
            f"has {icae.max_positions}; ask for fewer tokens, or set icae.max_positions higher if it extrapolates"
        )


def _decode(icae, hidden, cache, max_new_tokens, min_new_tokens, streamer):
    n_rows = hidden.shape[0]
    eos = torch.tensor(icae.eos_token_ids, dtype=torch.int64, device=icae.device)
    produced: list[list[int]] = [[] for _ in range(n_rows)]
    running = list(range(n_rows))
    for step in range(max_new_tokens):
        logits = icae.base_model.lm_head(hidden)
        if step == 0 and not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(icae.describe_non_finite("the logits"))
        if step < min_new_tokens:
            logits[:, eos] = float("-inf")
        token = logits.argmax(-1)
        ids = token.tolist()  # the only host synchronisation of a step
        for i in running:
            produced[i].append(ids[i])
        if streamer is not None:
            streamer.put(token.cpu())
        running = [i for i in running if ids[i] not in icae.eos_token_ids]
        if not running or step + 1 == max_new_tokens:
            break
        hidden = icae.backbone.forward(icae.embed(token), cache.append([1] * n_rows), cache=cache)
    if streamer is not None:
        streamer.end()
    return produced
