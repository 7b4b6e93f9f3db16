"""Slot KV: keys and values of a memory's slots, computed, adopted, and handed to transformers' caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from icae_fast.backbone.modes import in_own_modes
from icae_fast.checks import is_int
from icae_fast.core.core import ICAECore
from icae_fast.core.inputs import Context, as_list
from icae_fast.core.memory import Memory, SlotKV, check_kv
from icae_fast.errors import ContextTooLongError, InvalidInputError, NonFiniteError
from icae_fast.generation.prompts import prefix_ids, prompt_ids
from icae_fast.kv.segments import KVSegment, joined

if TYPE_CHECKING:
    from transformers import Cache

Task = Literal["answer", "restore", "continue", "slots"]
CacheKind = Literal["dynamic", "static"]


def memory_pieces(core: ICAECore, memory: Memory, prefix: Sequence[int] = ()) -> list[torch.Tensor]:
    """Return the decoder's input up to the last slot, cut where memories may begin to differ.

    Args:
        core: the model.
        memory: of this model.
        prefix: ids before the slots; may be empty.

    Returns:
        (S, d) embeddings of the prefix, unless it is empty, and the (k, d) slots of each span, in the compute dtype.
    """
    pieces = [_embedded(core, prefix)] if len(prefix) else []
    if memory.n_slots:
        pieces += memory.slots.to(device=core.device, dtype=core.dtype).split(memory.memory_size)
    return pieces


@in_own_modes
@torch.no_grad()
def memory_kv(core: ICAECore, memory: Memory, task: Task = "answer") -> SlotKV:
    """Return the frozen decoder's keys and values of a memory's slots, to be kept and passed to `adopt_kv` later.

    What `slot_kv` holds is copied; the rest is computed.

    Args:
        memory: of this model.
        task: `"answer"`: as `generate` reads them, behind `prefix_ids`; the other tasks read them behind
            `leading_ids`.

    Raises:
        InvalidInputError: an unknown task, or a memory without slots or of another model.
        ContextTooLongError: the base model has no position left.
        NonFiniteError: keys or values hold NaN; the message names the weight that does.
    """
    core.check_memory(memory)
    _check_choice("task", task, Task)
    _check_has_slots(memory)
    prefix = _prefix_of(core, task)
    _check_room(core, len(prefix) + memory.n_slots, 1)
    path = core.slot_kv.path(memory_pieces(core, memory, prefix))
    spans = path[len(path) - len(memory.span_lengths) :]
    kv = SlotKV(joined([s.keys for s in spans]), joined([s.values for s in spans]), prefix)
    if not kv.is_finite():
        raise NonFiniteError(core.describe_non_finite("the keys and values"))
    return kv


@in_own_modes
@torch.no_grad()
def adopt_kv(core: ICAECore, memory: Memory, kv: SlotKV) -> bool:
    """Keep keys and values of a memory's slots, so that reading it behind `kv.prefix_ids` does not compute them.

    The tensors are kept in `slot_kv` span by span, without a copy, and must not be changed any more. The caller
    vouches that this model's weights computed them for this memory; `MemoryStore.get` knows it from the file.

    Args:
        memory: of this model.
        kv: what `memory_kv` returned for it, in the compute dtype and on the model's device.

    Returns:
        False if prefix and slots together exceed `kv_budget`: nothing is kept, and reading the memory computes them.

    Raises:
        InvalidInputError: keys and values of another shape, dtype or device, or a memory of another model.
    """
    core.check_memory(memory)
    _check_has_slots(memory)
    b = core.backbone
    check_kv(kv, b.n_layers, memory.n_slots, b.num_kv_heads)
    if kv.prefix_ids:
        core.vocabulary.check_context(torch.tensor(kv.prefix_ids), "the prefix of keys and values")
    k = memory.memory_size
    starts = range(kv.start, kv.start + memory.n_slots, k)
    spans = [KVSegment(*s) for s in zip(kv.keys.split(k, 1), kv.values.split(k, 1), starts, strict=True)]
    return core.slot_kv.adopt(memory_pieces(core, memory, kv.prefix_ids), spans)


@in_own_modes
@torch.no_grad()
def kv_cache(
    core: ICAECore, memory: Memory, task: Task = "answer", *, kind: CacheKind = "dynamic",
    max_cache_len: int | None = None, rows: int = 1,
) -> Cache:  # fmt: skip
    """Return a transformers cache in which the base model has read a memory; `generation_inputs` is easier to use.

    Ordinary ids follow. `base_model(input_ids=ids, past_key_values=cache)` places them itself; `base_model.generate`
    needs any ids for what is cached, and a mask over all of it:

        ids = tokenizer(question, return_tensors="pt").input_ids
        ids = torch.nn.functional.pad(ids, (int(cache.get_seq_length()), 0))
        out = base_model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
        answer = out[:, ids.shape[1] :]

    If `generate` gets only the new ids or their embeddings, it may drop some and move the rest without an error. It
    refuses assisted decoding with this cache. A cache serves one call, which appends to it.

    Args:
        memory: of this model.
        task: what has been read: `"answer"`, the template's prefix, slots and FT; `"restore"`, slots and AE;
            `"continue"`, slots and LM; `"slots"`, slots. The last three stand behind `leading_ids`.
        kind: `"dynamic"` or `"static"`.
        max_cache_len: capacity of a static cache in tokens, cached ones included.
        rows: number of copies of the memory, for batches and beams.

    Raises:
        InvalidInputError: an unknown task or kind, no room in a static cache, or a memory of another model.
        ContextTooLongError: the base model has no position left.
    """
    core.check_memory(memory)
    _check_choice("task", task, Task)
    _check_choice("kind", kind, CacheKind)
    _check_positive(rows=rows)
    v = core.vocabulary
    prefix = _prefix_of(core, task)
    last = {"answer": [v.ft], "restore": [v.ae], "continue": [v.lm], "slots": []}[task]
    pieces = memory_pieces(core, memory, prefix) + ([_embedded(core, last)] if last else [])
    _check_room(core, sum(map(len, pieces)), 1)
    path = core.slot_kv.path(pieces)
    if not path:
        raise InvalidInputError("the memory has no slots; compress a text of at least one token")
    return _hf_cache(core, [path] * rows, kind, max_cache_len)


@in_own_modes
@torch.no_grad()
def generation_inputs(
    core: ICAECore, memory: Memory, prompts: Context | Sequence[Context] | None = None, max_new_tokens: int = 128, *,
    cache: CacheKind = "dynamic", num_beams: int = 1, num_return_sequences: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return arguments with which `base_model.generate` answers prompts about a memory that it has read already.

        inputs = icae.generation_inputs(memory, questions, max_new_tokens=64)
        ids = icae.base_model.generate(**inputs, do_sample=True, top_p=0.9)
        answers = icae.tokenizer.batch_decode(ids, skip_special_tokens=True)

    `generate` returns answers without prompts, and its features work: sampling, beams, streamers, logits processors
    (which see the answer only). Assisted decoding is refused, because it reads its whole input again. Greedy ids equal
    those of `icae.generate`, up to ties in rounding.

    Given embeddings and a cache, `generate` slices off as many embeddings as tokens are cached and takes positions
    from the attention mask. `inputs_embeds` and `attention_mask` therefore have full length, with zeros for what is
    cached. A row's cache and embeddings end where its prompt ends: the beginnings of longer prompts are read into the
    cache, which is padded on the left, the only place where padding moves no sliding window.

    The result serves one call of `generate`, which appends to the cache.

    Args:
        memory: of this model.
        prompts: a text, a row of ids, or a list of those; None to restore the context, as `restore` does.
        max_new_tokens: the most tokens of an answer; passed on to `generate`.
        cache: `"dynamic"`, or `"static"` for compiled decoding.
        num_beams, num_return_sequences: passed on to `generate`, which needs as many rows in the cache.

    Returns:
        `inputs_embeds` (B, L, d), `attention_mask` (B, L) int64, `past_key_values`, `max_new_tokens`, and
        `num_beams` and `num_return_sequences` where they are not 1.

    Raises:
        InvalidInputError: no or an empty prompt, ids out of range, numbers below 1, a memory of another model.
        ContextTooLongError: slots, prompt and answer exceed the base model's positions.
        TokenizerMismatchError: text without a tokenizer.
    """
    core.check_memory(memory)
    _check_choice("cache", cache, CacheKind)
    options = {"num_beams": num_beams, "num_return_sequences": num_return_sequences}
    _check_positive(max_new_tokens=max_new_tokens, **options)
    restoring = (list(core.leading_ids), [core.vocabulary.ae])
    pairs = [restoring] if prompts is None else [prompt_ids(core, p) for p in as_list(prompts)]
    copies = max(num_beams, num_return_sequences)  # `generate` repeats its inputs as often, but not the cache
    return {
        **_inputs_behind(core, memory, pairs, int(max_new_tokens), cache, int(copies)),
        "max_new_tokens": int(max_new_tokens),
        **{name: int(n) for name, n in options.items() if n > 1},
    }


def _inputs_behind(
    core: ICAECore, memory: Memory, pairs: Sequence[tuple[list[int], list[int]]], max_new_tokens: int,
    cache: CacheKind, copies: int,
) -> dict[str, Any]:  # fmt: skip
    """Return embeddings, mask and cache of prompts (prefix, suffix) around the slots of a memory."""
    suffixes = [_embedded(core, suffix) for _, suffix in pairs]
    pieces = memory_pieces(core, memory, pairs[0][0])
    _check_room(core, sum(map(len, pieces)) + max(map(len, suffixes)), max_new_tokens)
    n_read = min(map(len, suffixes))  # tokens that `generate` reads; the others are cached
    paths = core.slot_kv.paths([pieces + ([s[:-n_read]] if len(s) > n_read else []) for s in suffixes])
    lengths = [sum(s.length for s in path) for path in paths]
    n_cached = max(lengths)
    embeddings = torch.stack([s[-n_read:] for s in suffixes])
    mask = torch.ones(len(paths), n_cached + n_read, dtype=torch.int64, device=core.device)
    for row, length in zip(mask, lengths, strict=True):
        row[: n_cached - length] = 0
    return {
        "inputs_embeds": torch.nn.functional.pad(embeddings, (0, 0, n_cached, 0)),
        "attention_mask": mask,
        "past_key_values": _hf_cache(core, paths, cache, n_cached + n_read + max_new_tokens, copies),
    }


def _hf_cache(
    core: ICAECore, paths: Sequence[Sequence[KVSegment]], kind: CacheKind, max_cache_len: int | None, copies: int = 1
) -> Cache:
    from icae_fast.kv.transformers_caches import dynamic_cache, static_cache  # transformers takes seconds to import

    config = core.base_model.config
    if kind == "dynamic":
        return dynamic_cache(config, paths, copies)
    longest = max(sum(s.length for s in path) for path in paths)
    if not is_int(max_cache_len) or max_cache_len <= longest:
        raise InvalidInputError(
            f"a static cache with max_cache_len={max_cache_len!r} has no room behind {longest} tokens; give a "
            "whole number that covers prompt and answer, too"
        )
    return static_cache(config, paths, int(max_cache_len), copies)


def _embedded(core: ICAECore, ids: Sequence[int]) -> torch.Tensor:
    return core.tokens_to_embeddings(torch.tensor(list(ids), dtype=torch.int64)).detach()


def _prefix_of(core: ICAECore, task: Task) -> tuple[int, ...]:
    return prefix_ids(core) if task == "answer" else core.leading_ids


def _check_choice(what: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise InvalidInputError(f"{what} is {value!r}; it must be one of {', '.join(get_args(choices))}")


def _check_has_slots(memory: Memory) -> None:
    if not memory.n_slots:
        raise InvalidInputError("the memory has no slots; compress a text of at least one token")


def _check_positive(**numbers: Any) -> None:
    for name, n in numbers.items():
        if not is_int(n) or n < 1:
            raise InvalidInputError(f"{name} is {n!r}; give a whole number of at least 1")


def _check_room(core: ICAECore, n_read: int, n_new: int) -> None:
    if n_read + n_new > core.max_positions:
        raise ContextTooLongError(
            f"slots and prompt take {n_read} positions and {n_new} more are wanted, but the base model has "
            f"{core.max_positions}; ask for fewer tokens, or set icae.max_positions higher if it extrapolates"
        )
