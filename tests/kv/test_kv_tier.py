"""The KV tier: slot keys and values go from the tree to a store and back, and the answers stay the same."""

import logging
import uuid

import pytest
import torch

from helpers.store import file_of, memory_for
from icae_fast import MemoryStore, SlotKV, errors
from icae_fast.generation.memory_kv import memory_pieces

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = "<bos> w90 w91 {{ messages[0]['content'] }} w92{% if add_generation_prompt %} w93{% endif %}"
PREFIX = (1, 90, 91)
QUESTIONS = [[5, 6], [7, 8, 9]]


@pytest.fixture
def make_model(make_icae, make_tokenizer):
    """`make_model(kind="llama", **config)`: always the same model, with a template and without end-of-sequence ids."""

    def make(kind="llama", template=TEMPLATE, **fields):
        icae = make_icae(kind, seed=3, tokenizer=make_tokenizer(chat_template=template), **fields)
        icae.base_model.generation_config.eos_token_id = []
        return icae

    return make


@pytest.fixture
def icae(make_model):
    return make_model()


@pytest.fixture
def memory(icae, random_ids):
    """A memory of three spans, the last one shorter than the others."""
    return icae.compress(random_ids(40))[0]


def answers(icae, memory):
    return icae.generate(memory, QUESTIONS, 5, return_ids=True)


def logits(icae, memory):
    """Return the logits at every token of a prompt, computed behind the memory's cache."""
    cache = icae.kv_cache(memory)
    with torch.no_grad():
        return icae.base_model(input_ids=torch.tensor([QUESTIONS[1]]), past_key_values=cache).logits


def assert_same(got, expected):
    """Check that tensors are equal to within 1e-5 of the largest value."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def read_by(icae, memory):
    """Return the segments of a memory's spans that `generate` reads."""
    return icae.slot_kv.path(memory_pieces(icae, memory, icae.prefix_ids))[1:]


@pytest.mark.parametrize("prompt_format", ["chat", "plain", "v1"])
def test_answers_from_the_store_equal_computed_ones(
    tmp_path, make_model, model_kind, random_ids, count_tokens, prompt_format
):
    icae, reader = (make_model(model_kind, prompt_format=prompt_format) for _ in range(2))
    memory = icae.compress(random_ids(40))[0]
    n_prefix = len(icae.prefix_ids)
    assert n_prefix == (3 if prompt_format == "chat" else 0)
    MemoryStore(tmp_path, icae).put("a", memory, kv=True)
    calls = count_tokens(reader)
    kept = MemoryStore(tmp_path, reader, create=False).get("a", kv=True)
    assert calls == [n_prefix] * (n_prefix > 0)
    calls.clear()
    icae.clear_kv()
    found = answers(reader, kept)
    n_prompts = sum(len(icae.prompt_ids(q)[1]) for q in QUESTIONS)
    assert calls == [n_prompts, 2, 2, 2, 2]  # no slot among these
    assert found == answers(icae, memory)
    assert_same(logits(reader, kept), logits(icae, memory))


def test_memory_kv_equals_what_the_decoder_computes(icae, memory, count_tokens):
    calls = count_tokens(icae)
    kv = icae.memory_kv(memory)
    assert calls == [3 + 12]
    assert (kv.prefix_ids, kv.start, kv.nbytes) == (PREFIX, 3, 2 * 3 * 12 * 2 * 8 * 4)
    assert torch.equal(kv.keys, torch.cat([s.keys for s in read_by(icae, memory)], 1))
    assert torch.equal(kv.values, torch.cat([s.values for s in read_by(icae, memory)], 1))
    assert kv.keys.transpose(1, 2).is_contiguous()
    assert kv.values.transpose(1, 2).is_contiguous()
    bare = icae.memory_kv(memory, "restore")
    assert calls == [3 + 12, 12]
    assert bare.prefix_ids == ()
    icae.clear_kv()
    assert icae.adopt_kv(memory, bare)
    calls.clear()
    icae.restore(memory, 1, return_ids=True)
    assert calls == [1]


def test_an_extended_memory_from_the_store_computes_only_its_new_spans(
    tmp_path, make_model, memory, icae, random_ids, count_tokens
):
    MemoryStore(tmp_path, icae).put("a", memory, kv=True)
    reader = make_model()
    kept = MemoryStore(tmp_path, reader).get("a", kv=True)
    longer = reader.extend(kept, random_ids(20, seed=1))
    calls = count_tokens(reader)
    found = answers(reader, longer)
    assert calls[0] == 8
    assert len(calls) == 1 + 5
    icae.clear_kv()
    assert found == answers(icae, icae.extend(memory, random_ids(20, seed=1)))
    assert_same(logits(reader, longer), logits(icae, longer))


def mapping_of(path):
    """Return the address range (start, end) of each memory mapping of a file."""
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps if line.rstrip().endswith(str(path))]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


def test_stored_tensors_stay_in_the_mapped_file(tmp_path, make_model, icae, memory):
    store = MemoryStore(tmp_path, icae)
    store.put("a", memory, kv=True)
    reader = make_model()
    kept = MemoryStore(tmp_path, reader).get("a", kv=True)
    ((start, end),) = mapping_of(file_of(store))
    k, heads, size = 4, 2, 8
    for i, segment in enumerate(read_by(reader, kept)):
        for t in (segment.keys, segment.values):
            assert start <= t.data_ptr() < end
            assert start <= t.untyped_storage().data_ptr() < end
            assert t.stride() == (heads * 3 * k * size, size, 3 * k * size, 1)  # a head's elements are contiguous
        assert segment.start == 3 + i * k
    assert reader.slot_kv.nbytes == icae.slot_kv.nbytes
    reader.clear_kv()
    del kept, segment, t
    assert mapping_of(file_of(store)) == []


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_stored_keys_and_values_belong_to_the_rounded_slots(tmp_path, make_model, icae, memory, count_tokens, dtype):
    store = MemoryStore(tmp_path, icae, dtype=dtype)
    store.put("a", memory, kv=True)
    reader = make_model()
    kept = MemoryStore(tmp_path, reader).get("a", kv=True)
    calls = count_tokens(reader)
    found, scores = answers(reader, kept), logits(reader, kept)
    assert 12 not in calls
    reader.clear_kv()
    assert found == answers(reader, kept)
    assert_same(scores, logits(reader, kept))


def test_bfloat16_models_store_keys_and_values_exactly(tmp_path, make_icae, make_base, random_ids, count_tokens):
    icae = make_icae(base=make_base().bfloat16())
    memory = icae.compress(random_ids(40))[0]
    store = MemoryStore(tmp_path, icae)
    store.put("a", memory, kv=True)
    computed = icae.memory_kv(memory)
    icae.clear_kv()
    kept = store.get("a", kv=True)
    calls = count_tokens(icae)
    segments = icae.slot_kv.path(memory_pieces(icae, kept))
    assert calls == []
    assert torch.equal(torch.cat([s.keys for s in segments], 1), computed.keys)
    assert torch.equal(torch.cat([s.values for s in segments], 1), computed.values)
    assert torch.equal(kept.slots, memory.slots)


def test_keys_of_another_dtype_are_not_adopted(tmp_path, make_icae, random_ids):
    """With keys rounded to bf16, an fp32 model's answers would be neither those of fp32 nor those of bf16."""
    wide, narrow = make_icae(), make_icae()
    narrow.base_model.bfloat16()
    MemoryStore(tmp_path, narrow).put("a", narrow.compress(random_ids(40))[0], kv=True)
    store = MemoryStore(tmp_path, wide)
    kept = store.get("a", kv=True)
    assert kept.slots.dtype == torch.float32
    assert len(wide.slot_kv) == 0
    with pytest.raises(errors.InvalidInputError, match=r"torch.bfloat16 .* takes .* torch.float32"):
        wide.adopt_kv(kept, MemoryStore(tmp_path).get_kv("a"))


def test_keys_behind_another_prefix_are_not_adopted(tmp_path, make_model, icae, memory, count_tokens):
    store = MemoryStore(tmp_path, icae)
    store.put("a", memory, kv=True)
    store.put("bare", memory)
    expected = answers(icae, memory)
    for other in (make_model(prompt_format="plain"), make_model(template=TEMPLATE.replace("w91", "w80"))):
        calls = count_tokens(other)
        kept = MemoryStore(tmp_path, other).get("a", kv=True)
        assert (len(other.slot_kv), calls) == (0, [])
        found = answers(other, kept)
        assert calls[0] == len(other.prefix_ids) + 12
        assert found == answers(other, memory)
        assert found != expected
    icae.clear_kv()
    assert answers(icae, store.get("bare", kv=True)) == expected


def test_entries_of_another_model_or_adapter_are_refused(tmp_path, make_model, make_icae, icae, memory):
    MemoryStore(tmp_path, icae).put("a", memory, kv=True)
    other = make_icae(seed=5)
    with pytest.raises(errors.BaseModelMismatchError, match=r"entry 'a' of the store .*other weights"):
        MemoryStore(tmp_path, other).get("a", kv=True)
    trained = make_model()
    with torch.no_grad():
        trained.memory_token_embed.weight[0, 0] += 1
    with pytest.raises(errors.BaseModelMismatchError, match=r"entry 'a' .* another adapter"):
        MemoryStore(tmp_path, trained).get("a", kv=True)
    assert len(other.slot_kv) == len(trained.slot_kv) == 0


@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_flipped_byte_is_reported_and_nothing_is_adopted(tmp_path, make_model, icae, memory, name):
    store = MemoryStore(tmp_path, icae)
    store.put("a", memory, kv=True)
    path, stored = file_of(store), getattr(store.get_kv("a"), name)
    content = bytearray(path.read_bytes())
    at = content.index(stored.transpose(1, 2).contiguous().numpy().tobytes()) + stored.nbytes // 2
    del stored
    content[at] ^= 1
    path.write_bytes(content)
    reader = make_model()
    opened = MemoryStore(tmp_path, reader)
    with pytest.raises(errors.CheckpointError, match=f"entry 'a' of the store .* checksum of its {name} is wrong"):
        opened.get("a", kv=True)
    assert len(reader.slot_kv) == 0
    assert torch.equal(opened.get("a").slots, memory.slots)  # the slots have a separate checksum
    with pytest.raises(errors.CheckpointError, match=r"its file .* is missing"):
        path.unlink(), opened.get("a", kv=True)


def test_a_budget_too_small_for_an_entry_logs_a_warning(tmp_path, make_model, icae, memory, count_tokens, caplog):
    MemoryStore(tmp_path, icae).put("a", memory, kv=True)
    reader = make_model()
    reader.kv_budget = icae.slot_kv.nbytes - 1
    calls = count_tokens(reader)
    with caplog.at_level(logging.WARNING, "icae_fast"):
        kept = MemoryStore(tmp_path, reader).get("a", kv=True)
    assert "entry 'a' of the store" in caplog.text
    assert f"icae.kv_budget={reader.kv_budget}" in caplog.text
    assert (len(reader.slot_kv), calls) == (0, [])
    assert answers(reader, kept) == answers(icae, memory)
    caplog.clear()
    reader.kv_budget += 1
    MemoryStore(tmp_path, reader).get("a", kv=True)
    assert caplog.text == ""
    assert len(reader.slot_kv) == 4


def test_keys_and_values_that_are_left_aside_are_logged(tmp_path, make_model, icae, memory, caplog):
    MemoryStore(tmp_path, icae).put("a", memory, kv=True)
    reader = make_model()
    reader.tokenizer.chat_template = TEMPLATE.replace("w91", "{{ strftime_now('w%d') }}")
    with caplog.at_level(logging.WARNING, "icae_fast"):
        kept = MemoryStore(tmp_path, reader).get("a", kv=True)
    assert "entry 'a' of the store" in caplog.text
    assert "left aside: they belong to another prefix of the chat template (3 tokens against 3 now)" in caplog.text
    assert len(reader.slot_kv) == 0
    reader.chat_template_kwargs = {"date_string": "w91"}  # as it was
    caplog.clear()
    MemoryStore(tmp_path, reader).get("a", kv=True)
    assert caplog.text == ""
    assert answers(reader, kept) == answers(icae, memory)


def test_store_compress_can_keep_keys_and_values(tmp_path, make_model, icae, random_ids, count_tokens):
    texts = [random_ids(40), random_ids(9, seed=1)]
    store = MemoryStore(tmp_path, icae, dtype="int8")
    calls = count_tokens(icae)
    first = store.compress(texts, kv=True)
    expected = [answers(icae, m) for m in first]
    assert {store.get_kv(store.key_of(t)).prefix_ids for t in texts} == {PREFIX}
    assert sum(calls[2:]) < sum(calls[:2])
    reader = make_model()
    again = MemoryStore(tmp_path, reader, dtype="int8").compress(texts, kv=True)
    calls = count_tokens(reader)
    assert [answers(reader, m) for m in again] == expected
    assert calls == [sum(len(icae.prompt_ids(q)[1]) for q in QUESTIONS), 2, 2, 2, 2] * 2


def test_store_compress_adds_missing_keys_and_values(tmp_path, make_model, icae, random_ids):
    text = random_ids(40)
    store = MemoryStore(tmp_path, icae, dtype="int8")
    (bare,) = store.compress(text)
    header = store.header(store.key_of(text))
    assert store.get_kv(store.key_of(text)) is None
    (kept,) = store.compress(text, kv=True)
    assert torch.equal(kept.slots, bare.slots)
    assert torch.equal(store.get(store.key_of(text)).slots, bare.slots)  # not rounded a second time
    new = store.header(store.key_of(text))
    assert new["kv_prefix_ids"] == list(PREFIX)
    for changing in ("kv_prefix_ids", "created"):
        del header[changing], new[changing]
    assert new == header
    plain = make_model(prompt_format="plain")
    MemoryStore(tmp_path, plain).compress(text, kv=True)
    assert store.get_kv(store.key_of(text)).prefix_ids == ()
    path = file_of(store)
    store.compress(text)  # without kv=True, stored keys and values stay
    MemoryStore(tmp_path, plain).compress(text, kv=True)
    assert file_of(store) == path


def test_remote_stores_keep_keys_and_values_too(icae, make_model, memory, count_tokens):
    address = f"memory://{uuid.uuid4().hex}"
    MemoryStore(address, icae).put("a", memory, kv=True)
    reader = make_model()
    kept = MemoryStore(address, reader).get("a", kv=True)
    calls = count_tokens(reader)
    assert answers(reader, kept) == answers(icae, memory)
    assert 12 not in calls


def test_tensors_adopted_in_inference_mode_are_plain(tmp_path, icae, memory, make_model):
    with torch.inference_mode():
        MemoryStore(tmp_path, icae).put("a", memory, kv=True)
    reader = make_model()
    with torch.inference_mode():
        kept = MemoryStore(tmp_path, reader).get("a", kv=True)
    assert not any(s.keys.is_inference() or s.values.is_inference() for s in read_by(reader, kept))
    assert answers(reader, kept) == answers(icae, memory)


def test_bad_input_changes_nothing(tmp_path, icae, memory, random_ids, store):
    kv = icae.memory_kv(memory)
    icae.clear_kv()
    nan = torch.full_like(kv.keys, float("nan"))
    other = icae.compress(random_ids(9))[0]
    for spoilt, message in [
        (kv.keys, "expected a SlotKV and got Tensor"), (None, "got NoneType"),
        (SlotKV(kv.keys[:, 1:], kv.values, PREFIX), r"keys are \(3, 11, 2, 8\)"),
        (SlotKV(kv.keys, kv.values.double(), PREFIX), "in one floating dtype"),
        (SlotKV(kv.keys[..., :4], kv.values[..., :4], PREFIX), r"\(3, 4, 2, 4\)"),
        (SlotKV(kv.keys, kv.values, (1, "w90")), "prefix_ids are"),
        (SlotKV(kv.keys, kv.values, (1, 500)), "the id 500"),
    ]:  # fmt: skip
        with pytest.raises(errors.InvalidInputError, match=message):
            icae.adopt_kv(memory, spoilt)
    with pytest.raises(errors.InvalidInputError, match="4 slots"):
        icae.adopt_kv(other, kv)
    with pytest.raises(errors.InvalidInputError, match="task is 'all'"):
        icae.memory_kv(memory, "all")
    with pytest.raises(errors.InvalidInputError, match="no slots"):
        icae.memory_kv(type(memory)(memory.slots[:0], 0, ()))
    assert len(icae.slot_kv) == 0
    own = MemoryStore(tmp_path / "own", icae)
    with pytest.raises(errors.NonFiniteError, match="keys and values"):
        own.put("a", memory, kv=SlotKV(nan, kv.values, PREFIX))
    with pytest.raises(errors.InvalidInputError, match="expected a SlotKV and got str"):
        own.put("a", memory, kv="yes")
    assert len(own) == 0
    store.put("a", memory_for("a"))
    for call in (lambda: store.put("b", memory_for("b"), kv=True), lambda: store.get("a", kv=True)):
        with pytest.raises(errors.InvalidInputError, match="opened without an ICAE"):
            call()
    assert list(store) == ["a"]


def test_the_error_for_non_finite_keys_names_the_weight(icae, memory):
    icae.base_model.model.layers[0].self_attn.v_proj.weight.data[0] = float("nan")
    with pytest.raises(errors.NonFiniteError, match=r"keys and values .*layers\.0\.self_attn\.v_proj"):
        icae.memory_kv(memory)
