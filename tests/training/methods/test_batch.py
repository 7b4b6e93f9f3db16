"""Packed batches: their layout, and that nothing moves them to a device before the model does."""

import pytest
import torch
from accelerate.utils import send_to_device
from torch.distributed.utils import _to_kwargs

from icae_fast.errors import InvalidInputError
from icae_fast.training.methods.batch import pack
from icae_fast.training.methods.objectives import autoencoding_sample, continuation_sample


@pytest.fixture
def batch(tiny_icae):
    ids = list(range(20, 34))
    return pack([autoencoding_sample(tiny_icae, ids), continuation_sample(tiny_icae, ids[:5], ids[5:])], 2)


def test_rows_are_views_of_the_packed_ids(batch):
    assert [len(row) for row in batch.contexts] == batch.context_lengths == [14, 5]
    assert [len(row) for row in batch.prompts] == [len(row) for row in batch.label_rows] == batch.prompt_lengths
    assert torch.equal(torch.cat(batch.contexts), batch.context_ids)
    assert batch.prompts[1].untyped_storage().data_ptr() == batch.prompt_answer_ids.untyped_storage().data_ptr()
    assert batch.objectives == ["ae", "lm"]
    assert batch.n_tokens == sum(batch.context_lengths) + sum(batch.prompt_lengths)
    assert batch.memory_size == 2
    with pytest.raises(InvalidInputError, match="at least one sample"):
        pack([])


def test_trainer_and_ddp_leave_a_batch_on_the_host(batch):
    """The trainer moves inputs with `send_to_device`'s rule, DDP with `_to_kwargs`; both look for tensors only."""
    assert send_to_device({"batch": batch}, torch.device("meta"))["batch"] is batch
    (arguments,), (options,) = _to_kwargs((batch,), {"batch": batch}, torch.device("meta"), False)
    assert arguments[0] is options["batch"] is batch
