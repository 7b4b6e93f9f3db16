"""What a judge is asked about two answers, and how its replies are read."""

from __future__ import annotations

import re
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

_LABEL = r"(?:(?:the )?(?:final |better )?(?:verdict|decision|judg(?:e)?ment|answer|choice)(?: is)?\s*:?\s*)?"
_VERDICT = re.compile(rf"[^\w]*{_LABEL}[^\w]*(a|b|tie)[^\w]*", re.IGNORECASE)
_VALUES = {"A": 1, "B": -1, "TIE": 0}


def judge_request(question: Question, a: str, b: str) -> str:
    """The message that asks which of two answers is better, in the order in which they are to be shown."""
    shown = _REQUEST.format(text=question.input, prompt=question.prompt, a=a or "(empty)", b=b or "(empty)")
    return shown + _WITH_REASON


def one_word_request(request: str) -> str:
    """The same request for nothing but the verdict, for a judge whose reply had none; small models can do that."""
    return request.removesuffix(_WITH_REASON) + _ONE_WORD


def parse_verdict(reply: str) -> Verdict:
    """The verdict on the last line of a reply, which may be marked or labelled ("**B**", "Verdict: TIE").

    Raises:
        ValueError: there is none.
    """
    last = reply_text(reply).splitlines()[-1]
    found = _VERDICT.fullmatch(last)
    if found is None:
        raise ValueError(f"the reply's last line is not A, B or TIE: {shorten(last)}")
    return found[1].upper()


def agree(shown_first: Verdict, shown_second: Verdict) -> bool:
    """Whether two verdicts on the same two answers, in one order and in the other, mean the same."""
    return _VALUES[shown_first] == -_VALUES[shown_second]


def outcome(shown_first: Verdict, shown_second: Verdict) -> Outcome:
    """What two verdicts on the same two answers mean for the first of them.

    Args:
        shown_first: where it was shown as A.
        shown_second: where it was shown as B.

    Returns:
        "win" or "lose" where both orders prefer the same answer, else "tie".
    """
    if shown_first == "TIE" or not agree(shown_first, shown_second):
        return "tie"
    return "win" if shown_first == "A" else "lose"
