"""A user's mistakes, for type checkers only: `make pyright` fails when one of them is not reported.

The ignore comments accept the reports, and an ignore comment without a report is an error of its own.
"""

from icae_fast import ICAE, ICAEConfig, Memory


def mistakes(icae: ICAE, memory: Memory, questions: list[str]) -> None:
    """Misspell options and mix up types."""
    icae.generate(memory, questions, temprature=0.5)  # pyright: ignore[reportCallIssue]
    icae.answer(memory, questions, do_smaple=True)  # pyright: ignore[reportCallIssue]
    icae.generate(memory, questions, temperature="hot")  # pyright: ignore[reportCallIssue, reportArgumentType]
    text: str = icae.generate(memory, questions)  # pyright: ignore[reportAssignmentType]
    ids: list[int] = icae.restore(memory)  # pyright: ignore[reportAssignmentType]
    icae.compres(["text"])  # pyright: ignore[reportCallIssue]
    ICAEConfig(memory_sise=128)  # pyright: ignore[reportCallIssue]
    print(text, ids)
