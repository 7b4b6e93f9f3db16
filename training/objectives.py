"""Training samples of the three objectives, as the reference builds them.

Each function gives a `Sample` whose memory ids stand where the slots will be; `collate` pads a list of them
for `ICAE.forward`, which ignores the padding.

Source: Ge et al., arXiv 2307.06945, section 2.2; `pretrain_tokenize_function` and
`instruct_ft_tokenize_function` in getao/icae `code/icae_v2/training_utils.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch.nn.utils.rnn import pad_sequence

from icae_fast import ICAE
from icae_fast.errors import InvalidInputError
from icae_fast.loss import IGNORE
from icae_fast.spans import count_spans, slots_per_span

MIN_TOKENS_FOR_LM = 64
LEAVE_TOKENS_FOR_LM = 8


Objective = Literal["ae", "lm", "ft"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True)
class Sample:
    """One row for `ICAE.forward` and `ICAE.token_losses`.

    Args:
        input_ids: the context's ids.
        prompt_answer_ids: what the decoder reads, with a memory id for every slot.
        labels: as long as `prompt_answer_ids`, -100 where nothing is learned.
        objective: "ae" (autoencoding), "lm" (continuation) or "ft" (instruction).
        origin: where it comes from, for messages: "books.jsonl:17".
    """

    input_ids: list[int]
    prompt_answer_ids: list[int]
    labels: list[int]
    objective: Objective = "ae"
    origin: str = ""

    @property
    def n_tokens(self) -> int:
        """Context and decoder tokens together, by which micro-batches are filled."""
        return len(self.input_ids) + len(self.prompt_answer_ids)

    @property
    def n_labels(self) -> int:
        """Tokens that carry a loss."""
        return sum(label != IGNORE for label in self.labels)


def _sample(icae: ICAE, objective: Objective, context, before, after, answer, unscored=0) -> Sample:
    """`before, slots, after, answer`, with labels on the answer but for its first `unscored` tokens."""
    if not context or not answer:
        raise InvalidInputError("a training sample needs at least one context token and one token to learn")
    n_slots = count_spans(len(context), icae.config) * icae.config.memory_size
    prompt = [*before, *[icae.vocabulary.first_memory] * n_slots, *after]
    labels = [IGNORE] * (len(prompt) + unscored) + list(answer[unscored:])
    return Sample(list(context), prompt + list(answer), labels, objective)


def autoencoding_sample(icae: ICAE, context: Sequence[int]) -> Sample:
    """`[slots, AE] + context + EOS`: the memory must give the context back."""
    return _sample(icae, "ae", context, [], [icae.vocabulary.ae], [*context, icae.eos_token_ids[0]])


def continuation_sample(
    icae: ICAE,
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    lm_token: bool = False,
    leave: int = LEAVE_TOKENS_FOR_LM,
) -> Sample:
    """`[slots] (+ LM) + continuation`, without EOS: the memory must tell what comes next.

    Args:
        icae: gives ids and span rule.
        context: ids to compress.
        continuation: ids that follow them.
        lm_token: put the LM token behind the slots.
        leave: tokens of the continuation that carry no loss, being hard to guess without any text before.
    """
    after = [icae.vocabulary.lm] * lm_token
    return _sample(icae, "lm", context, [], after, continuation, min(leave, len(continuation)))


def instruction_sample(icae: ICAE, context: Sequence[int], prompt: Sequence[int], answer: Sequence[int]) -> Sample:
    """Template, slots, FT, prompt, template, answer, EOS, by the config's prompt format."""
    before, after = icae.prompt_ids(list(prompt))
    return _sample(icae, "ft", context, before, after, [*answer, icae.eos_token_ids[0]])


def pretraining_sample(
    icae: ICAE,
    ids: Sequence[int],
    max_tokens: int,
    lm_ratio: float = 0.0,
    rng: random.Random | None = None,
    *,
    lm_token: bool = False,
    min_for_lm: int = MIN_TOKENS_FOR_LM,
) -> Sample:
    """Autoencoding or, with probability `lm_ratio`, continuation of a random window of a text.

    The window has `max_tokens` tokens, or fewer of a short text; continuation needs more than
    `min_for_lm` tokens behind the window and falls back to autoencoding the window otherwise.
    """
    rng = rng or random.Random()
    if not ids:
        raise InvalidInputError("a training text is empty; leave it out")
    wants_lm = rng.random() < lm_ratio
    if len(ids) > max_tokens:
        start = rng.randint(0, len(ids) - max_tokens)
        end = start + max_tokens
    else:
        start, end = 0, rng.randint(1, len(ids)) if wants_lm else len(ids)
    rest = ids[end : end + max_tokens] if wants_lm else ()
    if len(rest) > min_for_lm:
        return continuation_sample(icae, ids[start:end], rest, lm_token=lm_token)
    return autoencoding_sample(icae, ids[start:end])


def with_memory_size(icae: ICAE, sample: Sample, memory_size: int) -> Sample:
    """The same sample for a memory of the first `memory_size` slots a span: fewer memory ids in what the decoder reads.

    Args:
        icae: gives ids and span rule.
        sample: made for all k slots a span.
        memory_size: k', from 1 to k; the context has to be encoded with it, too (`ICAE.encode`).

    Raises:
        InvalidInputError: memory_size is not 1 to k, or the sample has not k memory ids a span.
    """
    keep = slots_per_span(icae.config, memory_size)
    n_spans = count_spans(len(sample.input_ids), icae.config)
    first, end = icae.vocabulary.first_memory, icae.vocabulary.ae
    positions = [i for i, token in enumerate(sample.prompt_answer_ids) if first <= token < end]
    if len(positions) != n_spans * icae.config.memory_size:
        raise InvalidInputError(
            f"{sample.origin or 'a sample'} has {len(positions)} memory ids; its {n_spans} spans of "
            f"{icae.config.memory_size} slots need {n_spans * icae.config.memory_size}"
        )
    dropped = set(positions[n_spans * keep :])

    def kept(row):
        return [value for i, value in enumerate(row) if i not in dropped]

    return replace(sample, prompt_answer_ids=kept(sample.prompt_answer_ids), labels=kept(sample.labels))


def collate(icae: ICAE, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `prompt_answer_ids` ([PAD] id) and `labels` (-100), each (B, longest) int64."""

    def pad(rows, value):
        return pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)

    pad_id = icae.vocabulary.pad
    return {
        "input_ids": pad([s.input_ids for s in samples], pad_id),
        "prompt_answer_ids": pad([s.prompt_answer_ids for s in samples], pad_id),
        "labels": pad([s.labels for s in samples], IGNORE),
    }
