"""`sink_token="bos"`: BOS precedes each span, and the slots wherever no template precedes them."""

import random

import numpy as np
import pytest
import torch

from helpers.tolerances import CLOSE_FP32
from icae_fast import ICAEConfig
from icae_fast.core.spans import pack_spans
from icae_fast.errors import ConfigError
from icae_fast.training.data.rows import Row
from icae_fast.training.data.samples import PretrainingDraw, SampleLayout
from icae_fast.training.data.tally import Tally
from icae_fast.training.methods.curriculum import Stage
from icae_fast.training.methods.objectives import autoencoding_sample, continuation_sample, pad_samples

BOS = 1


@pytest.fixture
def icae(make_icae):
    made = make_icae(sink_token="bos")
    made.base_model.generation_config.eos_token_id = made.base_model.config.eos_token_id = []
    return made


def test_spans_are_encoded_behind_bos(icae, make_icae, random_ids):
    """With `append` positions, a span of n tokens behind BOS equals a span of n + 1 tokens that starts with BOS."""
    bare, contexts = make_icae(), [random_ids(15), random_ids(9, seed=1)]
    expected = bare.encode([torch.tensor([BOS, *ids.tolist()]) for ids in contexts])
    for found, slots in zip(icae.encode(contexts), expected, strict=True):
        torch.testing.assert_close(found, slots)
    first, second = icae.encode([torch.cat([contexts[0], contexts[1], random_ids(6, seed=2)])])[0].split(4)
    # Not bitwise equal: the summation order of torch's fp32 products may depend on the row count (MKL on Intel CPUs).
    torch.testing.assert_close(first, icae.encode([contexts[0]])[0], **CLOSE_FP32)
    assert second.shape == first.shape


@pytest.mark.parametrize("positions", ["append", "spread"])
def test_bos_shifts_the_positions_of_memory_tokens(positions):
    config = ICAEConfig(memory_size=2, compression_rate=4, memory_positions=positions)
    bare, rows = pack_spans([5, 3], config), pack_spans([5, 3], config, None, 1)
    assert rows.cu_seqlens.tolist() == [0, 8, 14]
    assert rows.max_seqlen == 8
    assert rows.positions[rows.out_rows].tolist() == (bare.positions[bare.out_rows] + 1).tolist()
    assert rows.positions[:6].tolist() == [*range(6)]


def test_restoring_reads_bos_first(icae, random_ids):
    """Each restored token is the argmax of the training forward over `BOS, slots, AE`."""
    context, v = random_ids(10), icae.vocabulary
    row = [BOS, *range(v.first_memory, v.ae), v.ae]
    memory = icae.compress(context)[0]
    restored = icae.restore(memory, max_new_tokens=8, return_ids=True)
    with torch.no_grad():
        logits = icae([context], [torch.tensor(row + restored)])["logits"][0]
    assert logits[len(row) - 1 : -1].argmax(-1).tolist() == restored


def test_hugging_face_generate_restores_the_same_tokens(icae, random_ids):
    memory = icae.compress(random_ids(10))[0]
    ids = icae.base_model.generate(**icae.generation_inputs(memory, max_new_tokens=8))[0]
    assert ids.tolist() == icae.restore(memory, max_new_tokens=8, return_ids=True)


@pytest.mark.parametrize("task", ["restore", "continue", "slots"])
def test_caches_include_bos(icae, make_icae, random_ids, task):
    memory = icae.compress(random_ids(10))[0]
    cache, bare = icae.kv_cache(memory, task), make_icae().kv_cache(memory.to("cpu"), task)
    assert cache.get_seq_length() == bare.get_seq_length() + 1
    assert icae.memory_kv(memory, task).prefix_ids == (BOS,)


@pytest.mark.parametrize("prompt_format", ["plain", "v1", "chat"])
def test_prompts_without_a_template_begin_with_bos(make_icae, make_tokenizer, prompt_format):
    icae, bare = (make_icae(prompt_format=prompt_format, sink_token=b) for b in ("bos", "none"))
    assert bare.prompt_ids([5, 6])[0] == []
    assert icae.prompt_ids([5, 6]) == ([BOS], bare.prompt_ids([5, 6])[1])
    assert icae.prefix_ids == (BOS,)
    assert SampleLayout(icae).prompt_ids([5, 6]) == icae.prompt_ids([5, 6])


def test_a_template_is_not_changed(make_icae, make_tokenizer):
    tokenizer = make_tokenizer(chat_template="w90 {{ messages[0]['content'] }} w91")
    icae = make_icae(sink_token="bos", tokenizer=tokenizer)
    assert icae.prompt_ids([5, 6]) == ([90], [icae.vocabulary.ft, 5, 6, 91])


def test_training_samples_begin_with_bos(make_icae, random_ids):
    context, following = random_ids(10).tolist(), random_ids(12).tolist()
    icae, bare = make_icae(sink_token="bos"), make_icae()
    for make in (lambda m: autoencoding_sample(m, context), lambda m: continuation_sample(m, context, following)):
        sample, without = make(icae), make(bare)
        assert sample.prompt_answer_ids == [BOS, *without.prompt_answer_ids]
        assert sample.labels == [-100, *without.labels]
        expected = icae(**pad_samples(icae, [sample]))["loss"]
        found = icae.token_losses(*[[torch.tensor(row)] for row in (context, sample.prompt_answer_ids, sample.labels)])
        torch.testing.assert_close(found.losses.mean(), expected)


@pytest.mark.parametrize("objective", ["ae", "lm"])
def test_the_cost_of_a_draft_counts_bos(make_icae, objective):
    drawer = PretrainingDraw(make_icae(sink_token="bos"))
    row = Row("0", "text:0", (np.arange(400, dtype=np.int32),), 0, 400)
    for seed in range(20):
        for draft in drawer(row, Stage(1, {objective: 1}, 100), random.Random(seed), Tally()):
            assert draft.cost == draft.build().n_tokens


def test_bos_takes_one_of_the_positions(icae, random_ids):
    memory = icae.compress(random_ids(40))[0]
    icae.max_positions = 1 + memory.n_slots + 1 + 7
    assert len(icae.restore(memory, min_new_tokens=7, return_ids=True)) == 7


def test_a_base_model_without_bos_is_refused(make_base, make_icae):
    base = make_base()
    base.config.bos_token_id = base.generation_config.bos_token_id = None
    with pytest.raises(ConfigError, match="has a BOS token; use 'none'"):
        make_icae(base=base, sink_token="bos")


def test_an_unknown_sink_token_is_refused():
    with pytest.raises(ConfigError, match="sink_token is 'eos'"):
        ICAEConfig(sink_token="eos")
