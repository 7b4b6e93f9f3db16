"""Choice of the next token from logits: the user's options, and the chooser for a batch whose rows end one by one."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from icae_fast.checks import is_int
from icae_fast.errors import InvalidInputError

# (ids (rows, length) int64, scores (rows, vocabulary) fp32) -> scores, like transformers' `LogitsProcessor`.
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (ids (rows, length) int64, None) -> (rows,) bool, like transformers' `StoppingCriteria`.
Criterion = Callable[[torch.Tensor, None], torch.Tensor]


class GenerationKwargs(TypedDict, total=False):
    """Fields of `GenerationOptions` as keyword arguments, for type checkers."""

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int | Sequence[int] | None
    repetition_penalty: float
    stop_strings: str | Sequence[str]
    eos_token_id: int | Sequence[int] | None
    logits_processor: Sequence[Processor]
    stopping_criteria: Sequence[Criterion]


class RestoreKwargs(GenerationKwargs, total=False):
    """Keyword arguments that `restore_by_span` passes on to `restore`."""

    max_new_tokens: int | None
    min_new_tokens: int
    streamer: Any


@dataclass(frozen=True)
class GenerationOptions:
    """Options for choosing tokens and ending answers, named as in transformers' `GenerationConfig`.

    The default is greedy decoding. Of the base model's `generation_config`, only the end-of-sequence ids are used.

    Args:
        do_sample: draw each token from the distribution instead of taking the argmax. `temperature`, `top_k`, `top_p`
            and `seed` require it.
        temperature: divisor of the logits, above 0; default 1.
        top_k: draw from the k most likely tokens, with ties at the end broken arbitrarily; default 0, all tokens.
        top_p: draw from the smallest set of tokens whose probabilities add up to at least this; default 1, all tokens.
        seed: seed of the first row (row i uses `seed + i`), or one seed per row. A row's draws depend only on its seed
            and its logits. Row i of a batch therefore draws what its prompt draws in a call of its own with
            `seed=seed + i`, as long as rounding does not change its logits. By default (None), seeds are drawn from
            torch's global generator.
        repetition_penalty: values above 1 make tokens less likely that occur in the prompt (without template and
            special tokens) or in the answer so far. Tokens in the memory have no effect, because slots have no ids.
            Default 1, no penalty.
        stop_strings: one string or several that end an answer. The text ends before the stop string, the ids with the
            token that completes it. Stop strings are searched for in the visible text, which has no special tokens.
        eos_token_id: one id or several that end an answer; default: those of the base model.
        logits_processor: transformers' `LogitsProcessor`s (a `LogitsProcessorList` or any sequence), applied after the
            penalty and before temperature, top-k and top-p. Each call sees all rows, so a processor may keep state per
            row; all rows of the call decode together then, whatever `icae.decode_budget` is. The ids are those of
            prompt and answer, padded on the left with the [PAD] id (the size of the base vocabulary). Rows that have
            ended have [PAD] ids and scores of 0.
        stopping_criteria: transformers' `StoppingCriteria` (a `StoppingCriteriaList` or any sequence). They see the
            same ids, and None as scores. A row ends as soon as one returns True for it. They cost one more host
            synchronisation per token.

    Raises:
        InvalidInputError: a value is out of range, or a sampling option is set without `do_sample`.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] | None = None
    repetition_penalty: float = 1.0
    stop_strings: str | Sequence[str] = ()
    eos_token_id: int | Sequence[int] | None = None
    logits_processor: Sequence[Processor] = ()
    stopping_criteria: Sequence[Criterion] = ()

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                hint = "; for greedy decoding leave do_sample out" if name == "temperature" else ""
                raise InvalidInputError(f"{name} is {value!r}; pass a number above 0{hint}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p is {self.top_p!r}; pass a number above 0 and at most 1")
        if not is_int(self.top_k) or self.top_k < 0:
            raise InvalidInputError(f"top_k is {self.top_k!r}; pass an integer of at least 0 (0 for all tokens)")
        if not self.do_sample:
            changed = [n for n in ("temperature", "top_k", "top_p") if getattr(self, n) != _DEFAULTS[n]]
            if changed or self.seed is not None:
                names = ", ".join([*changed, *(["seed"] if self.seed is not None else [])])
                raise InvalidInputError(
                    f"no effect without sampling: {names}; pass do_sample=True too, or leave it out"
                )
        object.__setattr__(self, "stop_strings", _stop_strings(self.stop_strings))
        for name in ("logits_processor", "stopping_criteria"):
            value = getattr(self, name) or ()
            if not isinstance(value, (list, tuple)) or not all(map(callable, value)):
                raise InvalidInputError(
                    f"{name} is of type {type(value).__name__}; pass a list of callables, as to transformers' generate"
                )
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GenerationOptions:
        """Make options from a mapping of names to values; options not named keep their defaults.

        Raises:
            InvalidInputError: an option is unknown, or a value is refused by the constructor.
        """
        if unknown := sorted(set(values) - set(_DEFAULTS)):
            raise InvalidInputError(
                f"there is no option {', '.join(unknown)}; besides the arguments of the call itself, the options are "
                f"{', '.join(_DEFAULTS)}"
            )
        return cls(**values)

    def eos_ids(self, default: Sequence[int], n_base: int) -> tuple[int, ...]:
        """Return the ids that end a row.

        Args:
            default: ids to use if `eos_token_id` is None.
            n_base: size of the base vocabulary.

        Raises:
            InvalidInputError: an id of `eos_token_id` is outside the base vocabulary.
        """
        if self.eos_token_id is None:
            return tuple(default)
        ids = self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else (self.eos_token_id,)
        if not all(is_int(i) and 0 <= i < n_base for i in ids):
            raise InvalidInputError(f"eos_token_id is {self.eos_token_id!r}; pass ids from 0 to {n_base - 1}")
        return tuple(int(i) for i in ids)

    def row_seeds(self, n_rows: int) -> list[int]:
        """Return one seed per row.

        Raises:
            InvalidInputError: the number of seeds differs from the number of rows, or a seed is out of range.
        """
        seed = self.seed
        if seed is None:
            return torch.randint(2**62, (n_rows,)).tolist()
        if is_int(seed):
            seeds: list[Any] = [int(seed) + i for i in range(n_rows)]
        else:
            seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed]
        if not all(is_int(s) and 0 <= s < 2**63 for s in seeds):
            raise InvalidInputError(f"seed is {self.seed!r}; pass integers from 0 to 2**63 - 1")
        if len(seeds) != n_rows:
            raise InvalidInputError(f"there are {len(seeds)} seeds for {n_rows} rows; pass one seed, or one per row")
        return [int(s) for s in seeds]

    def processors(self) -> LogitsProcessorList:
        """Return the processors that change scores depending on the preceding ids, in transformers' order."""
        chain = LogitsProcessorList()
        if self.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        chain += self.logits_processor
        return chain

    def warpers(self) -> LogitsProcessorList:
        """Return the processors for temperature and top-p, which ignore the ids; top-k is applied elsewhere."""
        chain = LogitsProcessorList()
        if self.temperature != 1:
            chain.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_p < 1:
            chain.append(TopPLogitsWarper(float(self.top_p)))
        return chain


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(GenerationOptions)}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _stop_strings(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    if not all(isinstance(t, str) and t for t in texts):
        raise InvalidInputError(f"stop_strings is {value!r}; pass one string or several, none of them empty")
    return tuple(texts)


class TokenChooser:
    """Chooser of the next token of every active row of a batch, one decoding step at a time.

    No value is read back from the device. Each row's seed fixes its draws in advance, as one uniform number per step,
    which is then looked up in the cumulative distribution.

    Args:
        options: how tokens are chosen.
        prompts: prompt ids of each row, for processors and stopping criteria.
        max_new_tokens: maximum number of steps.
        min_new_tokens: number of first steps in which no id of `eos` may be chosen.
        eos: ids that end a row.
        pad: padding id, outside the vocabulary.
        device: device of the logits.
        seeds: one for each row where tokens are drawn; None for those of the options.
    """

    def __init__(
        self, options: GenerationOptions, prompts: Sequence[Sequence[int]], max_new_tokens: int,
        min_new_tokens: int, eos: Sequence[int], pad: int, device: torch.device, seeds: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        n, self._width, self._step = len(prompts), max(map(len, prompts)), 0
        self._min_new_tokens = min_new_tokens
        self._eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self._active = torch.arange(n, device=device)
        # transformers annotates LongTensor and FloatTensor, which no tensor is to a type checker.
        self._processors: Any = options.processors()
        self._see_all_rows = bool(options.logits_processor)
        self._top_k = int(options.top_k)
        self._warpers: Any = options.warpers()
        self._criteria = StoppingCriteriaList(options.stopping_criteria)
        self._history: torch.Tensor | None = None  # (rows, longest prompt + max_new_tokens) ids, prompts on the right
        self._uniform: torch.Tensor | None = None  # (rows, max_new_tokens) uniform numbers
        if options.repetition_penalty != 1 or self._see_all_rows or self._criteria:
            history = torch.full((n, self._width + max_new_tokens), pad, dtype=torch.int64)
            for row, ids in zip(history, prompts, strict=True):
                row[self._width - len(ids) : self._width] = torch.tensor(ids, dtype=torch.int64)
            self._history = history.to(device)
        if options.do_sample:
            self._uniform = _uniform(options.row_seeds(n) if seeds is None else seeds, max_new_tokens).to(device)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose the next token of every active row.

        Args:
            logits: (active rows, vocabulary); they may be overwritten.

        Returns:
            (active rows,) int64 on the logits' device. When sampling, rows without a token to draw (scores NaN or all
            -inf) get the size of the vocabulary.
        """
        if self._step < self._min_new_tokens:
            # transformers' `MinNewTokensLengthLogitsProcessor` would search `eos` for every id of the vocabulary.
            logits.index_fill_(1, self._eos, float("-inf"))
        scores = self._processed(logits.float()) if self._processors else logits
        # `max` returns the first of the largest like `argmax`, in a quarter of its time for one row of 49152 in bf16
        # (44 us).
        if self._uniform is None:
            tokens = scores.max(-1).indices
        else:
            tokens = self._draw(scores, self._uniform[self._active, self._step, None])
        if self._history is not None:
            self._history[self._active, self._width + self._step] = tokens
        self._step += 1
        return tokens

    @property
    def takes_the_largest(self) -> bool:
        """Return whether the choice is the argmax (apart from `steps_before_eos`) and needs no preceding ids."""
        return self._uniform is None and self._history is None and not self._processors

    @property
    def steps_before_eos(self) -> int:
        """Return the number of coming steps in which no id of `eos` may be chosen."""
        return max(0, self._min_new_tokens - self._step)

    def skip(self, steps: int) -> None:
        """Count steps whose tokens were chosen elsewhere; valid only if `takes_the_largest`."""
        self._step += steps

    def stopped(self) -> list[bool]:
        """Return which active rows a stopping criterion ends; without criteria no value is read from the device."""
        if not self._criteria:
            return [False] * len(self._active)
        return self._criteria(self._seen(), None)[self._active].tolist()

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only some of the active rows.

        Args:
            indices: positions among the active rows, ascending.
        """
        self._active = self._active[torch.tensor(indices, device=self._active.device)]

    def _seen(self) -> torch.Tensor | None:
        return None if self._history is None else self._history[:, : self._width + self._step]

    def _processed(self, scores: torch.Tensor) -> torch.Tensor:
        seen = self._seen()
        if seen is None or len(self._active) == len(seen):
            return self._processors(seen, scores)
        if not self._see_all_rows:
            return self._processors(seen[self._active], scores)
        everyone = scores.new_zeros(len(seen), scores.shape[1]).index_copy_(0, self._active, scores)
        return self._processors(seen, everyone)[self._active]

    def _draw(self, scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        ids, vocabulary = None, scores.shape[1]
        if 0 < self._top_k < vocabulary:
            # With top-k first, the sort for top-p and the sums cover k tokens (sorting 49152 takes 3 ms per row on a
            # CPU).
            scores, ids = scores.topk(self._top_k)
            ids = torch.nn.functional.pad(ids, (0, 1), value=vocabulary)
        scores = self._warpers(None, scores.float())
        # In fp32 the running sum would lose tokens whose probability is below 6e-8.
        cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        total = cumulative[:, -1:]
        point = uniform * total
        below = torch.nextafter(total, torch.zeros_like(total))  # a point rounded up to `total` would match no token
        drawn = torch.searchsorted(cumulative, torch.minimum(point, below), right=True)
        return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


def _uniform(seeds: Sequence[int], n: int) -> torch.Tensor:
    """Return uniform fp64 numbers in [0, 1), (rows, n), that depend only on each row's seed and not on the device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(n, dtype=torch.float64, generator=g) for g in generators])
