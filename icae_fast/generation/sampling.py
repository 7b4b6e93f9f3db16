"""How the next token is chosen from logits: options, and the choice for a batch of rows that end one by one."""

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

from icae_fast.core.inputs import is_int
from icae_fast.errors import InvalidInputError

# (rows, length) int64 ids and (rows, vocabulary) fp32 scores to scores, as transformers' `LogitsProcessor`.
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (rows, length) int64 ids and None to (rows,) bool, as transformers' `StoppingCriteria`.
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
    """Keyword arguments that `restore_by_span` hands to `restore`."""

    max_new_tokens: int | None
    min_new_tokens: int
    streamer: Any


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen and what ends an answer, by the names of transformers' `GenerationConfig`.

    The default is greedy. What the base model's own `generation_config` says is not used, its end-of-sequence ids
    excepted.

    Args:
        do_sample: draw each token from the distribution instead of taking the most likely one. The three next ones
            and `seed` need it.
        temperature: above 0; the logits are divided by it.
        top_k: draw from the k most likely tokens (of equal ones at the end any); 0 for all.
        top_p: draw from the fewest tokens whose probabilities add up to this; 1 for all.
        seed: of the first row; row i has `seed + i`, or one seed is given for each row. What a row draws depends on
            its seed and its logits alone, so row i of a batch gets what its prompt gets by itself with
            `seed=seed + i`, as far as its logits are rounded alike. None takes seeds from torch's global generator.
        repetition_penalty: above 1, makes tokens less likely that are in the prompt (without template and special
            tokens) or have been generated. What is in the memory is not seen: slots have no ids.
        stop_strings: a text or several; where one comes, the answer ends, and its text ends before it. Only visible
            text counts, not special tokens. The ids end with the token that completes it.
        eos_token_id: an id or several that end an answer, instead of the base model's.
        logits_processor: further processors as transformers' (a `LogitsProcessorList` or any sequence), applied after
            the penalty and before temperature, top-k and top-p. They see all rows in each call, so they may keep
            state by row. Their ids are those of the prompts and of what was generated, filled up on the left with
            the [PAD] id, the size of the base vocabulary; rows that have ended get [PAD] ids and scores of 0.
        stopping_criteria: as transformers' (a `StoppingCriteriaList` or any sequence); they see the same ids, and
            None for scores. A row ends where one says so. They cost one more host synchronisation a token.

    Raises:
        InvalidInputError: a value out of range, or one for sampling without `do_sample`.
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
                hint = "; leave do_sample out for the most likely tokens" if name == "temperature" else ""
                raise InvalidInputError(f"{name} is {value!r}; give a number above 0{hint}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p is {self.top_p!r}; give a number above 0 and up to 1")
        if not is_int(self.top_k) or self.top_k < 0:
            raise InvalidInputError(f"top_k is {self.top_k!r}; give a whole number, 0 for all tokens")
        if not self.do_sample:
            changed = [n for n in ("temperature", "top_k", "top_p") if getattr(self, n) != _DEFAULTS[n]]
            if changed or self.seed is not None:
                names = ", ".join([*changed, *(["seed"] if self.seed is not None else [])])
                raise InvalidInputError(f"{names} would change nothing without sampling; pass do_sample=True with it")
        object.__setattr__(self, "stop_strings", _stop_strings(self.stop_strings))
        for name in ("logits_processor", "stopping_criteria"):
            value = getattr(self, name) or ()
            if not isinstance(value, (list, tuple)) or not all(map(callable, value)):
                raise InvalidInputError(
                    f"{name} is a {type(value).__name__}; give a list, as to transformers' generate"
                )
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GenerationOptions:
        """The options with these values, the others at their defaults.

        Raises:
            InvalidInputError: there is no such option, or see above.
        """
        if unknown := sorted(set(values) - set(_DEFAULTS)):
            raise InvalidInputError(
                f"there is no option {', '.join(unknown)}; besides the arguments of the call itself there are "
                f"{', '.join(_DEFAULTS)}"
            )
        return cls(**values)

    def eos_ids(self, default: Sequence[int], n_base: int) -> tuple[int, ...]:
        """Ids that end a row, `default` unless they are given here.

        Raises:
            InvalidInputError: one is no id of the base vocabulary, which has `n_base`.
        """
        if self.eos_token_id is None:
            return tuple(default)
        ids = self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else (self.eos_token_id,)
        if not all(is_int(i) and 0 <= i < n_base for i in ids):
            raise InvalidInputError(f"eos_token_id is {self.eos_token_id!r}; give ids from 0 to {n_base - 1}")
        return tuple(int(i) for i in ids)

    def row_seeds(self, n_rows: int) -> list[int]:
        """A seed for each row.

        Raises:
            InvalidInputError: another number of seeds than rows, or one out of range.
        """
        seed = self.seed
        if seed is None:
            return torch.randint(2**62, (n_rows,)).tolist()
        if is_int(seed):
            seed = [int(seed) + i for i in range(n_rows)]
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed]
        if not all(is_int(s) and 0 <= s < 2**63 for s in seeds):
            raise InvalidInputError(f"seed is {self.seed!r}; give whole numbers from 0 to below 2**63")
        if len(seeds) != n_rows:
            raise InvalidInputError(f"there are {len(seeds)} seeds for {n_rows} rows; give one, or one for each row")
        return [int(s) for s in seeds]

    def processors(self) -> LogitsProcessorList:
        """What changes the scores by the ids before, in transformers' order."""
        chain = LogitsProcessorList()
        if self.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        chain += self.logits_processor
        return chain

    def warpers(self) -> LogitsProcessorList:
        """What shapes the distribution that is drawn from, top-k excepted; it looks at no ids."""
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
        raise InvalidInputError(f"stop_strings is {value!r}; give a text or several, none of them empty")
    return tuple(texts)


class TokenChooser:
    """Chooses a token for every active row of a batch, step after step.

    Nothing is read back from the device: what a row draws is fixed by its seed beforehand, as one number from 0 to 1
    for each token, which is looked up in the cumulative distribution.

    Args:
        options: how.
        prompts: each row's prompt ids, for processors and stopping criteria.
        max_new_tokens: the most steps.
        min_new_tokens: steps in which no id of `eos` may be chosen.
        eos: ids that end a row.
        pad: an id past the vocabulary.
        device: of the logits.
    """

    def __init__(
        self, options: GenerationOptions, prompts: Sequence[Sequence[int]], max_new_tokens: int,
        min_new_tokens: int, eos: Sequence[int], pad: int, device: torch.device,
    ) -> None:  # fmt: skip
        n, self._width, self._step = len(prompts), max(map(len, prompts)), 0
        self._min_new_tokens = min_new_tokens
        self._eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self._active = torch.arange(n, device=device)
        self._processors, self._see_all_rows = options.processors(), bool(options.logits_processor)
        self._top_k, self._warpers = int(options.top_k), options.warpers()
        self._criteria = StoppingCriteriaList(options.stopping_criteria)
        self._history = self._uniform = None
        if options.repetition_penalty != 1 or self._see_all_rows or self._criteria:
            history = torch.full((n, self._width + max_new_tokens), pad, dtype=torch.int64)
            for row, ids in zip(history, prompts, strict=True):
                row[self._width - len(ids) : self._width] = torch.tensor(ids, dtype=torch.int64)
            self._history = history.to(device)
        if options.do_sample:
            self._uniform = _uniform(options.row_seeds(n), max_new_tokens).to(device)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of every active row.

        Args:
            logits: (active rows, vocabulary), which may be overwritten.

        Returns:
            (active rows,) int64 on the logits' device; the vocabulary's size where scores are NaN or all -inf and
            there is nothing to draw from.
        """
        if self._step < self._min_new_tokens:
            # `MinNewTokensLengthLogitsProcessor` looks every id of the vocabulary up among those of `eos`.
            logits.index_fill_(1, self._eos, float("-inf"))
        scores = self._processed(logits.float()) if self._processors else logits
        # The first of the largest, as `argmax` gives, in a quarter of its time for one row of 49152 in bf16 (44 us).
        tokens = scores.max(-1).indices if self._uniform is None else self._draw(scores)
        if self._history is not None:
            self._history[self._active, self._width + self._step] = tokens
        self._step += 1
        return tokens

    @property
    def takes_the_largest(self) -> bool:
        """Whether the most likely token is chosen (but for `steps_before_eos`), and nobody asks for those before."""
        return self._uniform is None and self._history is None and not self._processors

    @property
    def steps_before_eos(self) -> int:
        """Steps from now on in which no id of `eos` may be chosen."""
        return max(0, self._min_new_tokens - self._step)

    def skip(self, steps: int) -> None:
        """Go on as if `choose` had been called so many times, which `takes_the_largest` allows."""
        self._step += steps

    def stopped(self) -> list[bool]:
        """Which active rows a stopping criterion ends; without criteria nothing is read back from the device."""
        if not self._criteria:
            return [False] * len(self._active)
        return self._criteria(self._seen(), None)[self._active].tolist()

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with some of the active rows, given by their places in rising order."""
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

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        ids, vocabulary = None, scores.shape[1]
        if 0 < self._top_k < vocabulary:
            # Then the sort for top-p and the sums are over k tokens (a sort of 49152 takes 3 ms a row on a CPU).
            scores, ids = scores.topk(self._top_k)
            ids = torch.nn.functional.pad(ids, (0, 1), value=vocabulary)
        scores = self._warpers(None, scores.float())
        # In fp32 the sum would lose tokens less likely than 6e-8.
        cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        total = cumulative[:, -1:]
        point = self._uniform[self._active, self._step, None] * total
        below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not reach the end, past every token
        drawn = torch.searchsorted(cumulative, torch.minimum(point, below), right=True)
        return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


def _uniform(seeds: Sequence[int], n: int) -> torch.Tensor:
    """(rows, n) fp64 numbers from 0 to below 1, each row's from its own seed and the same on every device."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(n, dtype=torch.float64, generator=g) for g in generators])
