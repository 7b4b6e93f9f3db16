"""What an `ICAE` does with slot KV: the pieces of a memory, its keys and values, and transformers' caches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from icae_fast.core.inputs import Context, as_list
from icae_fast.core.memory import Memory, SlotKV, check_kv
from icae_fast.errors import ContextTooLongError, InvalidInputError, NonFiniteError
from icae_fast.kv.segments import KVSegment, joined
from icae_fast.kv.tree import SlotKVTree

if TYPE_CHECKING:
    from transformers import Cache

    from icae_fast.model.icae import ICAE

Task = Literal["answer", "restore", "continue", "slots"]
CacheKind = Literal["dynamic", "static"]


def memory_pieces(icae: ICAE, memory: Memory, prefix_ids: Sequence[int] = ()) -> list[torch.Tensor]:
    """What the decoder reads up to the last slot, cut where memories may begin to differ.

    Args:
        icae: the model.
        memory: of this model.
        prefix_ids: ids before the slots; may be empty.

    Returns:
        (S, d) embeddings of the ids, where there are any, and the (k, d) slots of each span, in the model's dtype.
    """
    pieces = [_embedded(icae, prefix_ids)] if len(prefix_ids) else []
    if memory.n_slots:
        pieces += memory.slots.to(device=icae.device, dtype=icae.dtype).split(memory.memory_size)
    return pieces


def _embedded(icae: ICAE, ids: Sequence[int]) -> torch.Tensor:
    return icae.tokens_to_embeddings(torch.tensor(list(ids), dtype=torch.int64)).detach()


class SlotKVMixin:
    """The part of `ICAE` that keeps what the decoder has read of memories, and hands it out."""

    slot_kv: SlotKVTree

    @property
    def kv_budget(self) -> int:
        """Bytes of slot KV that are kept for reading memories again, 1 GiB by default; 0 keeps nothing.

        A slot takes 2 * layers * Hkv * D elements: in bf16 23 KB for SmolLM2-135M, 128 KB for Mistral-7B, 512 KB for
        Llama-2-7B.

        Raises:
            InvalidInputError: set to something else than a whole number of at least 0.
        """
        return self.slot_kv.byte_budget

    @kv_budget.setter
    def kv_budget(self, n: int) -> None:
        self.slot_kv.byte_budget = n

    def clear_kv(self) -> None:
        """Let go of all slot KV: to free its memory, or after a write to base weights that no one could notice."""
        self.slot_kv.clear()

    @property
    def prefix_ids(self: ICAE) -> tuple[int, ...]:
        """Ids that `generate` puts before the slots, by the config's `prompt_format` and the tokenizer's template.

        Raises:
            TokenizerMismatchError: the chat template cannot be used.
        """
        return tuple(self._layout([])[0])

    def _prefix_of(self: ICAE, task: Task) -> tuple[int, ...]:
        return self.prefix_ids if task == "answer" else self.leading_ids

    @torch.no_grad()
    def memory_kv(self: ICAE, memory: Memory, task: Task = "answer") -> SlotKV:
        """The frozen decoder's keys and values of a memory's slots, to be kept and given to `adopt_kv` later.

        What of them is in `slot_kv` is copied, and the rest computed.

        Args:
            memory: of this model.
            task: `"answer"`: as `generate` reads them, behind `prefix_ids`; the others, behind `leading_ids`.

        Raises:
            InvalidInputError: another task, or a memory without slots or of another model.
            ContextTooLongError: the base model has no position left.
            NonFiniteError: keys or values hold NaN; the weight that is to blame is named.
        """
        self._check_memory(memory)
        _check_choice("task", task, Task)
        _check_has_slots(memory)
        prefix = self._prefix_of(task)
        _check_room(self, len(prefix) + memory.n_slots, 1)
        path = self.slot_kv.path(memory_pieces(self, memory, prefix))
        spans = path[len(path) - len(memory.span_lengths) :]
        kv = SlotKV(joined([s.keys for s in spans]), joined([s.values for s in spans]), prefix)
        if not kv.is_finite():
            raise NonFiniteError(self.describe_non_finite("the keys and values"))
        return kv

    @torch.no_grad()
    def adopt_kv(self: ICAE, memory: Memory, kv: SlotKV) -> bool:
        """Let whatever reads this memory behind `kv.prefix_ids` find its keys and values instead of computing them.

        The tensors are kept in `slot_kv`, span by span and without a copy, and must not be changed any more. That
        this model's weights gave them for this memory is the caller's word; `MemoryStore.get` has it from the file.

        Args:
            memory: of this model.
            kv: what `memory_kv` gave for it, in the model's dtype and on its device.

        Returns:
            False if prefix and slots together are larger than `kv_budget`: nothing is kept then, and what reads the
            memory computes them.

        Raises:
            InvalidInputError: keys and values of another shape, dtype or device, or a memory of another model.
        """
        self._check_memory(memory)
        _check_has_slots(memory)
        b = self.backbone
        check_kv(kv, b.n_layers, memory.n_slots, b.num_kv_heads)
        if kv.prefix_ids:
            self.vocabulary.check_context(torch.tensor(kv.prefix_ids), "the prefix of keys and values")
        k = memory.memory_size
        starts = range(kv.start, kv.start + memory.n_slots, k)
        spans = [KVSegment(*s) for s in zip(kv.keys.split(k, 1), kv.values.split(k, 1), starts, strict=True)]
        return self.slot_kv.adopt(memory_pieces(self, memory, kv.prefix_ids), spans)

    @torch.no_grad()
    def kv_cache(
        self, memory: Memory, task: Task = "answer", *, kind: CacheKind = "dynamic", max_cache_len: int | None = None,
        rows: int = 1,
    ) -> Cache:  # fmt: skip
        """A transformers cache in which the base model has read a memory; `generation_inputs` is the easier way.

        What follows are ordinary ids. `base_model(input_ids=ids, past_key_values=cache)` places them by itself;
        `base_model.generate` wants any ids for what is cached, and a mask over all of them:

            ids = tokenizer(question, return_tensors="pt").input_ids
            ids = torch.nn.functional.pad(ids, (int(cache.get_seq_length()), 0))
            out = base_model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
            answer = out[:, ids.shape[1] :]

        Given new ids or their embeddings alone, `generate` may drop some, move the rest, and say nothing. A cache
        serves one call: both append to it.

        Args:
            memory: of this model.
            task: what has been read: `"answer"`, the template's prefix, slots and FT; `"restore"`, slots and AE;
                `"continue"`, slots and LM; `"slots"`, slots alone; the last three behind `leading_ids`.
            kind: `"dynamic"` or `"static"`.
            max_cache_len: of a static cache, the most tokens that it can hold, the cached ones included.
            rows: how often the memory is in it, for batches and beams.

        Raises:
            InvalidInputError: another task or kind, no room in a static cache, or a memory of another model.
            ContextTooLongError: the base model has no position left.
        """
        self._check_memory(memory)
        _check_choice("task", task, Task)
        _check_choice("kind", kind, CacheKind)
        _check_positive(rows=rows)
        v = self.vocabulary
        prefix = self._prefix_of(task)
        last = {"answer": [v.ft], "restore": [v.ae], "continue": [v.lm], "slots": []}[task]
        pieces = memory_pieces(self, memory, prefix) + ([_embedded(self, last)] if last else [])
        _check_room(self, sum(map(len, pieces)), 1)
        path = self.slot_kv.path(pieces)
        if not path:
            raise InvalidInputError("the memory has no slots; compress a text of at least one token")
        return self._hf_cache([path] * rows, kind, max_cache_len)

    @torch.no_grad()
    def generation_inputs(
        self, memory: Memory, prompts: Context | Sequence[Context] | None = None, max_new_tokens: int = 128, *,
        cache: CacheKind = "dynamic", num_beams: int = 1, num_return_sequences: int = 1,
    ) -> dict[str, Any]:  # fmt: skip
        """Arguments with which `base_model.generate` answers prompts about a memory that it has read already.

            inputs = icae.generation_inputs(memory, questions, max_new_tokens=64)
            ids = icae.base_model.generate(**inputs, do_sample=True, top_p=0.9)
            answers = icae.tokenizer.batch_decode(ids, skip_special_tokens=True)

        `generate` gives the answers alone, prompts not included, and all that it offers works: sampling, beams,
        streamers, logits processors (which see the answer alone). Greedily, the ids are those of `icae.generate`, up
        to ties in rounding.

        Given embeddings and a cache, `generate` slices off as many embeddings as tokens are cached, and takes
        positions from the attention mask. So `inputs_embeds` and `attention_mask` here are of full length, zeros
        standing for what is cached. A row's cache and embeddings end where its prompt ends: of several prompts, the
        longer ones' beginnings are read into the cache, which is padded on the left, the one place where padding
        moves no sliding window.

        The result serves one call of `generate`, which appends to the cache.

        Args:
            memory: of this model.
            prompts: a text, a row of ids, or a list of those; None to restore the context, as `restore` does.
            max_new_tokens: the most tokens of an answer; handed on to `generate`.
            cache: `"dynamic"` or `"static"`, which compiled decoding wants.
            num_beams, num_return_sequences: handed on to `generate`, which needs as many rows in the cache.

        Returns:
            `inputs_embeds` (B, L, d), `attention_mask` (B, L) int64, `past_key_values`, `max_new_tokens`, and
            `num_beams` and `num_return_sequences` where they are not 1.

        Raises:
            InvalidInputError: no or an empty prompt, ids out of range, numbers below 1, a memory of another model.
            ContextTooLongError: slots, prompt and answer would pass the base model's positions.
            TokenizerMismatchError: text without a tokenizer.
        """
        self._check_memory(memory)
        _check_choice("cache", cache, CacheKind)
        options = {"num_beams": num_beams, "num_return_sequences": num_return_sequences}
        _check_positive(max_new_tokens=max_new_tokens, **options)
        restoring = (list(self.leading_ids), [self.vocabulary.ae])
        pairs = [restoring] if prompts is None else [self.prompt_ids(p) for p in as_list(prompts)]
        suffixes = [_embedded(self, suffix) for _, suffix in pairs]
        pieces = memory_pieces(self, memory, pairs[0][0])
        _check_room(self, sum(map(len, pieces)) + max(map(len, suffixes)), max_new_tokens)
        n_read = min(map(len, suffixes))  # by `generate`; the rest is cached
        paths = self.slot_kv.paths([pieces + ([s[:-n_read]] if len(s) > n_read else []) for s in suffixes])
        lengths = [sum(s.length for s in path) for path in paths]
        n_cached = max(lengths)
        embeddings = torch.stack([s[-n_read:] for s in suffixes])
        mask = torch.ones(len(paths), n_cached + n_read, dtype=torch.int64, device=self.device)
        for row, length in zip(mask, lengths, strict=True):
            row[: n_cached - length] = 0
        copies = max(num_beams, num_return_sequences)  # what `generate` multiplies its inputs by, the cache left out
        return {
            "inputs_embeds": torch.nn.functional.pad(embeddings, (0, 0, n_cached, 0)),
            "attention_mask": mask,
            "past_key_values": self._hf_cache(paths, cache, n_cached + n_read + max_new_tokens, copies),
            "max_new_tokens": max_new_tokens,
            **{name: n for name, n in options.items() if n > 1},
        }

    def _hf_cache(
        self, paths: Sequence[Sequence[KVSegment]], kind: CacheKind, max_cache_len: int | None, copies: int = 1
    ) -> Cache:
        from icae_fast.kv.transformers_caches import dynamic_cache, static_cache  # transformers takes seconds to import

        config = self.base_model.config
        if kind == "dynamic":
            return dynamic_cache(config, paths, copies)
        longest = max(sum(s.length for s in path) for path in paths)
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len <= longest:
            raise InvalidInputError(
                f"a static cache with max_cache_len={max_cache_len!r} has no room behind {longest} tokens; give a "
                "whole number that covers prompt and answer, too"
            )
        return static_cache(config, paths, max_cache_len, copies)


def _check_choice(what: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise InvalidInputError(f"{what} is {value!r}; it must be one of {', '.join(get_args(choices))}")


def _check_has_slots(memory: Memory) -> None:
    if not memory.n_slots:
        raise InvalidInputError("the memory has no slots; compress a text of at least one token")


def _check_positive(**numbers: Any) -> None:
    for name, n in numbers.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InvalidInputError(f"{name} is {n!r}; give a whole number of at least 1")


def _check_room(icae: ICAE, n_read: int, n_new: int) -> None:
    if n_read + n_new > icae.max_positions:
        raise ContextTooLongError(
            f"slots and prompt take {n_read} positions and {n_new} more are wanted, but the base model has "
            f"{icae.max_positions}; ask for fewer tokens, or set icae.max_positions higher if it extrapolates"
        )
