"""Slot KV in transformers' caches: `base_model.generate` and the base model's forward continue from a memory."""

from threading import Thread

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

from icae_fast.errors import ContextTooLongError, InvalidInputError
from icae_fast.kv.transformers_caches import dynamic_cache

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = "<bos> w90 w91 {{ messages[0]['content'] }} w92{% if add_generation_prompt %} w93{% endif %}"
KINDS = ("dynamic", "static")
N = 10


def assert_same_logits(got, expected):
    """Check that logits are equal to within 1e-5 of the largest one."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def embeddings(icae, memory, prompt=None):
    """Return the decoder's input embeddings, (1, L, d): the whole prompt layout, or `[slots, AE]` without a prompt."""
    before, after = ([], [icae.vocabulary.ae]) if prompt is None else icae.prompt_ids(prompt)
    parts = [icae.tokens_to_embeddings(torch.tensor(ids, dtype=torch.int64)) for ids in (before, after)]
    return torch.cat((parts[0], memory.slots, parts[1]))[None].detach()


def scratch_inputs(icae, memory, prompts):
    """Return arguments of `base_model.generate` without a cache; shorter rows are padded on the left."""
    rows = [embeddings(icae, memory, p)[0] for p in prompts]
    mask = [torch.ones(len(r), dtype=torch.int64) for r in rows]
    stack = torch.nn.utils.rnn.pad_sequence
    return {
        "inputs_embeds": stack(rows, batch_first=True, padding_side="left"),
        "attention_mask": stack(mask, batch_first=True, padding_side="left"),
        "max_new_tokens": N,
    }


def trimmed(icae, ids):
    """Return rows of ids, each cut behind its first end-of-sequence id."""
    rows = []
    for row in ids.tolist():
        ends = [i for i, token in enumerate(row) if token in icae.eos_token_ids]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


def tree_copy(icae):
    """Return a copy of every key and value in the tree."""
    return [(key, s.keys.clone(), s.values.clone()) for key, s in icae.slot_kv._kept.items()]


@pytest.fixture
def icae(make_icae, make_tokenizer):
    """An ICAE with a chat template, so that tokens stand before the slots."""
    return make_icae(seed=3, tokenizer=make_tokenizer(chat_template=TEMPLATE))


@pytest.fixture
def memory(icae, random_ids):
    return icae.compress(random_ids(40))[0]


@pytest.fixture
def prompts(random_ids):
    return [random_ids(n, seed=n).tolist() for n in (5, 1, 11)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_from_scratch(make_icae, random_ids, model_kind, kind):
    icae = make_icae(model_kind)
    memory, ids = icae.compress(random_ids(40))[0], random_ids(9, seed=1)
    v = icae.vocabulary
    for task, special in (("answer", [v.ft]), ("restore", [v.ae]), ("continue", [v.lm]), ("slots", [])):
        x = torch.cat((memory.slots, icae.tokens_to_embeddings(torch.tensor([*special, *ids.tolist()]))))
        cache = icae.kv_cache(memory, task, kind=kind, max_cache_len=30, rows=2)
        with torch.no_grad():
            got = icae.base_model(input_ids=ids.expand(2, -1), past_key_values=cache).logits
            expected = icae.base_model(inputs_embeds=x[None]).logits[:, -len(ids) :]
        assert int(cache.get_seq_length()) == len(x)
        assert_same_logits(got, expected.expand_as(got))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_icae_generate(make_icae, random_ids, prompts, model_kind, kind):
    icae = make_icae(model_kind)
    memory = icae.compress(random_ids(40))[0]
    for asked in (prompts, prompts[:1], [prompts[0], prompts[0][::-1]]):
        inputs = icae.generation_inputs(memory, asked, N, cache=kind)
        ids = icae.base_model.generate(**inputs, do_sample=False, min_new_tokens=3)
        assert trimmed(icae, ids) == icae.generate(memory, asked, N, min_new_tokens=3, return_ids=True)
    ids = icae.base_model.generate(**icae.generation_inputs(memory, max_new_tokens=N, cache=kind), do_sample=False)
    assert trimmed(icae, ids) == [icae.restore(memory, N, return_ids=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_every_step_equal_those_from_scratch(make_icae, random_ids, prompts, model_kind, kind):
    icae = make_icae(model_kind)
    icae.base_model.generation_config.eos_token_id = None
    memory = icae.compress(random_ids(40))[0]
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    inputs = icae.generation_inputs(memory, prompts, N, cache=kind)
    got = icae.base_model.generate(**inputs, **options)
    expected = icae.base_model.generate(**scratch_inputs(icae, memory, prompts), **options)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert_same_logits(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("prompt_format", ["chat", "plain", "v1"])
def test_generation_from_a_cache_in_every_prompt_format(make_icae, make_tokenizer, random_ids, prompts, prompt_format):
    icae = make_icae(prompt_format=prompt_format, tokenizer=make_tokenizer(chat_template=TEMPLATE))
    memory = icae.compress(random_ids(40))[0]
    ids = icae.base_model.generate(**icae.generation_inputs(memory, prompts, N), do_sample=False)
    assert trimmed(icae, ids) == icae.generate(memory, prompts, N, return_ids=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
        {"do_sample": True, "repetition_penalty": 1.3, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 3},
    ],
    ids=["sampling", "several-samples", "beams", "several-beams", "sampled-beams"],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_sampling_and_beams_equal_those_from_scratch(icae, memory, prompts, kind, options, rows):
    own = {n: options[n] for n in ("num_beams", "num_return_sequences") if n in options}
    inputs = icae.generation_inputs(memory, prompts[:rows], N, cache=kind, **own)
    before = tree_copy(icae)
    assert {n: inputs[n] for n in own} == own
    with torch.random.fork_rng():
        torch.manual_seed(1)
        got = icae.base_model.generate(**(inputs | options))
        torch.manual_seed(1)
        expected = icae.base_model.generate(**scratch_inputs(icae, memory, prompts[:rows]), **options)
    assert got.tolist() == expected.tolist()
    assert len(got) == rows * options.get("num_return_sequences", 1)
    for (_, keys, values), (_, k, v) in zip(before, tree_copy(icae), strict=True):
        assert torch.equal(keys, k)
        assert torch.equal(values, v)


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_streamer_receives_the_answer(icae, memory, skip_prompt):
    expected = icae.generate(memory, "w5 w6 w7", N)[0]
    streamer = TextIteratorStreamer(icae.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True, timeout=60)
    inputs = icae.generation_inputs(memory, "w5 w6 w7", N)
    thread = Thread(target=icae.base_model.generate, kwargs={**inputs, "do_sample": False, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == expected


def test_generated_ids_hold_only_the_answer(icae, memory):
    questions = ["w5 w6", "w7"]
    ids = icae.base_model.generate(**icae.generation_inputs(memory, questions, N), do_sample=False)
    assert icae.tokenizer.batch_decode(ids, skip_special_tokens=True) == icae.generate(memory, questions, N)


def test_generate_from_ids_and_a_cache(make_icae, random_ids):
    """`kv_cache` documents this use: arbitrary ids in the cached positions, and a mask over all positions."""
    icae = make_icae()
    icae.base_model.generation_config.eos_token_id = None
    memory, ids = icae.compress(random_ids(40))[0], random_ids(5, seed=5)[None]
    options = {"max_new_tokens": N, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = icae.base_model.generate(inputs_embeds=embeddings(icae, memory, ids[0]), **options)
    for kind in KINDS:
        cache = icae.kv_cache(memory, kind=kind, max_cache_len=40)
        whole = torch.nn.functional.pad(ids, (int(cache.get_seq_length()), 0))
        got = icae.base_model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=cache, **options)
        assert got.sequences[:, whole.shape[1] :].tolist() == expected.sequences.tolist()
        assert_same_logits(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("kind", ["embeddings", "ids"])
def test_transformers_silently_truncates_inputs_without_the_cached_positions(make_icae, random_ids, kind):
    """Show why `generation_inputs` and `kv_cache` require inputs of full length.

    Without the cached positions transformers raises nothing: it takes the input for the whole sequence and cuts off as
    many tokens as are cached. If this test fails, transformers has changed, and `generation_inputs` may be simplified.
    """
    icae = make_icae()
    memory, prompt = icae.compress(random_ids(16))[0], random_ids(11, seed=5)[None]
    x = torch.cat((icae.tokens_to_embeddings(torch.tensor([[icae.vocabulary.ft]])), icae.embed(prompt)), 1).detach()
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    task, inputs = ("slots", {"inputs_embeds": x}) if kind == "embeddings" else ("answer", {"input_ids": prompt})
    naive = icae.base_model.generate(**inputs, past_key_values=icae.kv_cache(memory, task), **options).logits[0]
    n = next(iter(inputs.values())).shape[1]
    n_kept = n - icae.kv_cache(memory, task).get_seq_length()
    assert 0 < n_kept < n
    with torch.no_grad():
        expected = icae.base_model(inputs_embeds=embeddings(icae, memory, prompt[0])).logits[:, -1]
        as_it_does = icae.base_model(
            inputs_embeds=x[:, -n_kept:],
            past_key_values=icae.kv_cache(memory, task),
            position_ids=torch.arange(n)[None, -n_kept:],
        ).logits[:, -1]
        forward = icae.base_model(inputs_embeds=x, past_key_values=icae.kv_cache(memory, "slots")).logits[:, -1]
    assert (naive - expected).abs().max() > 0.01 * expected.abs().max()
    assert_same_logits(naive, as_it_does)
    assert_same_logits(forward, expected)  # the forward, unlike `generate`, places embeddings behind the cache


def test_transformers_mishandles_a_prompt_shorter_than_the_cache(make_icae, random_ids):
    """With fewer embeddings than cached tokens, transformers' truncation yields wrong logits or an error."""
    icae = make_icae()
    memory, prompt = icae.compress(random_ids(40))[0], random_ids(7, seed=5)
    whole = embeddings(icae, memory, prompt)
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        expected = icae.base_model(inputs_embeds=whole).logits[:, -1]
    try:
        naive = icae.base_model.generate(
            inputs_embeds=whole[:, memory.n_slots :], past_key_values=icae.kv_cache(memory, "slots"), **options
        )
    except (IndexError, RuntimeError):  # transformers 5.0
        return
    assert (naive.logits[0] - expected).abs().max() > 0.01 * expected.abs().max()


def test_rows_of_a_cache_share_one_copy(make_icae, random_ids):
    icae = make_icae()
    memory = icae.compress(random_ids(16))[0]
    cache = icae.kv_cache(memory, "slots", rows=5)
    (segment,) = icae.slot_kv.path([memory.slots])
    for layer in cache.layers:
        for mine, theirs in ((layer.keys, segment.keys), (layer.values, segment.values)):
            assert mine.shape == (5, 2, 4, 8)
            assert mine.untyped_storage().nbytes() == 2 * 4 * 8 * 4
            assert mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


def test_changing_a_cache_leaves_the_tree_unchanged(make_icae, model_kind, random_ids):
    icae = make_icae(model_kind)
    memory = icae.compress(random_ids(16))[0]
    icae.kv_cache(memory, "slots")
    before, new = tree_copy(icae), torch.ones(2, icae.backbone.num_kv_heads, 1, icae.backbone.head_dim)
    changes = {
        "grow": lambda c: [c.update(new, new, i) for i in range(3)],
        "reorder": lambda c: c.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda c: c.batch_repeat_interleave(2),
        "select": lambda c: c.batch_select_indices(torch.tensor([1])),
        "crop": lambda c: c.crop(-1),
        "reset": lambda c: c.reset(),
    }
    for name, change in changes.items():
        change(cache := icae.kv_cache(memory, "slots", rows=2))
        if name != "reset":
            for layer in cache.layers:
                layer.keys.zero_()
        for (_, keys, values), (_, k, v) in zip(before, tree_copy(icae), strict=True):
            assert torch.equal(keys, k), name
            assert torch.equal(values, v), name


def test_a_dynamic_cache_equals_one_filled_by_update(make_icae, model_kind, random_ids):
    """`dynamic_cache` sets the attributes that `update` sets, without its copy; later transformers may set more."""
    icae = make_icae(model_kind)
    memory = icae.compress(random_ids(40))[0]
    path = icae.slot_kv.path(list(memory.slots.split(4)))
    ours, theirs = dynamic_cache(icae.base_model.config, [path]), DynamicCache(config=icae.base_model.config)
    for i in range(3):
        both = (torch.cat([getattr(s, n)[i] for s in path])[None].transpose(1, 2) for n in ("keys", "values"))
        theirs.update(*both, i)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is type(other)
        assert vars(mine).keys() == vars(other).keys()
        for name, value in vars(mine).items():
            expected = vars(other)[name]
            assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected, name


def test_using_a_cache_changes_no_later_answer(icae, memory, prompts):
    inputs = icae.generation_inputs(memory, prompts, N)
    first = icae.base_model.generate(**inputs, do_sample=False)
    again = icae.base_model.generate(**icae.generation_inputs(memory, prompts, N), do_sample=False)
    assert first.tolist() == again.tolist()
    assert inputs["past_key_values"].get_seq_length() > inputs["inputs_embeds"].shape[1]


def test_bad_arguments_are_refused(icae, memory):
    refusals = [
        ("task is 'ask'", lambda: icae.kv_cache(memory, "ask")),
        ("rows is 0", lambda: icae.kv_cache(memory, rows=0)),
        ("kind is 'paged'", lambda: icae.kv_cache(memory, kind="paged")),
        ("max_cache_len=None has no room", lambda: icae.kv_cache(memory, kind="static")),
        ("max_cache_len=16 has no room", lambda: icae.kv_cache(memory, kind="static", max_cache_len=16)),
        ("expected one Memory", lambda: icae.kv_cache([memory])),
        ("max_new_tokens is 0", lambda: icae.generation_inputs(memory, [5], 0)),
        ("num_beams is 0", lambda: icae.generation_inputs(memory, [5], num_beams=0)),
        ("num_return_sequences is True", lambda: icae.generation_inputs(memory, [5], num_return_sequences=True)),
        ("the list is empty", lambda: icae.generation_inputs(memory, [])),
        ("cache is None", lambda: icae.generation_inputs(memory, [5], cache=None)),
    ]
    for message, call in refusals:
        with pytest.raises(InvalidInputError, match=message):
            call()
    assert icae.kv_cache(memory, kind="static", max_cache_len=17).get_seq_length() == 16


def test_more_tokens_than_positions_are_refused(icae, memory):
    prompt = [5] * 200  # 218 positions in all: 3 of the template, 12 slots, FT, prompt, 2 of the template
    assert icae.generation_inputs(memory, prompt, 256 - 218)["inputs_embeds"].shape == (1, 218, 32)
    with pytest.raises(ContextTooLongError, match="218 positions and 39 more"):
        icae.generation_inputs(memory, prompt, 256 - 217)
    icae.max_positions = 16
    with pytest.raises(ContextTooLongError, match="16 positions and 1 more"):
        icae.kv_cache(memory)


def test_generation_from_a_cache_on_smollm2(smollm2, long_text):
    from icae_fast import ICAE, ICAEConfig

    with torch.random.fork_rng():
        torch.manual_seed(11)
        icae = ICAE.from_base(smollm2[0], ICAEConfig(memory_size=16, lora_rank=4), smollm2[1]).eval()
    memory = icae.compress(long_text[:600])[0]
    assert len(memory.span_lengths) > 1
    questions = ["Who kept the light?", "In one short sentence, what is this text about?"]
    inputs = icae.generation_inputs(memory, questions, 6)
    options = {"do_sample": False, "min_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    got = icae.base_model.generate(**inputs, **options)
    scratch = scratch_inputs(icae, memory, questions) | {"max_new_tokens": 6}
    expected = icae.base_model.generate(**scratch, **options)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert got.sequences.tolist() == icae.generate(memory, questions, 6, min_new_tokens=6, return_ids=True)
    assert_same_logits(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("assisted", ["prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit"])
def test_assisted_decoding_is_refused(icae, make_base, random_ids, assisted):
    memory = icae.compress(random_ids(40))[0]
    options = {assisted: make_base(seed=5) if assisted == "assistant_model" else 2, "do_sample": False}
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    cache = icae.kv_cache(memory)
    padded = torch.nn.functional.pad(ids, (int(cache.get_seq_length()), 0))
    kept = {"input_ids": padded, "attention_mask": torch.ones_like(padded), "past_key_values": cache}
    for inputs in (icae.generation_inputs(memory, ids.tolist(), N), kept | {"max_new_tokens": N}):
        with pytest.raises(InvalidInputError, match=r"assisted decoding reads the whole input again, .* without assis"):
            icae.base_model.generate(**inputs, **options)
        assert icae.base_model.generate(**inputs, do_sample=False).shape[1] >= N  # nothing was read meanwhile


def test_a_cache_that_was_read_on_can_be_cropped(make_icae, random_ids):
    icae = make_icae("mistral")
    cache = icae.kv_cache(icae.compress(random_ids(40))[0])
    n = cache.get_seq_length()
    icae.base_model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    cache.activate_past_recording()  # generate does so on CUDA, behind the prompt
    icae.base_model(input_ids=torch.tensor([[6, 7]]), past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == n + 1
