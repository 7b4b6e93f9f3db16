"""Overfit a new adapter on a few passages: train on one batch until the decoder restores all of it.

The encoder-only warm start makes the slots informative before the decoder reads them. For 64 tokens in 32 slots, 117
steps of autoencoding without it left SmolLM2's loss at 4.2; after 40 warm steps, 89 steps brought the loss to 1.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness.models import SEED, build_base
from bench.harness.shapes import DTYPES, OverfitCase
from icae_fast import ICAE, ICAEConfig
from icae_fast.benchmark.machine import REPOSITORY, Bounds
from icae_fast.training.loop.model import TrainingModel
from icae_fast.training.methods.batch import pack
from icae_fast.training.methods.objectives import autoencoding_sample
from icae_fast.training.methods.warm_start import warm_start_loss

LEARNING_RATE, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0
RAMP_STEPS = 10  # steps until the full learning rate
TEXT = REPOSITORY / "examples" / "harrow_point.txt"


def new_icae(case: OverfitCase) -> ICAE:
    """Return a new adapter with settings that learn fast: spread positions, scaled slots, LoRA scale 1, no dropout."""
    base, tokenizer = build_base(case.model, DTYPES[case.dtype])
    config = ICAEConfig(
        memory_size=case.memory_size, compression_rate=-(-case.tokens // case.memory_size), lora_alpha=128,
        lora_dropout=0.0, memory_positions="spread", slot_scale="embedding_norm",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return ICAE.from_base(base, config, tokenizer)


def passages_for(case: OverfitCase, icae: ICAE) -> list[torch.Tensor]:
    """Return the case's passages, (tokens,) int64 each, from the start of a text, or random ids without a tokenizer."""
    count = case.passages * case.tokens
    if icae.tokenizer is None:
        ids = torch.randint(icae.vocabulary.n_base, (count,), generator=torch.Generator().manual_seed(SEED))
    else:
        ids = torch.tensor(icae.tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"][:count])
    return list(ids.view(case.passages, case.tokens))


def learn(
    case: OverfitCase, icae: ICAE, passages: Sequence[torch.Tensor], learning_rate: float = LEARNING_RATE
) -> dict[str, Any]:
    """Train on all passages at once, warm start and then autoencoding, until the decoder restores all of them.

    Restoration is tried only once the loss is below the case's goal and every label is the argmax. The loss is not
    enough: at 0.047, two of eight passages still broke off in one run.

    Args:
        case: steps and goal.
        icae: the adapter to train.
        passages: ids, (tokens,) each.
        learning_rate: peak learning rate of AdamW.

    Returns:
        `warm_losses` and `losses`, the losses before each step; `reached`, whether all passages were restored.
    """
    model = TrainingModel(icae).train()
    batch = pack([autoencoding_sample(icae, p.tolist()) for p in passages])
    parameters = [p for p in icae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / RAMP_STEPS))

    def descend(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    warm_losses: list[float] = []
    for _ in range(case.warm_steps):
        warm = warm_start_loss(icae, passages, icae.encode(passages))
        warm_losses.append(warm.loss.item() / warm.n_slots)
        descend(warm.loss / warm.n_slots)
    losses: list[float] = []
    reached = False
    for _ in range(case.max_steps):
        out = model(batch)
        losses.append(out["loss"].item())
        may_end = case.goal is not None and losses[-1] < case.goal and bool((out["correct"] == out["counts"]).all())
        if may_end and all(restored(icae, passages)):
            reached = True
            break
        descend(out["loss"])
    icae.eval()
    return {"warm_losses": warm_losses, "losses": losses, "reached": reached}


def restored(icae: ICAE, passages: Sequence[torch.Tensor]) -> list[bool]:
    """Return, for each passage, whether greedy decoding from its slots restores every token and then ends."""
    answers = icae.restore(icae.compress(list(passages)), return_ids=True)
    return [answer == [*p.tolist(), icae.eos_token_ids[0]] for answer, p in zip(answers, passages, strict=True)]


@dataclass(frozen=True)
class Overfit:
    """The result of an overfitting benchmark.

    Args:
        name: name of the benchmark.
        case: the workload.
        learned: result of `learn`.
        exact: result of `restored`.
        seconds: time of training and restoring.
        backends: op name to the backend that ran it.
    """

    name: str
    case: OverfitCase
    learned: dict[str, Any]
    exact: Sequence[bool]
    seconds: float
    backends: dict[str, str]

    def row(self, bounds: Bounds) -> dict[str, Any]:
        """Return the outcome as JSON values.

        Returns:
            `name`, `case`, `overfit` (`passages`, `tokens` and `slots` per passage, `warm_steps`, `steps`, `seconds`,
            `goal`, `loss` (the last one), `restored` (passages restored exactly), `losses` (every tenth)), `backends`.
        """
        losses = self.learned["losses"]
        return {
            "name": self.name,
            "case": self.case.name,
            "overfit": {
                "passages": self.case.passages, "tokens": self.case.tokens, "slots": self.case.memory_size,
                "warm_steps": len(self.learned["warm_losses"]), "steps": len(losses) - self.learned["reached"],
                "seconds": self.seconds, "goal": self.case.goal, "loss": losses[-1], "restored": sum(self.exact),
                "losses": losses[::10],
            },
            "backends": self.backends,
        }  # fmt: skip
