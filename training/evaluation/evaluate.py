"""Run measurements one after another, and write each result as soon as it is finished."""

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

# Measurements on texts by group, as `--only` names them. A function has the name of its result.
MEASUREMENTS: dict[str, tuple[Measurement, ...]] = {
    "restoration": (restoration_by_length, restoration_by_memory_size),
    "content": (restoration_by_content,),
    "continuation": (continuation_by_ratio, table_6),
    "several_spans": (several_spans,),
}
INSTRUCTIONS = "instructions"  # measurements on rows of prompts: those of `instructions.plan.Instructions`
GROUPS = (*MEASUREMENTS, INSTRUCTIONS)


@dataclass
class Choice:
    """The chosen groups of measurements.

    Args:
        groups: names in `GROUPS`.
        left_out: the reason for each group that was left out.
    """

    groups: list[str]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def of_texts(self) -> dict[str, Measurement]:
        """The measurements on texts by name."""
        return {m.__name__: m for name in self.groups if name in MEASUREMENTS for m in MEASUREMENTS[name]}


def choose_groups(only: str | None, has_texts: bool, has_rows: bool) -> Choice:
    """Choose groups of measurements.

    Args:
        only: names separated by commas; None chooses every group whose input is given.
        has_texts: whether texts are given, the input of every group except instructions.
        has_rows: whether rows of prompts are given.

    Raises:
        InvalidInputError: a group does not exist or its input is not given, or no group is left.
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
        raise InvalidInputError("there is nothing to measure; give texts, or rows of prompts with --pwc")
    return Choice(chosen, lacking)


def describe_run(subjects: Sequence[Subject], bench: Workbench) -> dict[str, Any]:
    """Return what all results of a run share, as JSON values: subjects, sizes, seed, machine, versions, commit."""
    from icae_fast.benchmark.machine import describe_machine

    machine = describe_machine(subjects[0].icae.device)
    del machine["date"]  # so that a resumed or repeated run writes the same files
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
    """Run measurements; after each one, write its files and the summary.

    Args:
        subjects: adapters to measure side by side.
        bench: texts, sizes, and the cache that makes runs resumable.
        measurements: functions by name.
        folder: existing output folder.
        left_out: reasons for measurements that were left out, by name; the summary lists them.

    Returns:
        The results, and the reasons for measurements that could not be made, by name: texts are too short, a model has
        too few positions, or the judge cannot be used.

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
