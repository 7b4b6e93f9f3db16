"""Makes the measurements of a run, one after another, and writes each as it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icae_fast.errors import ChatModelError, ContextTooLongError, DataError, InvalidInputError
from icae_fast.training.evaluation.report import write_result, write_summary
from icae_fast.training.evaluation.result import Result
from icae_fast.training.evaluation.subject import Subject
from icae_fast.training.evaluation.texts.content import restoration_by_content
from icae_fast.training.evaluation.texts.continuation import continuation_by_ratio, table_6
from icae_fast.training.evaluation.texts.restoration import restoration_by_length, restoration_by_memory_size
from icae_fast.training.evaluation.texts.several_spans import several_spans
from icae_fast.training.evaluation.workbench import Workbench

Measurement = Callable[[Sequence[Subject], Workbench], Result]

# Of texts, by what `--only` calls them. A function is called as the result that it gives.
MEASUREMENTS: dict[str, tuple[Measurement, ...]] = {
    "restoration": (restoration_by_length, restoration_by_memory_size),
    "content": (restoration_by_content,),
    "continuation": (continuation_by_ratio, table_6),
    "several_spans": (several_spans,),
}
INSTRUCTIONS = "instructions"  # of rows of prompts; its measurements are those of `instruction_run.Instructions`
GROUPS = (*MEASUREMENTS, INSTRUCTIONS)


@dataclass
class Choice:
    """Which groups of measurements are made.

    Args:
        groups: of `GROUPS`.
        left_out: why others are not, by group.
    """

    groups: list[str]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def of_texts(self) -> dict[str, Measurement]:
        """The measurements of texts by name."""
        return {m.__name__: m for name in self.groups if name in MEASUREMENTS for m in MEASUREMENTS[name]}


def choose_groups(only: str | None, has_texts: bool, has_rows: bool) -> Choice:
    """Groups by name, separated by commas; None for all that something was given for.

    Args:
        only: names.
        has_texts: whether there are texts, which all but instructions are measured on.
        has_rows: whether there are rows of prompts.

    Raises:
        InvalidInputError: there is no such group, what it is measured on is not given, or nothing is to be measured.
    """
    wanted = list(GROUPS) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in GROUPS]:
        raise InvalidInputError(f"there is no measurement {unknown[0]!r}; choose among {', '.join(GROUPS)}")
    lacking = {
        name: "it is measured on prompts, and no --pwc is given"
        if name == INSTRUCTIONS
        else "it is measured on texts, and none are given"
        for name in wanted
        if not (has_rows if name == INSTRUCTIONS else has_texts)
    }
    if only is not None and lacking:
        name, reason = next(iter(lacking.items()))
        raise InvalidInputError(f"{name} cannot be measured: {reason}")
    chosen = [name for name in wanted if name not in lacking]
    if not chosen:
        raise InvalidInputError("nothing is to be measured; give texts, or rows of prompts with --pwc")
    return Choice(chosen, lacking)


def describe_run(subjects: Sequence[Subject], bench: Workbench) -> dict[str, Any]:
    """What all results of a run have in common, as JSON values: subjects, sizes, seed, machine, versions, commit."""
    from icae_fast.benchmark.machine import describe_machine

    machine = describe_machine(subjects[0].icae.device)
    del machine["date"]  # a run that goes on, or is repeated, gives the same files
    return {
        "subjects": [subject.describe() for subject in subjects],
        "samples": bench.samples,
        "seed": bench.seed,
        "documents": len(bench.texts.documents),
        "bad_rows": dict(bench.texts.problems),
        "machine": machine,
    }


def evaluate(
    subjects: Sequence[Subject],
    bench: Workbench,
    measurements: Mapping[str, Measurement],
    folder: Path,
    left_out: Mapping[str, str] | None = None,
) -> tuple[list[Result], dict[str, str]]:
    """Make measurements, and write the files of each, and the summary anew, when it is done.

    Args:
        subjects: measured side by side.
        bench: texts, sizes, and the cache by which an interrupted run goes on where it was.
        measurements: by name.
        folder: which is there.
        left_out: why others are not made, by name; the summary tells it, too.

    Returns:
        results, and by name why others could not be made: texts that are too short, a model's lack of positions, or a
        judge that cannot be used.

    Raises:
        OutputError: a file cannot be written.
    """
    run = describe_run(subjects, bench)
    results: list[Result] = []
    not_measured: dict[str, str] = {}
    for name, measure in measurements.items():
        try:
            result = measure(subjects, bench)
        except (DataError, ContextTooLongError, ChatModelError) as error:
            not_measured[name] = str(error)
        else:
            write_result(folder, result, run)
            results.append(result)
        write_summary(folder, results, {**not_measured, **(left_out or {})}, run)
    return results, not_measured
