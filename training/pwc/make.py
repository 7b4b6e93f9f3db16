"""Make the records of all passages with a teacher."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icae_fast.errors import InvalidInputError
from icae_fast.training.chat.asking import GIVE_UP_AFTER, Asker, GaveUp, work
from icae_fast.training.chat.model import ChatModel, RequestFailed
from icae_fast.training.data.records import TEXT_FIELD
from icae_fast.training.pwc import prompts
from icae_fast.training.pwc.passages import Passage, count_words, read_documents, split
from icae_fast.training.pwc.prompts import CONTINUE, KINDS, QUESTION, RESTATE
from icae_fast.training.pwc.records import RecordFile

BAD_ROW, TOO_FEW = "bad row", "too few questions"
TEXT_ITSELF = "text"  # the `teacher` of answers that are part of the document


@dataclass(frozen=True)
class Settings:
    """The passages to make and the prompts to ask about them.

    Args:
        kinds: keys of `icae_fast.training.pwc.prompts.KINDS`; each is asked once per passage.
        questions: prompts per passage that the teacher invents and answers.
        at_once: request those prompts with their answers in one JSON reply, instead of a list of prompts and then an
            answer to each. It is cheaper, and needs a strong teacher.
        max_tokens: longest passage, in units of `count`.
        min_tokens: shortest passage; shorter ones are left out.
        count: returns the tokens or words of a text.
        text_field: field or column of the text, in files that have rows.
        give_up_after: failed requests in a row after which the run stops.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    questions: int = 10
    at_once: bool = False
    max_tokens: int = 512
    min_tokens: int = 16
    count: Callable[[str], int] = count_words
    text_field: str = TEXT_FIELD
    give_up_after: int = GIVE_UP_AFTER

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise InvalidInputError(f"there is no kind of prompt {unknown[0]!r}; choose among {', '.join(KINDS)}")
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise InvalidInputError(
                f"passages of {self.min_tokens} to {self.max_tokens} tokens cannot be cut; use 0 <= min <= max"
            )
        if self.questions < 0 or not (self.kinds or self.questions):
            raise InvalidInputError("nothing is asked; give at least one kind of prompt or one question")

    @property
    def needs_teacher(self) -> bool:
        """Whether any prompt has an answer that is not part of the texts."""
        return self.questions > 0 or any(kind not in prompts.WITHOUT_TEACHER for kind in self.kinds)


@dataclass
class Report:
    """The counts of a run.

    Args:
        written: new records by kind.
        resumed: records that the file already held.
        failed: records that could not be made, and bad rows of the input, by cause.
        skipped: passages left out, by cause: too short, or equal to an earlier one.
        retried: retried requests by cause.
        stopped: why the run ended early, or None.
    """

    written: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)
    stopped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        named = {name: dict(getattr(self, name)) for name in ("written", "failed", "skipped", "retried")}
        return named | {"resumed": self.resumed, "stopped": self.stopped}


def make_pwc(
    texts: Sequence[str | Path],
    records: RecordFile,
    teacher: ChatModel | None,
    settings: Settings = Settings(),
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_failure: Callable[[str], None] | None = None,
) -> Report:
    """Append `{"input": passage, "prompt", "answer"}` records for every passage of the texts.

    A record's id is the hash of its passage with the kind of prompt, so records that the file already holds are neither
    requested nor written again. The texts are read twice, first to count the work.

    Args:
        texts: files and folders; see `read_documents`.
        records: the open output file.
        teacher: the chat model that answers; may be None if `settings.needs_teacher` is False.
        settings: what to ask.
        on_progress: called with (records done or failed, records to do).
        on_failure: called with a sentence for each failure, which names the text's origin.

    Raises:
        DataError: a text cannot be read.
        InvalidInputError: no passage is left, or a teacher is needed.
        ChatModelError: the teacher cannot answer at all; earlier records are kept.
        OutputError: see `RecordFile.append`.
    """
    if settings.needs_teacher and teacher is None:
        raise InvalidInputError("these prompts need a teacher; give an endpoint or a local model")
    return _Run(texts, records, teacher, settings, on_progress, on_failure).run()


class _Run:
    """One call of `make_pwc`."""

    def __init__(
        self,
        texts: Sequence[str | Path],
        records: RecordFile,
        teacher: ChatModel | None,
        settings: Settings,
        on_progress: Callable[[int, int], None] | None,
        on_failure: Callable[[str], None] | None,
    ) -> None:
        self.texts, self.records, self.teacher, self.settings = texts, records, teacher, settings
        self.on_progress = on_progress or (lambda done, total: None)
        self.on_failure = on_failure or (lambda message: None)
        self.report = Report()
        self._teacher_name = "" if teacher is None else teacher.name
        self.asker = None if teacher is None else Asker(teacher, settings.give_up_after)
        self.done = self.total = 0

    def run(self) -> Report:
        found = 0
        for passage in self._passages(Report(), lambda message: None):
            found += 1
            wanted = self._wanted_kinds(passage)
            self.total += self._missing_questions(passage) + len(wanted)
            asked = sum(kind != CONTINUE or self._has_continuation(passage) for kind in self.settings.kinds)
            self.report.resumed += asked - len(wanted)
            self.report.resumed += self.settings.questions - self._missing_questions(passage)
        try:
            asyncio.run(work(self._jobs(), self.teacher))
        except GaveUp as error:
            self.report.stopped = str(error)
        if not found:
            raise InvalidInputError(
                f"the texts hold no passage of at least {self.settings.min_tokens} tokens or words; check the paths "
                "or lower --min-tokens"
            )
        if self.teacher is not None:
            self.report.retried += self.teacher.retries
        return self.report

    def _jobs(self) -> Iterator[Coroutine[Any, Any, None]]:
        for passage in self._passages(self.report, self._bad_row):
            for kind in self._wanted_kinds(passage):
                yield self._make(passage, kind)
            if self._missing_questions(passage):
                yield self._make_questions(passage)

    def _passages(self, report: Report, on_bad_row: Callable[[str], None]) -> Iterator[Passage]:
        seen = set()
        for document in read_documents(
            self.texts, on_bad_row, exclude=self.records.path, text_field=self.settings.text_field
        ):
            for passage in split(document, self.settings.max_tokens, self.settings.count):
                if passage.size < self.settings.min_tokens:
                    report.skipped["too short"] += 1
                elif passage.key in seen:
                    report.skipped["seen before"] += 1
                else:
                    seen.add(passage.key)
                    yield passage

    def _has_continuation(self, passage: Passage) -> bool:
        return bool(passage.following) or self.teacher is not None

    def _wanted_kinds(self, passage: Passage) -> list[str]:
        """Return the kinds whose record is missing; only a teacher can continue a document's last passage."""
        kinds = [kind for kind in self.settings.kinds if f"{passage.key}-{kind}" not in self.records.ids]
        return [kind for kind in kinds if kind != CONTINUE or self._has_continuation(passage)]

    def _missing_questions(self, passage: Passage) -> int:
        return max(0, self.settings.questions - len(self.records.questions(passage.key)))

    async def _make(self, passage: Passage, kind: str) -> None:
        prompt = prompts.wording(kind, passage.key)
        known = {RESTATE: passage.text, CONTINUE: passage.following}.get(kind)
        if known:
            self._write(passage, kind, prompt, known, TEXT_ITSELF)
        else:
            await self._answer(passage, kind, prompt)

    async def _make_questions(self, passage: Passage) -> None:
        """Request a list of prompts and then the answer to each, or with `at_once` both in one reply."""
        at_once = self.settings.at_once
        parse: Callable[..., list[Any]] = prompts.parse_pairs if at_once else prompts.parse_questions
        known, missing = self.records.questions(passage.key), self._missing_questions(passage)
        request = prompts.questions_request(passage.text, missing, known, with_answers=at_once)
        reply = await self._ask(passage, QUESTION, request, lambda r: parse(r, known), missing)
        if reply is None:
            return
        for item in reply[:missing]:
            if at_once:
                prompt, answer = item
                self._write(passage, QUESTION, prompt, answer, self._teacher_name)
            else:
                await self._answer(passage, QUESTION, item)
        self._too_few(passage, missing - len(reply))

    async def _answer(self, passage: Passage, kind: str, prompt: str) -> None:
        request = prompts.answer_request(passage.text, prompt)
        answer = await self._ask(passage, kind, request, lambda r: prompts.parse_answer(r, prompt), 1)
        if answer is not None:
            self._write(passage, kind, prompt, answer, self._teacher_name)

    async def _ask(self, passage: Passage, kind: str, request: str, parse: Callable[[str], Any], records: int) -> Any:
        """Return the teacher's parsed reply, or None after reporting that `records` records failed."""
        assert self.asker is not None  # `make_pwc` checks that there is a teacher for such requests
        try:
            return await self.asker.ask(request, parse)
        except RequestFailed as error:
            self._failed(error.cause, f"{passage.origin}: {kind}: {error.cause}: {error}", records)
            return None

    def _write(self, passage: Passage, kind: str, prompt: str, answer: str, teacher: str) -> None:
        number = f"-{len(self.records.questions(passage.key)) + 1}" if kind == QUESTION else ""
        self.records.append(
            {
                "id": f"{passage.key}-{kind}{number}", "input": passage.text, "prompt": prompt, "answer": answer,
                "kind": kind, "origin": passage.origin, "teacher": teacher,
            }
        )  # fmt: skip
        self.report.written[kind] += 1
        self._advance(1)

    def _too_few(self, passage: Passage, n: int) -> None:
        if n > 0:
            self._failed(TOO_FEW, f"{passage.origin}: {QUESTION}: the teacher wrote {n} too few", n)

    def _bad_row(self, message: str) -> None:
        self.report.failed[BAD_ROW] += 1
        self.on_failure(message)

    def _failed(self, cause: str, message: str, records: int) -> None:
        self.report.failed[cause] += records
        self.on_failure(message)
        self._advance(records)

    def _advance(self, records: int) -> None:
        self.done += records
        self.on_progress(self.done, self.total)
