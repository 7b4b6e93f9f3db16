"""Makes the measurements of a run, one after another, and writes each as it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icae_fast.errors import ContextTooLongError, DataError, InvalidInputError
from training.evaluation.content import restoration_by_content
from training.evaluation.continuation import continuation_by_ratio, table_6
from training.evaluation.report import write_result, write_summary
from training.evaluation.restoration import restoration_by_length, restoration_by_memory_size
from training.evaluation.result import Result
from training.evaluation.several_spans import several_spans
from training.evaluation.subject import Subject
from training.evaluation.workbench import Workbench

Measurement = Callable[[Sequence[Subject], Workbench], Result]

# By what `--only` calls them. A function is called as the result that it gives.
MEASUREMENTS: dict[str, tuple[Measurement, ...]] = {
    "restoration": (restoration_by_length, restoration_by_memory_size),
    "content": (restoration_by_content,),
    "continuation": (continuation_by_ratio, table_6),
    "several_spans": (several_spans,),
}


def choose_measurements(only: str | None) -> dict[str, Measurement]:
    """Measurements by name, all or those of the groups that are named, separated by commas.

    Raises:
        InvalidInputError: there is no such group.
    """
    wanted = list(MEASUREMENTS) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in MEASUREMENTS]:
        raise InvalidInputError(f"there is no measurement {unknown[0]!r}; choose among {', '.join(MEASUREMENTS)}")
    if not wanted:
        raise InvalidInputError(f"nothing is to be measured; choose among {', '.join(MEASUREMENTS)}")
    return {measure.__name__: measure for name in wanted for measure in MEASUREMENTS[name]}


def describe_run(subjects: Sequence[Subject], bench: Workbench) -> dict[str, Any]:
    """What all results of a run have in common, as JSON values: subjects, sizes, seed, machine, versions, commit."""
    from bench.machine import describe_machine

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
    subjects: Sequence[Subject], bench: Workbench, measurements: Mapping[str, Measurement], folder: Path
) -> tuple[list[Result], dict[str, str]]:
    """Make measurements, and write the files of each, and the summary anew, when it is done.

    Args:
        subjects: measured side by side.
        bench: texts, sizes, and the cache by which an interrupted run goes on where it was.
        measurements: see `choose_measurements`.
        folder: which is there.

    Returns:
        results, and by name why others could not be made: texts that are too short, or a model's lack of positions.

    Raises:
        OutputError: a file cannot be written.
    """
    run = describe_run(subjects, bench)
    results: list[Result] = []
    not_measured: dict[str, str] = {}
    for name, measure in measurements.items():
        try:
            result = measure(subjects, bench)
        except (DataError, ContextTooLongError) as error:
            not_measured[name] = str(error)
        else:
            write_result(folder, result, run)
            results.append(result)
        write_summary(folder, results, not_measured, run)
    return results, not_measured
