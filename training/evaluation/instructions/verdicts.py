"""Requests to a judge about two answers, and the parser of its replies."""

from __future__ import annotations

import re
from itertools import islice
from typing import Literal

from icae_fast.training.chat.replies import reply_text, shorten
from icae_fast.training.evaluation.instructions.questions import Question

Verdict = Literal["A", "B", "TIE"]
Outcome = Literal["win", "lose", "tie"]

_REQUEST = """\
Two readers, A and B, have answered a prompt about a text. Decide whose answer is better.

The text:

{text}

---

The prompt: {prompt}

---

Answer A: {a}

---

Answer B: {b}

---

Judge by the text and the prompt alone. The better answer does what the prompt asks for, and is right: it agrees with \
the text and makes nothing up. Where both do, or neither does, it is a tie. Which answer comes first, and which is \
longer, says nothing about its quality."""
_WITH_REASON = "\n\nGive your reason in one sentence. Then write a last line that is nothing but A, B or TIE."
_ONE_WORD = "\n\nReply with one word: A, B or TIE."

_WORD = re.compile(r"\w+")
_LABEL = re.compile(r"(the )?(final |better )?(verdict|decision|judge?ment|answer|choice)( is)?")  # of single blanks
_MOST_WORDS = 5  # the final verdict is tie
_VALUES: dict[Verdict, int] = {"A": 1, "B": -1, "TIE": 0}
_NAMED: dict[str, Verdict] = {verdict: verdict for verdict in _VALUES}


def judge_request(question: Question, a: str, b: str) -> str:
    """Return the message that requests a verdict on two answers.

    Args:
        question: the question.
        a, b: the answers in the order in which they are shown.
    """
    shown = _REQUEST.format(text=question.input, prompt=question.prompt, a=a or "(empty)", b=b or "(empty)")
    return shown + _WITH_REASON


def one_word_request(request: str) -> str:
    """Return the same request for only the verdict, for a judge whose reply held none; small models manage that."""
    return request.removesuffix(_WITH_REASON) + _ONE_WORD


def parse_verdict(reply: str) -> Verdict:
    """Return the verdict on a reply's last line, which may be formatted or labelled ("**B**", "Verdict: TIE").

    Raises:
        ValueError: there is none.
    """
    last = reply_text(reply).splitlines()[-1]
    words = [word.group().lower() for word in islice(_WORD.finditer(last), _MOST_WORDS + 1)]
    verdict = _NAMED.get(words[-1].upper()) if words else None
    label = " ".join(words[:-1])
    if verdict is None or (label and not _LABEL.fullmatch(label)):
        raise ValueError(f"the reply's last line is not A, B or TIE: {shorten(last)}")
    return verdict


def agree(shown_first: Verdict, shown_second: Verdict) -> bool:
    """Return whether the verdicts on two answers agree in both orders."""
    return _VALUES[shown_first] == -_VALUES[shown_second]


def outcome(shown_first: Verdict, shown_second: Verdict) -> Outcome:
    """Return the outcome for an answer from its two verdicts.

    Args:
        shown_first: the verdict with the answer shown as A.
        shown_second: the verdict with the answer shown as B.

    Returns:
        "win" or "lose" if both orders prefer the same answer, else "tie".
    """
    if shown_first == "TIE" or not agree(shown_first, shown_second):
        return "tie"
    return "win" if shown_first == "A" else "lose"
