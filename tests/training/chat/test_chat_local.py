"""A local chat model and its batches."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from icae_fast.errors import ChatModelError, TokenizerMismatchError
from icae_fast.training.chat.local import LocalModel
from icae_fast.training.chat.writing import OwnWriter, TransformersWriter, writer_of

MESSAGES = ["the cat", "the cat sat on the mat, the cat sat on the mat", "naïve café"]


ENDS = range(2, 320, 4)


@pytest.fixture
def chat_model(make_base, byte_tokenizer, one_thread):
    """Return a random model that ends its greedy answers within 64 tokens."""
    model = make_base(vocab_size=320)
    model.generation_config.eos_token_id = list(ENDS)
    return LocalModel(model, byte_tokenizer, "tiny", batch_size=3, max_answer_tokens=64)


def ask_all(chat_model, messages):
    async def run():
        async with chat_model:
            return await asyncio.gather(*(chat_model.ask(m, str) for m in messages), return_exceptions=True)

    return asyncio.run(run())


def go_on() -> bool:
    return False


@pytest.mark.parametrize("kind", [OwnWriter, TransformersWriter])
def test_a_batch_answers_as_each_row_alone_would(chat_model, byte_tokenizer, kind):
    own = chat_model.writer
    assert isinstance(own, OwnWriter)
    writer = own if kind is OwnWriter else TransformersWriter(chat_model.model, byte_tokenizer, ENDS, 64, None)
    rows = [chat_model._encode(message) for message in MESSAGES]
    together = writer.write(rows, go_on)
    assert together == [writer.write([row], go_on)[0] for row in rows]
    for row, answer in zip(rows, together, strict=True):
        ids = torch.tensor([row])
        for token in answer:
            assert chat_model.model(input_ids=ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("kind", [OwnWriter, TransformersWriter])
def test_answers_are_drawn_at_a_temperature(chat_model, byte_tokenizer, kind):
    if kind is OwnWriter:
        writer = writer_of(chat_model.model, byte_tokenizer, ENDS, 8, 50.0)
        assert isinstance(writer, OwnWriter)
    else:
        writer = TransformersWriter(chat_model.model, byte_tokenizer, ENDS, 8, 50.0)
    row = chat_model._encode(MESSAGES[0])
    torch.manual_seed(0)
    drawn = writer.write([row] * 16, go_on)
    assert len(set(map(tuple, drawn))) > 8
    torch.manual_seed(0)
    assert writer.write([row] * 16, go_on) == drawn


def test_a_model_that_the_decoder_does_not_know_answers_by_generate(byte_tokenizer, one_thread, caplog):
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 320, "initializer_range": 1.0}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = list(ENDS)
    chat_model = LocalModel(model, byte_tokenizer, "gpt2", max_answer_tokens=64)
    assert "'gpt2' are not supported" in caplog.text
    assert chat_model.settings["decoder"] == chat_model.writer.name == "transformers"
    answers = ask_all(chat_model, MESSAGES)
    expected = [chat_model.writer.write([chat_model._encode(m)], go_on)[0] for m in MESSAGES]
    assert answers == [byte_tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


def test_questions_of_a_moment_share_a_batch_and_get_their_own_answers(chat_model, monkeypatch):
    sizes, write = [], chat_model.writer.write
    monkeypatch.setattr(chat_model.writer, "write", lambda rows, stop: sizes.append(len(rows)) or write(rows, stop))
    alone = [ask_all(chat_model, [message])[0] for message in MESSAGES]
    sizes.clear()
    assert [str(a) for a in ask_all(chat_model, MESSAGES * 2)] == [str(a) for a in alone * 2]
    assert sizes == [3, 3]


def test_the_chat_template_is_used(chat_model, byte_tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    assert byte_tokenizer.decode(chat_model._encode("the cat")) == "<user>the cat<a>"


def test_a_batch_that_does_not_fit_in_memory_is_one_error(chat_model, monkeypatch):
    def fail(rows, cancelled):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(chat_model.writer, "write", fail)
    results = ask_all(chat_model, MESSAGES)
    assert all(isinstance(r, ChatModelError) and "use a smaller batch" in str(r) for r in results)


@pytest.mark.parametrize("kind", [OwnWriter, TransformersWriter])
def test_cancelling_ends_a_batch_under_way(make_base, byte_tokenizer, one_thread, kind):
    model = make_base(vocab_size=320, max_position_embeddings=10**6)
    model.generation_config.eos_token_id = 2
    with torch.no_grad():
        model.lm_head.weight[2] = 0.0
        model.lm_head.weight[3:] = model.lm_head.weight[3]  # all alike, so that the end is never the likeliest
    chat_model = LocalModel(model, byte_tokenizer, "tiny", max_answer_tokens=900_000)
    if kind is TransformersWriter:
        chat_model.writer = TransformersWriter(model, byte_tokenizer, [2], 900_000, None)
    ended = []
    write = chat_model.writer.write

    def watched(rows, cancelled):
        ended.append(write(rows, cancelled))
        return ended[-1]

    chat_model.writer.write = watched

    async def run():
        async with chat_model:
            asking = asyncio.create_task(chat_model.ask("the cat", str))
            await asyncio.sleep(0.5)
            asking.cancel()

    asyncio.run(run())  # which waits for the thread that writes
    assert 1 <= len(ended[0][0]) < 900_000


def test_a_model_without_an_end_is_refused(make_base):
    model = make_base()
    model.generation_config.eos_token_id = None
    with pytest.raises(TokenizerMismatchError, match="end-of-sequence"):
        LocalModel(model, SimpleNamespace(eos_token_id=None), "tiny")
