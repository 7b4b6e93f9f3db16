"""Instruction data, a workbench and a judge for the tests of instruction evaluation."""

import re

from icae_fast.training.evaluation.instructions.questions import Question
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.texts.passages import Texts
from icae_fast.training.evaluation.workbench import NoCache, Workbench

TEXTS = [f"The cat {n} sat on the mat {n}, and wrote into the log that the lamp burned oil." for n in range(3)]
QUESTIONS = [
    Question(TEXTS[0], "Who sat?", "The cat 0.", "question", "rows:1"),
    Question(TEXTS[0], "Write a title.", "A cat on a mat with a log and a lamp", "title", "rows:2"),
    Question(TEXTS[1], "Who sat?", "cat 1", "question", "rows:3"),
    Question(TEXTS[2], "What burned?", "Oil, in the lamp of the keeper of the light", "question", "rows:4"),
]
SHOWN = re.compile(r"Answer A: (.*?)\n\n---\n\nAnswer B: (.*?)\n\n---\n", re.DOTALL)


def make_subject(make_icae, make_base, tokenizer, name="tiny", seed=0, **fields):
    """Return a subject with random adapter weights by `seed`, on a base model that does not depend on it."""
    base = make_base(vocab_size=320, max_position_embeddings=512)
    return Subject(name, make_icae(seed=seed, base=base, tokenizer=tokenizer, **fields))


def make_bench(folder, cache=None):
    """Return a workbench with a text that these tests do not use."""
    (folder / "text.txt").write_text("A text.")
    return Workbench(Texts([str(folder / "text.txt")]), NoCache() if cache is None else cache)


def longer_wins(message):
    """Return a judge's reply that explains itself and then prefers the longer answer."""
    a, b = SHOWN.search(message).groups()
    verdict = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "TIE"
    return f"Answer A has {len(a)} characters and B has {len(b)}.\n\n**{verdict}**"
