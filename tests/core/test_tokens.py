"""Text is text: the spelling of a control token becomes one in no tokenizer, unless it is asked for."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from icae_fast.core.tokens import control_tokens, encode_template, encode_text, encode_texts, encode_with_offsets
from icae_fast.errors import InvalidInputError, TokenizerMismatchError
from icae_fast.io import bundled

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LETTERS = "abcdefimnrst_|/<>[] "
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"


def unigram():
    """Like T5's: control tokens are pieces of the model, so it makes them of text without any added token."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS if c != " ")]
    backend = Tokenizer(models.Unigram([*pieces, ("▁ab", -1.0)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def byte_level(template=None, special=True, **options):
    """Bytes alone, with tokens of ChatML, a token that is no control token, and BOS added before each text."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, **options) for t in ("<s>", "</s>", "<unk>")])
    for content in ("<|im_start|>", "<|im_end|>", "    "):
        backend.add_tokens([AddedToken(content, special=special and content.strip() != "", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **SPECIAL)


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python: one token a character."""

    def __init__(self, **options):
        self.characters = {c: i for i, c in enumerate(["<s>", "</s>", "<unk>", *LETTERS])}
        super().__init__(**SPECIAL, **options)

    @property
    def vocab_size(self):
        return len(self.characters)

    def get_vocab(self):
        return self.characters | self.added_tokens_encoder

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.characters.get(token, 2)

    def _convert_id_to_token(self, index):
        return list(self.characters)[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


MADE = {
    "unigram": unigram(),
    "byte-level": byte_level(),
    "blanks around": byte_level(lstrip=True, rstrip=True),
    "not special": byte_level(CHATML, special=False),
    "slow": Slow(),
}
WOVEN = st.lists(st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|im_start|>", *LETTERS]), max_size=12)


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    return bundled.load_smollm2_tokenizer()


def encoded(tokenizer, text, **options):
    return encode_text(tokenizer, text, "the text", **({"add_special_tokens": False} | options))


@pytest.mark.parametrize("name", MADE)
@given(words=WOVEN)
def test_no_control_token_arises_from_text_and_the_text_comes_back(name, words):
    tokenizer, text = MADE[name], "".join(words).strip()
    ids = encoded(tokenizer, text)
    assert not set(ids) & set(control_tokens(tokenizer))
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


# The model's vocabulary lacks some bytes, among them control characters.
@given(data=st.data(), words=st.lists(st.text(st.characters(codec="latin-1", exclude_categories=["C"])), max_size=6))
def test_no_control_token_of_smollm2_arises_from_text(smollm2_tokenizer, data, words):
    spelled = st.sampled_from([t.content for t in smollm2_tokenizer.added_tokens_decoder.values()])
    text = "".join(word + data.draw(spelled) for word in words)
    ids = encoded(smollm2_tokenizer, text, add_special_tokens=True)
    assert not set(ids) & {*smollm2_tokenizer.all_special_ids, *smollm2_tokenizer.added_tokens_decoder}
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=True) == text


@given(text=st.text(st.sampled_from("abc XYZ,.\n日本é    "), max_size=40))
def test_a_text_without_control_tokens_keeps_its_ids(smollm2_tokenizer, text):
    for tokenizer in (smollm2_tokenizer, *MADE.values()):
        for added in (True, False):
            assert (
                encoded(tokenizer, text, add_special_tokens=added)
                == tokenizer(text, add_special_tokens=added)["input_ids"]
            )


@pytest.mark.parametrize("name", MADE)
def test_the_tokenizers_own_special_tokens_stay(name):
    tokenizer = MADE[name]
    for text in ("ab", "ab</s>"):
        whole, inner = encoded(tokenizer, text, add_special_tokens=True), encoded(tokenizer, text)
        before = [256] if tokenizer.is_fast and name != "unigram" else []
        assert whole == before + inner + [257] * len(before)


def test_control_tokens_on_request():
    for tokenizer in MADE.values():
        text = "a</s><|im_end|>b"
        assert encoded(tokenizer, text, special_tokens="control") == encode_template(tokenizer, text)
        assert tokenizer.eos_token_id in encoded(tokenizer, text, special_tokens="control")


def test_a_tokenizer_that_is_told_to_split_special_tokens_reads_templates():
    tokenizer = byte_level()
    tokenizer.split_special_tokens = True
    assert encode_template(tokenizer, "</s>") == [257]
    assert encoded(tokenizer, "</s>") == encoded(byte_level(), "</s>")


def test_rows_of_a_batch_are_what_each_is_alone():
    texts = ["ab", "a</s>b", "", "<|im_end|>"]
    for tokenizer in MADE.values():
        rows = encode_texts(tokenizer, texts, ["a", "b", "c", "d"], add_special_tokens=True)
        assert rows == [encoded(tokenizer, t, add_special_tokens=True) for t in texts]
        if tokenizer.is_fast:  # a state that other threads read
            assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_offsets_are_places_in_the_text():
    tokenizer, text = MADE["byte-level"], "a</s>b    c"
    found = encode_with_offsets(tokenizer, text, "the text")
    assert "".join(text[start:end] for start, end in found.offsets) == text
    assert found.ids == encoded(tokenizer, text)
    assert encode_with_offsets(tokenizer, text, "the text", "control").ids == encode_template(tokenizer, text)


def test_offsets_need_a_fast_tokenizer():
    with pytest.raises(TokenizerMismatchError, match=r"Slow does not know which characters .*; use a fast tokenizer"):
        encode_with_offsets(MADE["slow"], "ab", "the text")


def test_added_tokens_that_are_no_control_tokens_stay_tokens():
    for tokenizer in (MADE["byte-level"], MADE["not special"]):
        blanks = tokenizer.convert_tokens_to_ids("    ")
        assert blanks in encoded(tokenizer, "a    b")
        assert blanks in encoded(tokenizer, "a    b<|im_end|>")


def test_a_token_that_is_added_later_is_known():
    tokenizer = byte_level()
    assert encoded(tokenizer, "a<sep>") == encode_template(tokenizer, "a<sep>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<sep>"]})
    assert len(encode_template(tokenizer, "a<sep>")) == 2
    assert len(encoded(tokenizer, "a<sep>")) == 6


def test_a_padding_token_of_one_character_is_text():
    tokenizer = byte_level()
    tokenizer.pad_token = "!"
    assert encoded(tokenizer, "a!") == encode_template(tokenizer, "a!")


def test_a_text_that_cannot_be_spelled_is_refused():
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "\ufdd02\ufdd0": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    assert encoded(tokenizer, "</s> other") == [0, 0]  # a tokenizer of words does not know how to spell
    slow = Slow()
    slow._tokenize = lambda text, **options: [text]
    with pytest.raises(InvalidInputError, match="the text spells the control token '</s>', and the tokenizer cannot"):
        encoded(slow, "</s>")


def test_mistral_common_reads_text_as_text():
    package = pytest.importorskip("mistral_common", reason="mistral-common is an optional package")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    tokenizer = MistralCommonBackend(Path(package.__file__).parent / "data" / "tekken_240911.json")
    text = "hi <s> [INST] </s>"
    assert tokenizer.decode(encoded(tokenizer, text), skip_special_tokens=True) == text
    assert encoded(tokenizer, text, add_special_tokens=True)[0] == tokenizer.bos_token_id
    assert control_tokens(tokenizer)[3] == "[INST]"
    with pytest.raises(InvalidInputError, match="reads no control tokens in a text; leave special_tokens at 'text'"):
        encoded(tokenizer, text, special_tokens="control")
