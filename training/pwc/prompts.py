"""Prompts about a passage, and parsers of the teacher's replies.

Source of the kinds: Ge et al., arXiv 2307.06945, appendix C: ten prompts made for the text, half of them instructions
and half questions, and five general ones (rephrase, summary, title, keywords, continuation).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from icae_fast.training.chat.replies import encodable, reply_text, shorten

RESTATE, CONTINUE, QUESTION = "restate", "continue", "question"

# Each kind has several wordings, so that a student does not overfit on one.
KINDS: dict[str, tuple[str, ...]] = {
    RESTATE: (
        "Repeat the text above word for word.",
        "Restate the above text exactly as it is.",
        "Write out the text above again, without changing anything.",
    ),
    CONTINUE: (
        "Continue the text above.",
        "Write the paragraph that follows the above text.",
        "How does the text above go on?",
    ),
    "rephrase": (
        "Rephrase the text above.",
        "Say the same as the above text in other words.",
        "Rewrite the text above in your own words, keeping its meaning.",
    ),
    "summary": (
        "Summarize the text above.",
        "Give a short summary of the above text.",
        "What does the text above say, in a few sentences?",
    ),
    "title": (
        "Write a title for the text above.",
        "What would be a good title for the above text?",
        "Suggest a headline for the text above.",
    ),
    "keywords": (
        "Extract a few keywords from the text above.",
        "List the most important terms of the above text, separated by commas.",
        "Which keywords describe the text above?",
    ),
}
WITHOUT_TEACHER = (RESTATE, CONTINUE)  # the answer is part of the document, except at its end

_PASSAGE = "Text:\n\n{passage}\n\n---\n\n{task}"
_ANSWER = "{prompt}\nReply with the answer alone."
_QUESTIONS = (
    "Write {n} questions and instructions about the text above that test whether a reader has understood it, as "
    "different as possible (topic, genre, structure, style, tone, key facts, details), half of them instructions. Each "
    "must be answerable from the text alone.{known}\n"
)
_KNOWN = " Do not repeat any of these:\n{questions}\n"
_LIST = "Reply with a numbered list, one a line, and nothing else."
_PAIRS = (
    'Answer each of them, too. Reply with a JSON list and nothing else: [{{"prompt": "...", "answer": "..."}}, ...], '
    "{n} entries."
)

_NUMBERED = re.compile(  # of a stripped line: with blanks before it, two parts of \W and \s would share them out
    r"(?:[-*•]\s+|\W{0,2}(?:Q|Question|Prompt)?\s*\d{1,3}\s*[.):\]]\*{0,2}\s*(?=[^\d\s]))", re.IGNORECASE
)
_BRACKET = re.compile(r"[\[{]")
_MAX_QUESTION = 500  # characters; a longer line is not a prompt
_PROMPT_KEYS = ("prompt", "question", "instruction")
_ANSWER_KEYS = ("answer", "response", "output")


def wording(kind: str, key: str) -> str:
    """Return the wording of a kind of prompt for a passage's key: fixed per key, and uniform over the wordings."""
    return KINDS[kind][int(key, 16) % len(KINDS[kind])]


def answer_request(passage: str, prompt: str) -> str:
    """Return the message that requests an answer to a prompt about a passage."""
    return _PASSAGE.format(passage=passage, task=_ANSWER.format(prompt=prompt))


def questions_request(passage: str, n: int, known: Sequence[str], *, with_answers: bool) -> str:
    """Return the message that requests n prompts about a passage.

    Args:
        passage: the text.
        n: number of prompts.
        known: prompts that must not be repeated.
        with_answers: whether to request the answers too.
    """
    listed = _KNOWN.format(questions="\n".join(f"- {q}" for q in known)) if known else ""
    task = _QUESTIONS.format(n=n, known=listed) + (_PAIRS.format(n=n) if with_answers else _LIST)
    return _PASSAGE.format(passage=passage, task=task)


def parse_answer(reply: str, prompt: str = "") -> str:
    """Return the reply without a leading `<think>` block, stripped.

    Raises:
        ValueError: nothing is left, or only the prompt.
    """
    answer = reply_text(reply)
    if answer.casefold() == prompt.casefold():
        raise ValueError("the reply repeats the prompt")
    return answer


def parse_questions(reply: str, known: Sequence[str] = ()) -> list[str]:
    """Return the distinct new prompts that a reply lists, as numbered lines, bare lines, or JSON strings.

    If some lines are numbered, the others are ignored as remarks.

    Raises:
        ValueError: the reply lists no prompt.
    """
    reply = reply_text(reply)
    found = [value for value in _json_values(reply) if isinstance(value, str)]
    if not found:
        lines = [line.strip() for line in reply.splitlines() if line.strip()]
        numbered = [match for match in map(_NUMBERED.match, lines) if match]
        found = [m.string[m.end() :] for m in numbered] or [line for line in lines if not line.endswith(":")]
    questions = _new(((text, "") for text in found), known)
    if not questions:
        raise ValueError(f"the reply lists no prompt: {shorten(reply)}")
    return [question for question, _ in questions]


def parse_pairs(reply: str, known: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the new prompts with their answers from all complete JSON objects in a reply.

    Raises:
        ValueError: there is none.
    """
    reply = reply_text(reply)
    pairs = []
    for value in _json_values(reply):
        if isinstance(value, dict):
            prompt, answer = (
                next((value[k] for k in keys if k in value), None) for keys in (_PROMPT_KEYS, _ANSWER_KEYS)
            )
            if isinstance(prompt, str) and isinstance(answer, str) and answer.strip():
                pairs.append((prompt, encodable(answer).strip()))
    pairs = _new(pairs, known)
    if not pairs:
        raise ValueError(f"the reply holds no JSON object with a prompt and an answer: {shorten(reply)}")
    return pairs


def _new(pairs: Iterable[tuple[str, str]], known: Sequence[str]) -> list[tuple[str, str]]:
    seen, new = {question.casefold() for question in known}, []
    for text, answer in pairs:
        question = encodable(text).strip().strip("*").strip()
        if any(c.isalpha() for c in question) and len(question) <= _MAX_QUESTION and question.casefold() not in seen:
            seen.add(question.casefold())
            new.append((question, answer))
    return new


def _json_values(text: str) -> Iterator[Any]:
    """Yield the dicts, and the strings in lists, of all JSON in a text; of a truncated list, the complete entries."""
    decoder, start = json.JSONDecoder(strict=False), 0
    while (bracket := _BRACKET.search(text, start)) is not None:
        try:
            value, start = decoder.raw_decode(text, bracket.start())
        except ValueError:
            start = bracket.start() + 1
            continue
        except RecursionError:  # no list of prompts is nested so deeply, and every bracket of it would be tried again
            return
        yield from _walk(value)


def _walk(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list)):
            yield from _walk(item)
        elif isinstance(item, str) and isinstance(value, list):
            yield item
