"""Fixtures of all tests: tiny random models of every supported family, SmolLM2, tokenizers, a memory store."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers import golden
from helpers.kv import LENGTHS
from helpers.store import make_origin
from icae_fast import ICAE, ICAEConfig, MemoryStore
from icae_fast.cli import app as cli
from icae_fast.generation import decoding
from icae_fast.io import bundled

# No time limit (machines differ), the same examples each run, and nothing written into the checkout.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")

_SIZES = dict(  # noqa: C408
    vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=False,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_MINISTRAL_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# Windows are shorter than a span with its memory tokens, so that they change results.
_KINDS = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3_ROPE}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-mha": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "ministral": ("ministral", {"sliding_window": 7, "layer_types": _MINISTRAL_LAYERS}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7}),
}
MODEL_KINDS = tuple(_KINDS)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of tests/model/test_golden.py")


def pytest_configure(config):
    golden.DEVICE = config.getoption("--device")


def pytest_sessionstart(session):
    """Refuse to run under `make sanitize` with a build that is not sanitized."""
    requested = os.environ.get("ICAE_FAST_SANITIZE", "")
    if requested:
        from icae_fast import _C

        built = _C.build_info().get("sanitizers")
        if built != requested:
            raise pytest.UsageError(f"{_C.__file__} is built with the sanitizers {built!r}, not with {requested!r}")
        session.config.get_terminal_writer().line(f"{_C.__file__}: {built}, {_C.isa()}")


def pytest_generate_tests(metafunc):
    """Run a test with an argument `model_kind` once for each kind of model."""
    if "model_kind" in metafunc.fixturenames:
        metafunc.parametrize("model_kind", MODEL_KINDS)


@pytest.fixture(scope="session", autouse=True)
def offline():
    """Forbid the hub to all tests and their subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")  # for subprocesses
        yield


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory):
    """Use the user's cache if it holds SmolLM2, else a temporary one, so that no test writes into a home folder."""
    with pytest.MonkeyPatch.context() as patch:
        if not any(bundled.cache_folder().glob(f"{bundled.BUNDLED_NAME}-*/config.json")):
            patch.setenv("ICAE_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_thread():
    """Run with one thread: tiny models gain nothing from more, and lose much where other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_base():
    """`make_base(kind="llama", seed=0, **config)` returns a tiny model with random biases and norms."""

    def make(kind="llama", seed=0, **overrides):
        model_type, fields = _KINDS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = AutoConfig.for_model(model_type, **(_SIZES | fields | overrides))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 1:
                        parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_icae(make_base):
    """`make_icae(kind="llama", seed=0, base=None, tokenizer=None, **config)` returns one: k = 4, rate 4, random B."""

    def make(kind="llama", seed=0, base=None, tokenizer=None, **fields):
        base = make_base(kind, seed) if base is None else base
        config = ICAEConfig(**({"memory_size": 4, "compression_rate": 4, "lora_rank": 3, "lora_alpha": 4.0} | fields))
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            icae = ICAE.from_base(base, config, tokenizer)
            with torch.no_grad():
                for _, _, factor, parameter in icae.adapter.named_factors():
                    if factor == "B":
                        parameter.normal_(0.0, 0.3)
        return icae.eval()

    return make


@pytest.fixture(scope="session")
def tiny_icae(make_icae):
    """A tiny ICAE that is shared by the session; tests must not change it."""
    return make_icae()


@pytest.fixture(scope="session")
def random_ids():
    """`random_ids(n, seed=0)` returns n ids of ordinary base tokens, (n,) int64."""

    def make(n, seed=0):
        return torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def count_tokens(monkeypatch):
    """`count_tokens(icae)` returns a list that gets the number of tokens of each decoder forward and token step."""

    def watch(icae):
        calls, forward, bind = [], icae.backbone.forward, decoding.bind_decode_step
        monkeypatch.setattr(
            icae.backbone, "forward", lambda x, rows, *a, **k: (calls.append(len(x)), forward(x, rows, *a, **k))[1]
        )

        def bind_counting(*arguments, **options):
            bound = bind(*arguments, **options)

            def step(tokens, lengths):
                calls.append(len(tokens))
                return bound.step(tokens, lengths)

            def greedy(tokens, *rest):
                chosen = bound.greedy(tokens, *rest)
                calls.extend([len(tokens)] * len(chosen))
                return chosen

            return SimpleNamespace(step=step, greedy=greedy)

        monkeypatch.setattr(decoding, "bind_decode_step", bind_counting)
        return calls

    return watch


@pytest.fixture
def store(tmp_path):
    """An empty local memory store without a model, k = 4 and d = 16."""
    with MemoryStore(tmp_path / "store", make_origin()) as opened:
        yield opened


@pytest.fixture
def make_tokenizer():
    """`make_tokenizer(size=96)` returns a word tokenizer in which `w7` has id 7."""

    def make(size=96, **options):
        words = ["<pad>", "<bos>", "</s>", *(f"w{i}" for i in range(3, size))]
        backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="</s>", **options
        )

    return make


_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "</s>"}
# Training text of the byte-level BPE, chosen to produce merges within characters and across them.
_BPE_TEXT = "the cat sat on the mat, naïve café; 日本語の文 日本語 😀😃😄 zażółć gęślą jaźń " * 4


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A byte-level BPE tokenizer of 320 tokens, like GPT-2's: ids 0 to 2 are special, many are partial characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(_SPECIAL.values()),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([_BPE_TEXT], trainer)
    assert backend.get_vocab_size() == 320
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL)


@pytest.fixture(scope="session")
def fallback_tokenizer():
    """A tokenizer like LLaMA 2's: words begin with a space, unknown characters become byte tokens."""
    words = [*_SPECIAL.values(), *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghij", "▁ab", "▁a", "ab"]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<pad>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL)


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)` runs `icae-fast` in this process and returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["icae-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


class RecordingStreamer:
    """A transformers streamer that records ids and the number of ends."""

    def __init__(self):
        self.ids, self.ended = [], 0

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.fixture
def streamer():
    """A streamer with `.ids` and `.ended`."""
    return RecordingStreamer()


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct in fp32."""
    return bundled.load_smollm2(torch.float32)


@pytest.fixture(scope="session")
def smollm2_bf16():
    """(model, tokenizer) of SmolLM2-135M-Instruct in bf16."""
    return bundled.load_smollm2(torch.bfloat16)


@pytest.fixture(scope="session")
def long_text():
    """English prose of about 4000 tokens."""
    return (Path(__file__).parents[1] / "examples" / "harrow_point.txt").read_text()


@pytest.fixture(scope="session")
def make_pieces():
    """`make_pieces(lengths=LENGTHS, seed=0)` returns random embeddings (length, 32), one tensor a piece."""

    def make(lengths=LENGTHS, seed=0):
        return torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(seed)).split(list(lengths))

    return make
