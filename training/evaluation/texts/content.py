"""Restoration by content: normal text, patterned random text, random words, random tokens.

An encoder that copies would restore all of them equally well; one that memorises by understanding restores best what it
knows.

Source: Ge et al., arXiv 2307.06945, section 3.2, where patterned random text is made by adding a constant to the token
ids of normal text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from icae_fast.core.tokens import added_tokens, encode_text
from icae_fast.training.evaluation.differences import side_by_side
from icae_fast.training.evaluation.measures import bleu_signature
from icae_fast.training.evaluation.result import Plot, Result
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.texts.passages import Excerpt
from icae_fast.training.evaluation.texts.restoration import RESTORATION_COLUMNS, restoration_row
from icae_fast.training.evaluation.workbench import Cases, Workbench

MAX_TOKENS = 512  # length of the paper's passages
SHIFT = 1  # the paper's constant
EXAMPLES, EXAMPLE_WORDS = 2, 80  # examples of each content, and words shown of each text

Content = Callable[[Subject, Sequence[Excerpt], int], list[Excerpt]]


def normal_text(subject: Subject, excerpts: Sequence[Excerpt], seed: int) -> list[Excerpt]:
    """Return the passages unchanged."""
    return list(excerpts)


def patterned_random(subject: Subject, excerpts: Sequence[Excerpt], seed: int) -> list[Excerpt]:
    """Replace each token by the one `SHIFT` places further in the vocabulary, skipping special tokens."""
    vocabulary = _ordinary_ids(subject)
    places = {token: i for i, token in enumerate(vocabulary)}

    def shifted(token: int) -> int:
        return vocabulary[(places[token] + SHIFT) % len(vocabulary)] if token in places else token

    return [replace(e, ids=[shifted(token) for token in e.ids]) for e in excerpts]


def random_words(subject: Subject, excerpts: Sequence[Excerpt], seed: int) -> list[Excerpt]:
    """Draw words of the passages by frequency, and tokenise them as text."""
    tokenizer = subject.icae.tokenizer
    words = [word for e in excerpts for word in tokenizer.decode(e.ids, skip_special_tokens=True).split()]
    made = []
    for i, e in enumerate(excerpts):
        text = " ".join(random.Random(f"words {seed} {i}").choices(words, k=len(e.ids)))  # a word is at least one token
        ids = encode_text(tokenizer, text, f"text {i} of random words", add_special_tokens=False)
        made.append(replace(e, ids=ids[: len(e.ids)], origin=f"random words {i}"))
    return made


def random_tokens(subject: Subject, excerpts: Sequence[Excerpt], seed: int) -> list[Excerpt]:
    """Draw tokens uniformly from the vocabulary without special tokens."""
    vocabulary = _ordinary_ids(subject)
    made = []
    for i, e in enumerate(excerpts):
        rng = random.Random(f"tokens {seed} {i}")
        made.append(replace(e, ids=rng.choices(vocabulary, k=len(e.ids)), origin=f"random tokens {i}"))
    return made


CONTENTS: dict[str, Content] = {
    "normal text": normal_text,
    "patterned random": patterned_random,
    "random words": random_words,
    "random tokens": random_tokens,
}


def restoration_by_content(
    subjects: Sequence[Subject],
    bench: Workbench,
    n_tokens: int | None = None,
    contents: Sequence[str] = tuple(CONTENTS),
) -> Result:
    """Measure the restoration of passages of one length by their content.

    Args:
        subjects: adapters to measure side by side.
        bench: draws the normal passages, from which the others are made.
        n_tokens: length of a passage, by default the shortest full span of the adapters, at most 512.
        contents: keys of `CONTENTS`.

    Raises:
        DataError: no text is long enough.
    """
    n = n_tokens or min(MAX_TOKENS, *(s.span_tokens for s in subjects))
    found, examples = Cases(), []
    for subject in subjects:
        with found.case(subject.name):
            excerpts = bench.draw(subject, n)
            for content in contents:
                row, samples = restoration_row(subject, CONTENTS[content](subject, excerpts, bench.seed), bench)
                found.add(row | {"content": content}, [{"content": content} | sample for sample in samples])
                examples += [(f"{subject.name}, {content}", s["original"], s["restored"]) for s in samples[:EXAMPLES]]
    found.check()
    return Result(
        "restoration_by_content",
        "Restoration by content",
        {"subject": "adapter and base model", "content": "content of the passages"} | RESTORATION_COLUMNS,
        found.rows,
        {"tokens": n, "shift": SHIFT, "bleu": bleu_signature(), "skipped": found.skipped},
        [
            "Patterned random text is normal text with each token id increased by one.",
            "Bars are medians; whiskers are quartiles.",
        ],
        [
            Plot("bar", "content", "bleu_median", "subject", "bleu_low", "bleu_high", y_label="BLEU", y_max=1),
            Plot("bar", "content", "loss", "subject", y_label="cross-entropy, nats per token"),
        ],
        found.samples,
        f"The first passages of each, with differing words in bold:\n\n{side_by_side(examples, EXAMPLE_WORDS)}",
        ("subject", "content", "bleu_median", "prefix_median", "accuracy", "loss"),
    )


def _ordinary_ids(subject: Subject) -> list[int]:
    """Return the tokenizer's ids without special ones, in ascending order."""
    tokenizer = subject.icae.tokenizer
    special = {*tokenizer.all_special_ids, *subject.icae.eos_token_ids}
    special |= {i for i, token in added_tokens(tokenizer).items() if token.special}
    return [i for i in range(len(tokenizer)) if i not in special]
