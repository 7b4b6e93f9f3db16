"""The local teacher's batches."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from icae_fast.errors import TeacherError, TokenizerMismatchError
from training.pwc.local import LocalTeacher

MESSAGES = ["the cat", "the cat sat on the mat, the cat sat on the mat", "naïve café"]


@pytest.fixture
def teacher(make_base, byte_tokenizer, one_thread):
    """A random model that ends its greedy answers within 64 tokens."""
    model = make_base(vocab_size=320)
    model.generation_config.eos_token_id = list(range(2, 320, 4))
    return LocalTeacher(model, byte_tokenizer, "tiny", batch_size=3, max_answer_tokens=64)


def ask_all(teacher, messages):
    async def run():
        async with teacher:
            return await asyncio.gather(*(teacher.ask(m, str) for m in messages), return_exceptions=True)

    return asyncio.run(run())


def test_a_batch_answers_as_each_row_alone_would(teacher):
    rows = [teacher._encode(message) for message in MESSAGES]
    together = teacher._generate(rows)
    assert together == [teacher._generate([row])[0] for row in rows]
    for row, answer in zip(rows, together, strict=True):
        ids = torch.tensor([row])
        for token in answer:
            assert teacher.model(input_ids=ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_questions_of_a_moment_share_a_batch_and_get_their_own_answers(teacher, monkeypatch):
    sizes, generate = [], teacher._generate
    monkeypatch.setattr(teacher, "_generate", lambda rows: sizes.append(len(rows)) or generate(rows))
    alone = [ask_all(teacher, [message])[0] for message in MESSAGES]
    sizes.clear()
    assert [str(a) for a in ask_all(teacher, MESSAGES * 2)] == [str(a) for a in alone * 2]
    assert sizes == [3, 3]


def test_the_chat_template_is_used(teacher, byte_tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    assert byte_tokenizer.decode(teacher._encode("the cat")) == "<user>the cat<a>"


def test_a_batch_that_does_not_fit_in_memory_is_one_error(teacher, monkeypatch):
    def fail(rows):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(teacher, "_generate", fail)
    results = ask_all(teacher, MESSAGES)
    assert all(isinstance(r, TeacherError) and "smaller --batch-size" in str(r) for r in results)


def test_cancelling_ends_a_batch_under_way(make_base, byte_tokenizer, one_thread):
    model = make_base(vocab_size=320, max_position_embeddings=10**6)
    model.generation_config.eos_token_id = 2
    with torch.no_grad():
        model.lm_head.weight[2] = 0.0
        model.lm_head.weight[3:] = model.lm_head.weight[3]  # all alike, so that the end is never the likeliest
    teacher = LocalTeacher(model, byte_tokenizer, "tiny", max_answer_tokens=900_000)

    async def run():
        async with teacher:
            asking = asyncio.create_task(teacher.ask("the cat", str))
            await asyncio.sleep(0.5)
            asking.cancel()

    asyncio.run(run())  # which waits for the thread that generates


def test_a_model_without_an_end_is_refused(make_base):
    model = make_base()
    model.generation_config.eos_token_id = None
    with pytest.raises(TokenizerMismatchError, match="end-of-sequence"):
        LocalTeacher(model, SimpleNamespace(eos_token_id=None), "tiny")
