"""The slot code: slots without an encoder, its trained parameters, and the warm start towards it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers import golden
from icae_fast.errors import CheckpointError, InvalidInputError
from icae_fast.training.loop.model import NAMES, TrainingModel
from icae_fast.training.methods.batch import pack
from icae_fast.training.methods.objectives import autoencoding_sample
from icae_fast.training.methods.slot_code import SlotCode
from icae_fast.training.methods.warm_start import share_means, warm_start_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def icae():
    from icae_fast import ICAE, ICAEConfig

    torch.manual_seed(0)
    config = ICAEConfig(memory_size=3, compression_rate=2, lora_rank=4, slot_scale="embedding_norm")
    return ICAE.from_base(golden.load_base(), config)


def some_ids(n, seed=0):
    return torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 2), st.integers(1, 3))
def test_a_slot_is_what_the_formula_says(icae, lengths, neighbours, memory_size):
    code = SlotCode(icae.backbone.hidden_size, 2, neighbours)
    with torch.no_grad():
        code.maps.normal_()
        code.bias.normal_()
    ids = some_ids(sum(lengths))
    found = code(icae, ids, lengths, memory_size)
    unit = icae.embed(ids).float() * icae.backbone.hidden_size**0.5 / icae.embedding_norm()
    for s, span in enumerate(unit.split(lengths)):
        for i in range(memory_size):
            start = i * len(span) // memory_size
            slot = code.bias.clone()
            for j in range(-neighbours, 2 + neighbours):
                if 0 <= start + j < len(span):
                    slot = slot + code.maps[j + neighbours] @ span[start + j]
            torch.testing.assert_close(found[s, i], slot, rtol=1e-4, atol=1e-4)


def test_it_begins_as_the_mean_of_its_share(icae):
    code = SlotCode.of(icae)
    ids = some_ids(12)
    means = share_means(icae, ids, [6, 6], 3)
    torch.testing.assert_close(F.normalize(code(icae, ids, [6, 6], 3), dim=-1), F.normalize(means, dim=-1))
    norms = torch.cat(code.slots(icae, [ids], 3)).norm(dim=-1)
    torch.testing.assert_close(norms, (icae.embedding_norm() * icae.slot_gain.exp()).expand(6))


def batch_of(icae, *lengths):
    return pack([autoencoding_sample(icae, some_ids(n, i).tolist()) for i, n in enumerate(lengths)])


def test_only_code_gain_and_ae_token_learn_from_it(icae):
    model = TrainingModel(icae, code=SlotCode.of(icae))
    model.zero_grad()
    outputs = model(batch_of(icae, 6, 11), exclusive="code")
    outputs["loss"].backward()
    assert outputs["counts"].nonzero().flatten().tolist() == [NAMES.index("code")]
    assert outputs["counts"].sum() == 6 + 11 + 2
    learned = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert learned == {"code.maps", "code.bias", "icae.slot_gain", "icae.memory_token_embed.weight"}
    rows = icae.memory_token_embed.weight.grad.any(dim=1).nonzero().flatten().tolist()
    assert rows == [icae.vocabulary.ae - icae.vocabulary.first_memory]


def test_losses_of_given_slots_are_those_of_the_encoders(icae):
    contexts = [some_ids(6), some_ids(9, 1)]
    samples = [autoencoding_sample(icae, ids.tolist()) for ids in contexts]
    prompts = [torch.tensor(s.prompt_answer_ids) for s in samples]
    labels = [torch.tensor(s.labels) for s in samples]
    icae.eval()
    slots = [s.detach().requires_grad_() for s in icae.encode(contexts)]
    given, own = (icae.token_losses(contexts, prompts, labels, slots=s).losses for s in (slots, None))
    torch.testing.assert_close(given, own)
    given.sum().backward()
    assert all(bool(s.grad.any()) for s in slots)
    with pytest.raises(InvalidInputError, match="1 of 2 rows"):
        icae.token_losses(contexts, prompts, labels, slots=slots[:1])


def test_a_warm_start_aims_at_it(icae):
    code = SlotCode.of(icae)
    with torch.no_grad():
        code.maps.normal_()
    contexts = [some_ids(6), some_ids(12, 1)]
    right = warm_start_loss(icae, contexts, code.slots(icae, contexts, 3), code=code)
    other = warm_start_loss(icae, contexts, code.slots(icae, contexts, 3))
    assert right.accuracy == 1.0
    assert right.loss < other.loss


def test_it_is_saved_and_loaded(icae, tmp_path):
    code, other = SlotCode.of(icae), SlotCode.of(icae)
    with torch.no_grad():
        code.maps.normal_()
    code.save(tmp_path)
    other.load(tmp_path)
    assert torch.equal(code.maps, other.maps)
    with pytest.raises(CheckpointError, match="settings it was begun with"):
        SlotCode(icae.backbone.hidden_size, 5).load(tmp_path)
    with pytest.raises(CheckpointError, match="settings it was begun with"):
        code.load(tmp_path / "nowhere")
