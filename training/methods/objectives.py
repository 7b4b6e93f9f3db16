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
from typing import Literal, Protocol, get_args

import torch
from torch.nn.utils.rnn import pad_sequence

from icae_fast import ICAE, ICAEConfig
from icae_fast.core.inputs import Vocabulary
from icae_fast.core.spans import count_spans, slots_per_span
from icae_fast.errors import InvalidInputError
from icae_fast.step.labels import IGNORE

MIN_TOKENS_FOR_LM = 64
LEAVE_TOKENS_FOR_LM = 8


Objective = Literal["ae", "lm", "ft"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class Layout(Protocol):
    """What decides how samples look: an `ICAE`, or a `icae_fast.training.data.samples.SampleLayout`, which has no
    weights.

    Attributes:
        config: gives the span rule and k.
        vocabulary: ids of memory and special tokens.
        eos_token_ids: the first of which ends what is learned.
        leading_ids: before the slots where no template stands.
    """

    config: ICAEConfig
    vocabulary: Vocabulary

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """See above."""

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """See above."""

    def prompt_ids(self, prompt: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids before and behind the slots when a prompt is asked."""


@dataclass(frozen=True)
class Sample:
    """One row for `ICAE.forward` and `ICAE.token_losses`.

    Args:
        input_ids: the context's ids.
        prompt_answer_ids: what the decoder reads, with a memory id for every slot.
        labels: as long as `prompt_answer_ids`, -100 where nothing is learned.
        objective: "ae" (autoencoding), "lm" (continuation) or "ft" (instruction).
        origin: where it comes from, for messages: "books.jsonl:17".
        own_tokens: as long as `prompt_answer_ids`, or empty: where the decoder reads what it would have guessed itself
            in place of the id that stands there; see `with_own_tokens`.
    """

    input_ids: list[int]
    prompt_answer_ids: list[int]
    labels: list[int]
    objective: Objective = "ae"
    origin: str = ""
    own_tokens: Sequence[bool] = ()

    @property
    def n_tokens(self) -> int:
        """Context and decoder tokens together, by which micro-batches are filled."""
        return len(self.input_ids) + len(self.prompt_answer_ids)

    @property
    def n_labels(self) -> int:
        """Tokens that carry a loss."""
        return sum(label != IGNORE for label in self.labels)


def _sample(icae: Layout, objective: Objective, context, before, after, answer, unscored=0) -> Sample:
    """`before, slots, after, answer`, with labels on the answer but for its first `unscored` tokens."""
    if not context or not answer:
        raise InvalidInputError("a training sample needs at least one context token and one token to learn")
    n_slots = count_spans(len(context), icae.config) * icae.config.memory_size
    prompt = [*before, *[icae.vocabulary.first_memory] * n_slots, *after]
    labels = [IGNORE] * (len(prompt) + unscored) + list(answer[unscored:])
    return Sample(list(context), prompt + list(answer), labels, objective)


def autoencoding_sample(icae: Layout, context: Sequence[int]) -> Sample:
    """`leading_ids + [slots, AE] + context + EOS`: the memory must give the context back."""
    return _sample(icae, "ae", context, icae.leading_ids, [icae.vocabulary.ae], [*context, icae.eos_token_ids[0]])


def continuation_sample(
    icae: Layout,
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    lm_token: bool = False,
    leave: int = LEAVE_TOKENS_FOR_LM,
) -> Sample:
    """`leading_ids + [slots] (+ LM) + continuation`, without EOS: the memory must tell what comes next.

    Args:
        icae: gives ids and span rule.
        context: ids to compress.
        continuation: ids that follow them.
        lm_token: put the LM token behind the slots.
        leave: tokens of the continuation that carry no loss, being hard to guess without any text before.
    """
    after = [icae.vocabulary.lm] * lm_token
    return _sample(icae, "lm", context, icae.leading_ids, after, continuation, min(leave, len(continuation)))


def instruction_sample(
    icae: Layout, context: Sequence[int], prompt: Sequence[int], answer: Sequence[int], *, ends: bool = True
) -> Sample:
    """Template, slots, FT, prompt, template, answer, EOS, by the config's prompt format.

    An answer that was cut off does not end (`ends=False`), and then no EOS is learned behind it.
    """
    before, after = icae.prompt_ids(list(prompt))
    return _sample(icae, "ft", context, before, after, [*answer, *([icae.eos_token_ids[0]] if ends else [])])


def with_wrong_tokens(sample: Sample, most: float, rng: random.Random) -> Sample:
    """The same sample, where the decoder reads some wrong tokens in what it has to restore; its labels stay.

    Teacher forcing never shows the decoder its own mistakes, and behind one of them it loses its place: with a tenth of
    what it read replaced, "smollm2-135m" had an accuracy of 0.75, and of 0.79 after training with wrong tokens. Samples
    of other objectives, and EOS, stay as they are.

    Args:
        sample: of any objective.
        most: each token is replaced with one probability, which the sample draws from 0 to this: in half of the cases
            by one of the three tokens before or behind it, else by any of the sample's.
        rng: drawn from for autoencoding samples alone.
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
    """The same sample, where the decoder may read its own guesses in what it has to restore; its labels stay.

    Free-running, the decoder reads what it wrote, and its own mistakes are others than those of `with_wrong_tokens`:
    behind a training with those "smollm2-135m" restored 32 held-out windows with a BLEU of 0.60, and of 0.64 after
    1,095 more steps with guesses in 45 % of them. Samples of other objectives, and EOS, stay as they are.

    Args:
        sample: of any objective.
        probability: that this sample reads guesses, each of its tokens then with a probability of 0.8.
        rng: drawn from for autoencoding samples alone.

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
    """Autoencoding or, with probability `lm_ratio`, continuation of a random window of a text.

    The window has `max_tokens` tokens, or fewer of a short text; continuation needs more than
    `min_for_lm` tokens behind the window and falls back to autoencoding the window otherwise.
    """
    rng = rng or random.Random()
    if not ids:
        raise InvalidInputError("a training text is empty; leave it out")
    wants_lm = rng.random() < lm_ratio
    start, end = draw_window(rng, len(ids), max_tokens, (0, len(ids)), wants_lm)
    rest = ids[end : end + max_tokens] if wants_lm else ()
    if len(rest) > min_for_lm:
        return continuation_sample(icae, ids[start:end], rest, lm_token=lm_token)
    return autoencoding_sample(icae, ids[start:end])


def draw_window(
    rng: random.Random, n_tokens: int, max_tokens: int, begins: tuple[int, int], wants_lm: bool
) -> tuple[int, int]:
    """A random window of a text.

    Args:
        rng: drawn from once.
        n_tokens: length of the text, at least 1.
        max_tokens: length of the window. A shorter text is the window, or a random beginning of it where something
            has to be left to go on with.
        begins: the window begins at one of the tokens `begins[0]` to `begins[1] - 1`, or before them where the text
            ends too soon.
        wants_lm: whether the text behind the window is needed.

    Returns:
        (first token, first token behind it).
    """
    if n_tokens <= max_tokens:
        return 0, rng.randint(1, n_tokens) if wants_lm else n_tokens
    last = n_tokens - max_tokens
    start = rng.randint(min(begins[0], last), min(begins[1] - 1, last))
    return start, start + max_tokens


def with_memory_size(icae: Layout, sample: Sample, memory_size: int) -> Sample:
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

    return replace(
        sample, prompt_answer_ids=kept(sample.prompt_answer_ids), labels=kept(sample.labels),
        own_tokens=kept(sample.own_tokens) or (),
    )  # fmt: skip


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
