"""Training samples of the three objectives, in the format of the reference.

Each function returns a `Sample` with memory ids in place of the slots. `pad_samples` makes a padded batch for
`ICAE.forward`, which ignores the padding; `icae_fast.training.methods.batch.pack` makes a packed one.

Source: Ge et al., arXiv 2307.06945, section 2.2; `pretrain_tokenize_function` and `instruct_ft_tokenize_function` in
getao/icae `code/icae_v2/training_utils.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch.nn.utils.rnn import pad_sequence

from icae_fast.config import ICAEConfig
from icae_fast.core.core import ICAECore
from icae_fast.core.inputs import Vocabulary
from icae_fast.core.spans import count_spans, slots_per_span
from icae_fast.errors import ConfigError, InvalidInputError
from icae_fast.step.labels import IGNORE

MIN_TOKENS_FOR_LM = 64
LEAVE_TOKENS_FOR_LM = 8


Objective = Literal["ae", "lm", "ft"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class Layout(Protocol):
    """The properties that determine samples: an `ICAE`, or an `icae_fast.training.data.samples.SampleLayout`.

    Attributes:
        config: span rule and k.
        vocabulary: ids of memory and special tokens.
        end_id: ends a target; None where the model has no EOS token.
        leading_ids: ids before the slots when there is no template.
    """

    config: ICAEConfig
    vocabulary: Vocabulary

    @property
    def end_id(self) -> int | None:
        """See `Layout`."""

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """See `Layout`."""

    def prompt_ids(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the ids before and after the slots for a prompt."""


@dataclass(frozen=True)
class Sample:
    """One row for `ICAE.forward` and `ICAE.token_losses`.

    Args:
        input_ids: ids of the context.
        prompt_answer_ids: ids that the decoder reads, with a memory id for each slot.
        labels: as long as `prompt_answer_ids`, -100 where nothing is learned.
        objective: "ae" (autoencoding), "lm" (continuation) or "ft" (instruction).
        origin: provenance, for messages: "books.jsonl:17".
        own_tokens: as long as `prompt_answer_ids`, or empty: True where the decoder reads its own guess instead of the
            id; see `with_own_tokens`.
    """

    input_ids: list[int]
    prompt_answer_ids: list[int]
    labels: list[int]
    objective: Objective = "ae"
    origin: str = ""
    own_tokens: Sequence[bool] = ()

    @property
    def n_tokens(self) -> int:
        """Context and decoder tokens, the cost of a sample in a micro-batch."""
        return len(self.input_ids) + len(self.prompt_answer_ids)

    @property
    def n_labels(self) -> int:
        """Labelled tokens."""
        return sum(label != IGNORE for label in self.labels)


def _sample(
    icae: Layout,
    objective: Objective,
    context: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    answer: Sequence[int],
    unscored: int = 0,
) -> Sample:
    """Return `before, slots, after, answer`, with labels on the answer except its first `unscored` tokens."""
    if not context or not answer:
        raise InvalidInputError("a training sample needs at least one context token and one token to learn")
    n_slots = count_spans(len(context), icae.config) * icae.config.memory_size
    prompt = [*before, *[icae.vocabulary.first_memory] * n_slots, *after]
    labels = [IGNORE] * (len(prompt) + unscored) + list(answer[unscored:])
    return Sample(list(context), prompt + list(answer), labels, objective)


def _end(icae: Layout) -> int:
    if icae.end_id is None:
        raise ConfigError("neither the base model nor its tokenizer has an EOS token, and training samples need one")
    return icae.end_id


def autoencoding_sample(icae: Layout, context: Sequence[int]) -> Sample:
    """Return `leading_ids + [slots, AE] + context + EOS`: the decoder restores the context."""
    return _sample(icae, "ae", context, icae.leading_ids, [icae.vocabulary.ae], [*context, _end(icae)])


def continuation_sample(
    icae: Layout,
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    lm_token: bool = False,
    leave: int = LEAVE_TOKENS_FOR_LM,
) -> Sample:
    """Return `leading_ids + [slots] (+ LM) + continuation`, without EOS: the decoder continues the text.

    Args:
        icae: layout of the sample.
        context: ids to compress.
        continuation: ids that follow them.
        lm_token: put the LM token after the slots.
        leave: first tokens of the continuation without a loss; they are hard to predict without preceding text.
    """
    after = [icae.vocabulary.lm] * lm_token
    return _sample(icae, "lm", context, icae.leading_ids, after, continuation, min(leave, len(continuation)))


def instruction_sample(
    icae: Layout, context: Sequence[int], prompt: Sequence[int], answer: Sequence[int], *, ends: bool = True
) -> Sample:
    """Return template, slots, FT, prompt, template, answer and EOS, by the config's prompt format.

    With `ends=False`, for a truncated answer, there is no EOS.
    """
    before, after = icae.prompt_ids(list(prompt))
    return _sample(icae, "ft", context, before, after, [*answer, *([_end(icae)] if ends else [])])


def with_wrong_tokens(sample: Sample, most: float, rng: random.Random) -> Sample:
    """Return the sample with some wrong tokens in the decoder's input of a text to restore; labels do not change.

    With teacher forcing the decoder never reads its own mistakes, and after one it loses its place: with a tenth of its
    input replaced, "smollm2-135m" had an accuracy of 0.75, and of 0.79 after training with wrong tokens. Samples of
    other objectives, and EOS, do not change.

    Args:
        sample: a sample of any objective.
        most: upper bound of the probability that a token is replaced; the sample's probability is drawn uniformly from
            0 to this. The replacement is with equal chance one of the three tokens before or after, or any of the
            sample's.
        rng: random generator, used only for autoencoding samples.
    """
    if sample.objective != "ae":
        return sample
    share, ids = rng.uniform(0.0, most), list(sample.prompt_answer_ids)
    first, end = len(ids) - sample.n_labels, len(ids) - 1
    text = ids[first:end]
    for i in range(len(text)):
        if rng.random() < share:
            near = min(max(i + rng.choice((-3, -2, -1, 1, 2, 3)), 0), len(text) - 1)
            ids[first + i] = text[near] if rng.random() < 0.5 else rng.choice(text)
    return replace(sample, prompt_answer_ids=ids)


OWN_TOKENS = 0.8


def with_own_tokens(sample: Sample, probability: float, rng: random.Random) -> Sample:
    """Return the sample with marks where the decoder reads its own guesses of a text to restore; labels do not change.

    In generation the decoder reads its own output, and its mistakes differ from those of `with_wrong_tokens`: after
    training with those "smollm2-135m" restored 32 held-out excerpts with a BLEU of 0.60, and of 0.64 after 1,095 more
    steps with guesses in 45 % of them. Samples of other objectives, and EOS, do not change.

    Args:
        sample: a sample of any objective.
        probability: probability that the sample has guesses; each of its tokens then is one with a probability of 0.8.
        rng: random generator, used only for autoencoding samples.

    Source: Bengio et al., arXiv 1506.03099 (scheduled sampling), here in two passes as in Mihaylova and Martins, arXiv
    1906.07651.
    """
    own = [False] * len(sample.prompt_answer_ids)
    if sample.objective == "ae" and rng.random() < probability:
        for i in range(len(own) - sample.n_labels, len(own) - 1):
            own[i] = rng.random() < OWN_TOKENS
    return replace(sample, own_tokens=own)


def pretraining_sample(
    icae: Layout,
    ids: Sequence[int],
    max_tokens: int,
    lm_ratio: float = 0.0,
    rng: random.Random | None = None,
    *,
    lm_token: bool = False,
    min_for_lm: int = MIN_TOKENS_FOR_LM,
) -> Sample:
    """Return an autoencoding or, with probability `lm_ratio`, a continuation sample of a random excerpt of a text.

    The excerpt has `max_tokens` tokens, or fewer of a short text. A continuation needs more than `min_for_lm` tokens
    after the excerpt; otherwise the excerpt is restored.
    """
    rng = rng or random.Random()
    if not ids:
        raise InvalidInputError("a training text is empty; remove it")
    wants_lm = rng.random() < lm_ratio
    start, end = draw_excerpt(rng, len(ids), max_tokens, (0, len(ids)), wants_lm)
    rest = ids[end : end + max_tokens] if wants_lm else ()
    if len(rest) > min_for_lm:
        return continuation_sample(icae, ids[start:end], rest, lm_token=lm_token)
    return autoencoding_sample(icae, ids[start:end])


def draw_excerpt(
    rng: random.Random, n_tokens: int, max_tokens: int, begins: tuple[int, int], wants_lm: bool
) -> tuple[int, int]:
    """Return a random excerpt of a text as (first token, token after the last).

    Args:
        rng: random generator, used once.
        n_tokens: length of the text, at least 1.
        max_tokens: length of the excerpt. Of a shorter text the excerpt is the whole, or with `wants_lm` a random
            beginning.
        begins: the excerpt begins at a token from `begins[0]` to `begins[1] - 1`, or earlier if the text ends too soon.
        wants_lm: whether text after the excerpt is needed.
    """
    if n_tokens <= max_tokens:
        return 0, rng.randint(1, n_tokens) if wants_lm else n_tokens
    last = n_tokens - max_tokens
    start = rng.randint(min(begins[0], last), min(begins[1] - 1, last))
    return start, start + max_tokens


def with_memory_size(icae: Layout, sample: Sample, memory_size: int) -> Sample:
    """Return the sample for a memory of the first `memory_size` slots per span, with fewer memory ids.

    Args:
        icae: layout of the sample.
        sample: a sample for all k slots per span.
        memory_size: k', from 1 to k; the context must be encoded with the same value (`ICAE.encode`).

    Raises:
        InvalidInputError: memory_size is not 1 to k, or the sample does not have k memory ids per span.
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

    def kept(row: Sequence[Any]) -> list[Any]:
        return [value for i, value in enumerate(row) if i not in dropped]

    return replace(
        sample, prompt_answer_ids=kept(sample.prompt_answer_ids), labels=kept(sample.labels),
        own_tokens=kept(sample.own_tokens) or (),
    )  # fmt: skip


def pad_samples(icae: ICAECore, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Return right-padded `input_ids`, `prompt_answer_ids` ([PAD] id) and `labels` (-100), each (B, longest) int64."""

    def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)

    pad_id = icae.vocabulary.pad
    return {
        "input_ids": pad([s.input_ids for s in samples], pad_id),
        "prompt_answer_ids": pad([s.prompt_answer_ids for s in samples], pad_id),
        "labels": pad([s.labels for s in samples], IGNORE),
    }
