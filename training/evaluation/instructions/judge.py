"""Pairwise judging: a chat model decides which of two answers is better, in both orders.

Source of the protocol: Ge et al., arXiv 2307.06945, section 3.3 (GPT-4 judges; on par = win + tie).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from icae_fast.errors import InvalidInputError
from icae_fast.training.chat.asking import GIVE_UP_AFTER, Asker, GaveUp, work
from icae_fast.training.chat.model import CUT_OFF, UNUSABLE, ChatModel, NoRetry, RequestFailed
from icae_fast.training.chat.replies import reply_text
from icae_fast.training.evaluation.instructions.answering import Answered
from icae_fast.training.evaluation.instructions.contestants import Contestant
from icae_fast.training.evaluation.instructions.verdicts import (
    Verdict,
    agree,
    judge_request,
    one_word_request,
    outcome,
    parse_verdict,
)
from icae_fast.training.evaluation.result import Plot, Result
from icae_fast.training.evaluation.workbench import Workbench

SAME, UNPARSED, FAILED, NOT_ASKED = "same", "unparsed", "failed", "not asked"
NO_VERDICT = (UNUSABLE, CUT_OFF)  # failures after which only the verdict is requested

COLUMNS = {
    "contestant": "the contestant whose answers are judged",
    "opponent": "the contestant that it is compared with",
    "pairs": "questions that both have answered",
    "judged": "pairs with a result: verdicts in both orders, or identical answers",
    "win": "pairs in which both orders prefer the contestant",
    "lose": "pairs in which both orders prefer the opponent",
    "tie": "the other judged pairs: a tie in one order or both, or a preference that changes with the order",
    "on_par": "share of judged pairs that are a win or a tie",
    "consistent": "share of pairs whose two verdicts agree; if it is low, ties mean nothing",
    "same": "ties that are identical answers, which the judge is not asked about",
    "unparsed": "pairs without a result because a reply held no verdict, even after a second request",
    "failed": "pairs without a result because a request failed",
    "not_asked": "pairs without a result because judging had stopped",
}

Pair = tuple[Contestant, Contestant]


def default_pairs(contestants: Sequence[Contestant]) -> list[Pair]:
    """Return the default pairs.

    They are every subject's slots against its base model on text, and the first subject's slots against the slots of
    every other subject.
    """
    slots = [c for c in contestants if c.reads == "slots"]
    text = [c for c in contestants if c.reads != "slots"]
    pairs = [(a, b) for a in slots for b in text if Contestant(a.subject, b.reads).identity == b.identity]
    return pairs + [(slots[0], other) for other in slots[1:]]


@dataclass
class _Duel:
    """Two answers to one question, with the verdicts in both orders."""

    pair: Pair
    index: int
    requests: tuple[str, str]
    same: bool
    verdicts: list[Verdict | None] = field(default_factory=lambda: [None, None])
    failures: list[RequestFailed] = field(default_factory=list)

    @property
    def consistent(self) -> bool | None:
        """Whether the verdicts of both orders agree, None unless there are two."""
        first, second = self.verdicts
        return None if first is None or second is None else agree(first, second)

    @property
    def result(self) -> str:
        """win, lose or tie, or the reason for having no result."""
        if self.same:
            return SAME
        first, second = self.verdicts
        if first is not None and second is not None:
            return outcome(first, second)
        if not self.failures:
            return NOT_ASKED
        return UNPARSED if all(f.cause in NO_VERDICT for f in self.failures) else FAILED


Place = tuple[_Duel, int]  # a duel, and the order in which its answers are shown


class _Judging:
    """One call of `judge_pairs`."""

    def __init__(self, duels: list[_Duel], judge: ChatModel, bench: Workbench, give_up_after: int) -> None:
        self.duels, self.judge, self.bench = duels, judge, bench
        self.asker = Asker(judge, give_up_after)
        self.failures: Counter[str] = Counter()
        self.asked = self.known = self.asked_for_one_word = 0
        self.stopped: str | None = None

    def run(self) -> None:
        wanted: dict[str, list[Place]] = defaultdict(list)  # by request, since several pairs may share one
        for duel in self.duels:
            for order in () if duel.same else (0, 1):
                wanted[duel.requests[order]].append((duel, order))
        missing = {}
        for request, places in wanted.items():
            kept = self.bench.cache.get(self._key(request))
            if kept is None:
                missing[request] = places
            else:
                self._settle(places, kept["verdict"])
        self.known = len(wanted) - len(missing)
        if not missing:
            return
        try:
            asyncio.run(work((self._ask(r, p, len(wanted)) for r, p in missing.items()), self.judge))
        except GaveUp as error:
            self.stopped = str(error)

    async def _ask(self, request: str, places: Sequence[Place], of: int) -> None:
        """Request a verdict; if the reply holds none, request only the verdict."""
        try:
            try:
                verdict, reply = await self.asker.ask(request, _verdict_of)
            except RequestFailed as error:
                if error.cause not in NO_VERDICT:
                    raise
                self.asked_for_one_word += 1
                verdict, reply = await self.asker.ask(one_word_request(request), _verdict_of)
        except RequestFailed as error:
            self.failures[error.cause] += 1
            for duel, _ in places:
                duel.failures.append(error)
        else:
            self.bench.cache.put(self._key(request), {"verdict": verdict, "reply": reply})
            self._settle(places, verdict)
        self.asked += 1
        self.bench.on_progress("judging", self.known + self.asked, of)

    @staticmethod
    def _settle(places: Sequence[Place], verdict: Verdict) -> None:
        for duel, order in places:
            duel.verdicts[order] = verdict

    def _key(self, request: str) -> str:
        made_by = [self.judge.name, self.judge.settings, request]
        return hashlib.sha256(json.dumps(["verdict", *made_by], sort_keys=True).encode()).hexdigest()

    @property
    def unfinished(self) -> str:
        """A sentence about pairs without a result, and why judging stopped; empty if all have one."""
        missing = sum(d.result in (UNPARSED, FAILED, NOT_ASKED) for d in self.duels)
        if not missing:
            return ""
        stopped = f" Judging stopped: {self.stopped}." if self.stopped else ""
        return f"{missing} of {len(self.duels)} pairs have no result and are in no figure; run it again.{stopped}"

    def facts(self) -> dict[str, Any]:
        """Return the judge, the verdicts and the counts of requests as JSON values."""
        return {
            "judge": {"name": self.judge.name, "settings": self.judge.settings},
            "verdicts": dict(Counter(v for d in self.duels for v in d.verdicts if v is not None)),
            "asked": self.asked,
            "from_cache": self.known,
            "asked_for_one_word": self.asked_for_one_word,
            "retried": dict(self.judge.retries),
            "failed": dict(self.failures),
            "stopped": self.stopped,
        }


def judge_pairs(
    answered: Answered,
    judge: ChatModel,
    bench: Workbench,
    pairs: Sequence[Pair] | None = None,
    give_up_after: int = GIVE_UP_AFTER,
) -> Result:
    """Let a judge compare the answers of pairs of contestants, question by question, in both orders.

    A pair is won if both orders prefer the same answer, and tied otherwise. After a reply without a verdict, only the
    verdict is requested. Pairs that still have none, and failed requests, are counted and not scored. Verdicts are
    cached as they arrive, so another run requests only the missing ones.

    Args:
        answered: see `answer_all`.
        judge: the chat model.
        bench: caches verdicts.
        pairs: pairs of contestants, by default `default_pairs`.
        give_up_after: failed requests in a row after which judging stops.

    Raises:
        InvalidInputError: there is no pair.
        ChatModelError: the judge cannot answer at all; earlier verdicts are kept.
    """
    pairs = default_pairs(list(answered.answers)) if pairs is None else list(pairs)
    if not pairs:
        raise InvalidInputError("there is no pair of answers to compare; add contestants or another adapter")
    duels = [_duel(answered, pair, i) for pair in pairs for i in range(len(answered.questions))]
    judging = _Judging(duels, judge, bench, give_up_after)
    judging.run()
    rows = [_row(pair, [d for d in duels if d.pair is pair]) for pair in pairs]
    return Result(
        name="instructions_judged",
        title=f"Instructions: pairs of answers, judged by {judge.name}",
        columns=COLUMNS,
        rows=rows,
        facts=answered.facts() | judging.facts(),
        notes=_notes(judging),
        plots=[
            Plot("bar", "opponent", "on_par", "contestant", y_max=1.0, y_label="on par (win or tie), share"),
            Plot("bar", "opponent", "consistent", "contestant", y_max=1.0, y_label="alike in both orders, share"),
        ],
        samples=[_sample(answered, duel) for duel in duels],
        headline=("contestant", "opponent", "judged", "win", "lose", "tie", "on_par", "consistent"),
        unfinished=judging.unfinished,
    )


def _verdict_of(reply: str) -> tuple[Verdict, str]:
    try:
        return parse_verdict(reply), reply_text(reply)
    except ValueError as error:
        raise NoRetry(str(error)) from error  # the shorter question is better than the same one again


def _duel(answered: Answered, pair: Pair, i: int) -> _Duel:
    ours, theirs = (answered.answers[c][i].text for c in pair)
    question = answered.questions[i]
    requests = judge_request(question, ours, theirs), judge_request(question, theirs, ours)
    return _Duel(pair, i, requests, ours == theirs)


def _row(pair: Pair, duels: Sequence[_Duel]) -> dict[str, Any]:
    count = Counter(duel.result for duel in duels)
    tie = count["tie"] + count[SAME]
    judged = count["win"] + count["lose"] + tie
    agreements = [d.consistent for d in duels if d.consistent is not None]
    return {
        "contestant": pair[0].name,
        "opponent": pair[1].name,
        "pairs": len(duels),
        "judged": judged,
        "win": count["win"],
        "lose": count["lose"],
        "tie": tie,
        "on_par": (count["win"] + tie) / judged if judged else None,
        "consistent": sum(agreements) / len(agreements) if agreements else None,
        "same": count[SAME],
        "unparsed": count[UNPARSED],
        "failed": count[FAILED],
        "not_asked": count[NOT_ASKED],
    }


def _notes(judging: _Judging) -> list[str]:
    notes = ["Every pair is judged twice, with the order of the answers swapped; on par = win + tie."]
    verdicts = Counter(v for d in judging.duels for v in d.verdicts if v is not None)
    if verdicts:
        shares = ", ".join(f"{name} {verdicts[name] / verdicts.total():.0%}" for name in ("A", "B", "TIE"))
        notes.append(f"Verdicts by position (A is shown first): {shares}. An unbiased judge prefers A and B equally.")
    agreements = [d.consistent for d in judging.duels if d.consistent is not None]
    if agreements and 2 * sum(agreements) < len(agreements):
        notes.append(
            f"The judge contradicts itself in {agreements.count(False)} of {len(agreements)} pairs when their order is "
            "swapped: on par here says more about the judge than about the answers; use a stronger judge."
        )
    return notes


def _sample(answered: Answered, duel: _Duel) -> dict[str, Any]:
    question = answered.questions[duel.index]
    return {
        "origin": question.origin, "prompt": question.prompt, "contestant": duel.pair[0].name,
        "opponent": duel.pair[1].name, "answer": answered.answers[duel.pair[0]][duel.index].text,
        "opponent_answer": answered.answers[duel.pair[1]][duel.index].text, "verdict_shown_first": duel.verdicts[0],
        "verdict_shown_second": duel.verdicts[1], "result": duel.result,
        "failures": [f"{f.cause}: {f}" for f in duel.failures],
    }  # fmt: skip
