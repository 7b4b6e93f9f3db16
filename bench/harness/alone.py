"""A measurement in a process of its own.

Memory that a process has freed stays in its heap, and what is allocated next is scattered over it: behind the
baseline's step, a step of icae_fast at budget 0 touched 697 MB in SmolLM2's case, and 392 MB in a new process. So peaks
of what is compared are each taken in a new one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def alone(function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """`function(*args, **kwargs)` of a new process, with as many threads as this one has.

    Args:
        function: of a module; it, its arguments and its result go between processes by pickle.

    Raises:
        Whatever the function raises; `BrokenProcessPool` if the process is killed, by lack of memory for one.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *args, **kwargs).result()
