"""Eight short passages are learnt by heart: the loss goes to nearly nothing, and greedy restoration is then exact."""

import pytest
import torch

from bench.harness import overfit
from bench.harness.shapes import OverfitCase
from helpers import golden
from icae_fast import ICAE, ICAEConfig

CASE = OverfitCase("golden", "fp32", 8, 8, 16, warm_steps=20, max_steps=200, goal=0.05)


@pytest.fixture
def icae():
    """A new adapter on the golden base, whose random weights are scaled until slots can steer what it says."""
    base = golden.load_base()
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if name.endswith("_proj.weight"):
                weight.mul_(2.5)  # as it is, attention looks everywhere alike
        base.lm_head.weight.mul_(5)  # as it is, no hidden state makes a token likelier than 1 in 3
    config = ICAEConfig(
        memory_size=CASE.memory_size, compression_rate=1, lora_rank=32, lora_alpha=32, lora_dropout=0.0,
        memory_positions="spread", slot_scale="embedding_norm",
    )  # fmt: skip
    torch.manual_seed(overfit.SEED)
    return ICAE.from_base(base, config)


@pytest.mark.usefixtures("one_thread")
def test_eight_passages_are_learnt_by_heart(icae):
    passages = overfit.passages_for(CASE, icae)
    learned = overfit.learn(CASE, icae, passages, learning_rate=1e-2)
    assert learned["losses"][0] > 1
    assert learned["losses"][-1] < CASE.goal
    assert learned["reached"]
    assert all(overfit.restored(icae, passages))
