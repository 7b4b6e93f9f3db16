"""A local chat model and its batches."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from icae_fast.errors import ChatModelError, TokenizerMismatchError
from training.chat.local import LocalModel

MESSAGES = ["the cat", "the cat sat on the mat, the cat sat on the mat", "naïve café"]


@pytest.fixture
def chat_model(make_base, byte_tokenizer, one_thread):
    """A random model that ends its greedy answers within 64 tokens."""
    model = make_base(vocab_size=320)
    model.generation_config.eos_token_id = list(range(2, 320, 4))
    return LocalModel(model, byte_tokenizer, "tiny", batch_size=3, max_answer_tokens=64)


def ask_all(chat_model, messages):
    async def run():
        async with chat_model:
            return await asyncio.gather(*(chat_model.ask(m, str) for m in messages), return_exceptions=True)

    return asyncio.run(run())


def test_a_batch_answers_as_each_row_alone_would(chat_model):
    rows = [chat_model._encode(message) for message in MESSAGES]
    together = chat_model._generate(rows)
    assert together == [chat_model._generate([row])[0] for row in rows]
    for row, answer in zip(rows, together, strict=True):
        ids = torch.tensor([row])
        for token in answer:
            assert chat_model.model(input_ids=ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_questions_of_a_moment_share_a_batch_and_get_their_own_answers(chat_model, monkeypatch):
    sizes, generate = [], chat_model._generate
    monkeypatch.setattr(chat_model, "_generate", lambda rows: sizes.append(len(rows)) or generate(rows))
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
    def fail(rows):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(chat_model, "_generate", fail)
    results = ask_all(chat_model, MESSAGES)
    assert all(isinstance(r, ChatModelError) and "answer fewer together" in str(r) for r in results)


def test_cancelling_ends_a_batch_under_way(make_base, byte_tokenizer, one_thread):
    model = make_base(vocab_size=320, max_position_embeddings=10**6)
    model.generation_config.eos_token_id = 2
    with torch.no_grad():
        model.lm_head.weight[2] = 0.0
        model.lm_head.weight[3:] = model.lm_head.weight[3]  # all alike, so that the end is never the likeliest
    chat_model = LocalModel(model, byte_tokenizer, "tiny", max_answer_tokens=900_000)

    async def run():
        async with chat_model:
            asking = asyncio.create_task(chat_model.ask("the cat", str))
            await asyncio.sleep(0.5)
            asking.cancel()

    asyncio.run(run())  # which waits for the thread that generates


def test_a_model_without_an_end_is_refused(make_base):
    model = make_base()
    model.generation_config.eos_token_id = None
    with pytest.raises(TokenizerMismatchError, match="end-of-sequence"):
        LocalModel(model, SimpleNamespace(eos_token_id=None), "tiny")
