"""Instruction following as `icae-fast eval` measures it: rows, contestants and a judge in, measurements out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from icae_fast.errors import InvalidInputError
from icae_fast.io.console import KEY_ENV
from icae_fast.training.chat import ChatModel, EndpointModel
from icae_fast.training.chat.options import api_key, check_names, load_local, request_fields
from icae_fast.training.evaluation.instructions.answering import Answered, answer_all
from icae_fast.training.evaluation.instructions.contestants import Reads, check_reads, contestants_of
from icae_fast.training.evaluation.instructions.judge import default_pairs, judge_pairs
from icae_fast.training.evaluation.instructions.measurements import measure_instructions
from icae_fast.training.evaluation.instructions.questions import Question
from icae_fast.training.evaluation.result import Result
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.workbench import Workbench

JUDGE_TOKENS = 512  # of a reply: a sentence and a verdict, and what a reasoning model thinks first


def load_judge(
    endpoint: str | None,
    model: str | None,
    local: str | None,
    api_key_env: str = KEY_ENV,
    body: str | None = None,
    jobs: int = 4,
) -> ChatModel | None:
    """The judge that options name, which answers greedily; None where they name none.

    Args:
        endpoint: base URL of an OpenAI-compatible API.
        model: the model's name there.
        local: a folder, a hub id, or smollm2, in place of an endpoint.
        api_key_env: environment variable with the endpoint's key.
        body: further fields of each request, a JSON object; null takes one out.
        jobs: requests at the same time.

    Raises:
        InvalidInputError: options that do not go together, or that cannot be used.
        CheckpointError: the local model cannot be loaded.
    """
    check_names("judge", "--judge-", endpoint, model, local)
    if local is not None:
        return load_local(local, "bfloat16", max_answer_tokens=JUDGE_TOKENS)
    if endpoint is None:
        return None
    fields = request_fields("--judge-body", body, temperature=0.0)
    key = api_key(api_key_env)
    return EndpointModel(endpoint, model, api_key=key, jobs=jobs, max_answer_tokens=JUDGE_TOKENS, body=fields)


@dataclass
class Instructions:
    """The measurements of instruction following.

    Args:
        questions: see `read_questions`.
        problems: rows that could not be used, by cause, for the protocol.
        reads: what stands for texts; see `contestants_of`.
        max_new_tokens: the most tokens of an answer.
        judge: compares answers; None for references alone.

    Raises:
        InvalidInputError: there is no such thing to read, or nothing.
    """

    questions: Sequence[Question]
    problems: Counter[str] = field(default_factory=Counter)
    reads: Sequence[Reads] = get_args(Reads)
    max_new_tokens: int = 128
    judge: ChatModel | None = None

    def __post_init__(self) -> None:
        check_reads(self.reads)

    def check(self, subjects: Sequence[Subject]) -> None:
        """That a judge has something to compare, before anything is computed.

        Raises:
            InvalidInputError: there is no pair of contestants.
        """
        if self.judge is not None and not default_pairs(contestants_of(subjects, self.reads)):
            raise InvalidInputError(
                f"a judge compares two answers, and there is only {', '.join(self.reads)} of {len(subjects)} adapter; "
                "add contestants or another adapter, or leave the judge out"
            )

    def measurements(self) -> dict[str, Callable[[Sequence[Subject], Workbench], Result]]:
        """The measurements by name: answers against references and, where there is a judge, pairs of answers."""
        found = {"instructions": self._against_references}
        return found if self.judge is None else found | {"instructions_judged": self._judged}

    def _answered(self, subjects: Sequence[Subject], bench: Workbench) -> Answered:
        """Computed for the first measurement and found in the cache for the second."""
        return answer_all(contestants_of(subjects, self.reads), self.questions, bench, self.max_new_tokens)

    def _against_references(self, subjects: Sequence[Subject], bench: Workbench) -> Result:
        return self._with_problems(measure_instructions(self._answered(subjects, bench)))

    def _judged(self, subjects: Sequence[Subject], bench: Workbench) -> Result:
        return self._with_problems(judge_pairs(self._answered(subjects, bench), self.judge, bench))

    def _with_problems(self, result: Result) -> Result:
        result.facts["bad_rows"] = dict(self.problems)
        return result
