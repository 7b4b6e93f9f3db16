"""The instruction measurements of `icae-fast eval`, built from rows, contestants and a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

from icae_fast.errors import InvalidInputError
from icae_fast.io.console import KEY_ENV
from icae_fast.training.chat import ChatModel, EndpointModel
from icae_fast.training.chat.options import api_key, check_names, load_local, request_fields
from icae_fast.training.evaluation.instructions.answering import Answered, answer_all
from icae_fast.training.evaluation.instructions.contestants import Reads, contestants_of, known_reads
from icae_fast.training.evaluation.instructions.judge import default_pairs, judge_pairs
from icae_fast.training.evaluation.instructions.questions import Question
from icae_fast.training.evaluation.instructions.references import measure_instructions
from icae_fast.training.evaluation.result import Result
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.workbench import Workbench

Measurement = Callable[[Sequence[Subject], Workbench], Result]

JUDGE_TOKENS = 512  # limit of a reply: a sentence and a verdict, after a reasoning model's thoughts


def load_judge(
    endpoint: str | None,
    model: str | None,
    local: str | None,
    api_key_env: str = KEY_ENV,
    body: str | None = None,
    jobs: int = 4,
    timeout: float = 120.0,
    retries: int = 5,
) -> ChatModel | None:
    """Return the greedy judge that options describe, None if they describe none.

    Args:
        endpoint: base URL of an OpenAI-compatible API.
        model: the model's name at the endpoint.
        local: a folder, a hub id, or smollm2, instead of an endpoint.
        api_key_env: environment variable with the endpoint's key.
        body: extra fields of each request, a JSON object; null removes a field.
        jobs: concurrent requests.
        timeout: seconds for one request.
        retries: retries of a failed request.

    Raises:
        InvalidInputError: the options contradict each other, or one is invalid.
        CheckpointError: the local model cannot be loaded.
    """
    check_names("judge", "--judge-", endpoint, model, local)
    if local is not None:
        return load_local(local, "bfloat16", max_answer_tokens=JUDGE_TOKENS)
    if endpoint is None or model is None:  # `check_names` requires both or none
        return None
    fields = request_fields("--judge-body", body, temperature=0.0)
    key = api_key(api_key_env)
    return EndpointModel(
        endpoint, model, api_key=key, body=fields, jobs=jobs, timeout=timeout, retries=retries,
        max_answer_tokens=JUDGE_TOKENS,
    )  # fmt: skip


@dataclass
class Instructions:
    """The measurements of instruction following.

    Args:
        questions: see `read_questions`.
        problems: number of unusable rows by cause, for the protocol.
        reads: what contestants read for texts; see `contestants_of`.
        max_new_tokens: limit of an answer.
        judge: compares answers; None measures only against references.

    Raises:
        InvalidInputError: a name in `reads` is unknown, or there is none.
    """

    questions: Sequence[Question]
    problems: Counter[str] = field(default_factory=Counter)
    reads: Sequence[Reads] = get_args(Reads)
    max_new_tokens: int = 128
    judge: ChatModel | None = None

    def __post_init__(self) -> None:
        known_reads(self.reads)

    def check(self, subjects: Sequence[Subject]) -> None:
        """Raise, before anything is computed, if there is a judge but no pair of contestants.

        Raises:
            InvalidInputError: there is no pair of contestants.
        """
        if self.judge is not None and not default_pairs(contestants_of(subjects, self.reads)):
            raise InvalidInputError(
                f"a judge compares two answers, but there is only {', '.join(self.reads)} of {len(subjects)} adapter; "
                "add contestants or another adapter, or leave the judge out"
            )

    def measurements(self) -> dict[str, Measurement]:
        """Return the measurements by name: answers against references and, with a judge, pairs of answers."""
        found: dict[str, Measurement] = {"instructions": self._against_references}
        if self.judge is not None:
            found["instructions_judged"] = partial(self._judged, self.judge)
        return found

    def _answered(self, subjects: Sequence[Subject], bench: Workbench) -> Answered:
        """Return all answers; the second measurement finds them in the cache."""
        return answer_all(contestants_of(subjects, self.reads), self.questions, bench, self.max_new_tokens)

    def _against_references(self, subjects: Sequence[Subject], bench: Workbench) -> Result:
        return self._with_problems(measure_instructions(self._answered(subjects, bench)))

    def _judged(self, judge: ChatModel, subjects: Sequence[Subject], bench: Workbench) -> Result:
        return self._with_problems(judge_pairs(self._answered(subjects, bench), judge, bench))

    def _with_problems(self, result: Result) -> Result:
        result.facts["bad_rows"] = dict(self.problems)
        return result
