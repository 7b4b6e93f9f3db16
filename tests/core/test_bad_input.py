"""Every kind of bad input raises its own error, whose message says what to do; `test_checkpoints.py` covers files."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from icae_fast import ICAE, ICAEConfig, Memory, errors
from icae_fast.backbone.stack import Backbone
from icae_fast.ops import REGISTRY, backend_of

pytestmark = pytest.mark.usefixtures("one_thread")

Invalid, TooLong = errors.InvalidInputError, errors.ContextTooLongError
NAN = float("nan")


@pytest.fixture(scope="module")
def memory(tiny_icae, random_ids):
    return tiny_icae.compress(random_ids(20))[0]


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (errors.ConfigError, ValueError), (errors.InvalidInputError, ValueError),
        (errors.ContextTooLongError, errors.InvalidInputError), (errors.UnsupportedModelError, TypeError),
        (errors.CheckpointError, ValueError), (errors.BaseModelMismatchError, errors.CheckpointError),
        (errors.TokenizerMismatchError, ValueError), (errors.NonFiniteError, ArithmeticError),
        (errors.CacheError, OSError), (errors.BackendError, RuntimeError),
    ],
)  # fmt: skip
def test_every_error_is_an_icae_error_and_a_builtin(error, base):
    assert issubclass(error, errors.ICAEError)
    assert issubclass(error, base)


# (context, pattern of the message)
BAD_CONTEXTS = {
    "no contexts": ([], "the list is empty; give at least one text"),
    "an empty context": ([[5, 6], []], "context 1 is empty; give at least one token"),
    "an empty text": ("", "context 0 is empty; give at least one token"),
    "an empty text in a list": (["", [5]], "context 0 is empty"),
    "an empty tensor": (torch.empty(0, dtype=torch.int64), "the list is empty"),
    "an empty tensor in a list": ([torch.empty(0, dtype=torch.int64)], "context 0 is empty"),
    "an id too high": ([5, 500], "holds the id 500, which is out of range; ids are 0 to 95"),
    "a negative id": ([5, -1], "holds the negative id -1; ids are 0 to 95"),
    "a negative id in a tensor": (torch.tensor([5, -100]), "holds the negative id -100"),
    "the [PAD] id": ([5, 96], r"holds the id 96, which is the \[PAD\] id"),
    "a memory id": ([5, 97], "holds the id 97, which is a memory or special token's id; .* added by the package"),
    "the FT id": ([103, 5], "holds the id 103, which is a memory or special token's id"),
    "floats": ([5.0, 6.0], "context 0 is neither text nor a row of integer token ids"),
    "a float tensor": (torch.ones(3), r"torch.float32 tensor of shape \(3,\); token ids are one row of integers"),
    "a float array": (np.ones(3), "neither text nor a row of integer"),
    "booleans": ([True, False], "neither text nor a row of integer"),
    "a boolean tensor": (torch.ones(3, dtype=torch.bool), "token ids are one row of integers"),
    "text among ids": ([5, "a"], "neither text nor a row of integer"),
    "three dimensions": (torch.ones(1, 2, 3, dtype=torch.int64), r"tensor of shape \(2, 3\); token ids are one row"),
    "three dimensions, NumPy": (np.ones((1, 2, 3), dtype=int), "neither text nor a row of integer"),
    "a nested list": ([[[5, 6]]], "context 0 is neither text nor a row of integer"),
    "an id over 64 bits": ([5, 2**64], "neither text nor a row of integer"),
    "nothing": (None, "expected text or token ids, one or a list, and got NoneType"),
    "nothing in a list": ([None], "context 0 is neither text nor"),
    "a number": (5, "got int"),
    "a scalar tensor": (torch.tensor(5), "got Tensor"),
    "bytes": (b"text", "got bytes"),
    "a dictionary": ({"input_ids": [5]}, "got dict"),
    "a generator": ((i for i in [5]), "got generator"),
}


@pytest.mark.parametrize(("context", "message"), BAD_CONTEXTS.values(), ids=BAD_CONTEXTS)
def test_bad_contexts_are_refused(tiny_icae, context, message):
    with pytest.raises(Invalid, match=message):
        tiny_icae.compress(context)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "the list is empty"), ([[]], "the prompt is empty"), (None, "got NoneType"), ([[5, 96]], "the id 96"),
        ([[5], [97]], "the prompt holds the id 97"), ([0.5], "the prompt is neither text nor"), ("", "is empty"),
    ],
)  # fmt: skip
def test_bad_prompts_are_refused(tiny_icae, memory, prompts, message):
    with pytest.raises(Invalid, match=message):
        tiny_icae.generate(memory, prompts, 3, return_ids=True)


def test_empty_text_is_refused_even_if_the_tokenizer_adds_a_token(make_icae, make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    icae = make_icae(tokenizer=tokenizer)
    assert icae.compress("w5")[0].n_source_tokens == 2
    for call in (lambda: icae.compress(["w5", ""]), lambda: icae.extend(icae.compress("w5")[0], "")):
        with pytest.raises(Invalid, match="is empty; give at least one token"):
            call()


@pytest.mark.parametrize("budget", [0, -5])
def test_a_token_budget_below_1_is_refused(tiny_icae, budget):
    with pytest.raises(Invalid, match=f"token_budget is {budget}; give at least 1"):
        tiny_icae.compress([5], token_budget=budget)


def test_text_without_a_tokenizer_is_refused(tiny_icae, memory):
    for call in (
        lambda: tiny_icae.compress("a text"),
        lambda: tiny_icae.extend(memory, "more"),
        lambda: tiny_icae.generate(memory, ["why?"], return_ids=True),
    ):
        with pytest.raises(errors.TokenizerMismatchError, match="pass token ids or tokenizer="):
            call()
    for call in (lambda: tiny_icae.generate(memory, [5], 3), lambda: tiny_icae.restore(memory)):
        with pytest.raises(errors.TokenizerMismatchError, match="pass return_ids=True or tokenizer="):
            call()


@pytest.mark.parametrize("size", [97, 90, 10])
def test_a_tokenizer_of_another_size_is_refused(make_icae, make_tokenizer, size):
    with pytest.raises(errors.TokenizerMismatchError, match=f"has {size} tokens and the base model 96 embeddings"):
        make_icae(tokenizer=make_tokenizer(size))


class TestTooLong:
    def test_slots_that_exceed_the_positions_are_refused(self, tiny_icae, random_ids):
        assert tiny_icae.compress(random_ids(63 * 16))[0].n_slots == 252
        with pytest.raises(TooLong, match=r"1009 tokens, whose 256 slots do not fit .* 256 positions; .* in parts"):
            tiny_icae.compress([[5], random_ids(63 * 16 + 1)])

    def test_an_extension_that_exceeds_the_positions_is_refused(self, tiny_icae, random_ids):
        long = tiny_icae.compress(random_ids(60 * 16))[0]
        assert tiny_icae.extend(long, random_ids(3 * 16)).n_slots == 252
        with pytest.raises(TooLong, match=r"240 slots and 16 more do not fit .* keep the extension as a memory of its"):
            tiny_icae.extend(long, random_ids(3 * 16 + 1))

    def test_answers_that_exceed_the_positions_are_refused(self, tiny_icae, memory):
        assert memory.n_slots == 8
        tiny_icae.generate(memory, [[5] * 200, [5]], 256 - 209, return_ids=True)
        with pytest.raises(TooLong, match=r"take 209 positions and max_new_tokens=48 more.*256; ask for fewer tokens"):
            tiny_icae.generate(memory, [[5] * 200, [5]], 256 - 208, return_ids=True)
        with pytest.raises(TooLong, match="ask for fewer tokens"):
            tiny_icae.restore(memory, max_new_tokens=248, return_ids=True)

    def test_max_positions_can_be_raised(self, make_icae, random_ids):
        icae = make_icae()
        icae.max_positions = 512
        memory = icae.compress(random_ids(65 * 16))[0]
        assert len(icae.generate(memory, [5], 2, min_new_tokens=2, return_ids=True)[0]) == 2

    def test_a_training_row_that_exceeds_the_positions_is_refused(self, tiny_icae, random_ids):
        row = torch.cat((torch.arange(97, 101), random_ids(253)))
        with pytest.raises(TooLong, match="takes 257 positions, but the base model has 256; shorten it"):
            tiny_icae([random_ids(5)], [row])

    def test_a_span_size_that_exceeds_the_positions_is_refused(self, make_base):
        with pytest.raises(errors.ConfigError, match=r"512 context and 128 memory tokens.*256 positions; lower"):
            ICAE.from_base(make_base())

    @pytest.mark.parametrize(
        "error",
        [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
         RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: ... 99 bytes")],
    )  # fmt: skip
    def test_running_out_of_memory_raises_context_too_long(self, tiny_icae, random_ids, monkeypatch, error):
        def fail(*args):
            raise error

        monkeypatch.setattr(Backbone, "forward", fail)
        with pytest.raises(
            TooLong, match="memory ran out while compressing 40 tokens at token_budget=64; lower token_"
        ):
            tiny_icae.compress(random_ids(40), token_budget=64)

    def test_other_runtime_errors_pass_through(self, tiny_icae, random_ids, monkeypatch):
        def fail(*args):
            raise RuntimeError("something else")

        monkeypatch.setattr(Backbone, "forward", fail)
        with pytest.raises(RuntimeError, match="something else") as caught:
            tiny_icae.compress(random_ids(40))
        assert not isinstance(caught.value, errors.ICAEError)


class TestNaN:
    @pytest.mark.parametrize(
        ("weight", "value"),
        [("base_model.model.layers.1.self_attn.k_proj.weight", NAN),
         ("adapter.layers.0.q_A", NAN),
         ("base_model.model.layers.2.mlp.up_proj.weight", NAN),
         ("adapter.layers.2.v_B", NAN), ("memory_token_embed.weight", float("inf"))],
    )  # fmt: skip
    def test_compress_names_the_weight_that_is_not_finite(self, make_icae, random_ids, weight, value):
        icae = make_icae()
        with torch.no_grad():
            icae.get_parameter(weight).view(-1)[3] = value
        with pytest.raises(
            errors.NonFiniteError, match=f"memory slots .*the weight {weight} does; load intact weights"
        ):
            icae.compress(random_ids(30))

    @pytest.mark.parametrize(
        "weight",
        ["base_model.model.layers.1.self_attn.q_proj.weight",
         "base_model.model.norm.weight", "base_model.lm_head.weight"],
    )  # fmt: skip
    def test_generate_names_the_weight_that_is_not_finite(self, make_icae, random_ids, weight):
        icae = make_icae()
        memory = icae.compress(random_ids(30))[0]
        with torch.no_grad():
            icae.get_parameter(weight)[1] = NAN
        with pytest.raises(errors.NonFiniteError, match=f"the logits .*the weight {weight} does"):
            icae.generate(memory, [[5], [6]], 3, return_ids=True)

    def test_an_overflow_is_distinguished_from_a_bad_weight(self, make_icae, random_ids):
        icae = make_icae()
        with torch.no_grad():
            icae.base_model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
        with pytest.raises(errors.NonFiniteError, match="although all weights are finite; use bfloat16 or float32"):
            icae.compress(random_ids(30))

    def test_a_memory_with_nan_slots_is_refused(self, tiny_icae, memory):
        bad = Memory(memory.slots.clone().fill_(NAN), memory.n_source_tokens, memory.span_lengths)
        with pytest.raises(errors.NonFiniteError, match="compress the context again"):
            tiny_icae.restore(bad, return_ids=True)


class TestMemories:
    def test_a_memory_of_another_model_is_refused(self, tiny_icae, make_icae, make_base, random_ids):
        others = (make_icae(memory_size=8), make_icae(base=make_base(hidden_size=64)))
        for other in others:
            memory = other.compress(random_ids(20))[0]
            for call in (
                lambda m=memory: tiny_icae.generate(m, [5], return_ids=True),
                lambda m=memory: tiny_icae.restore(m, return_ids=True),
                lambda m=memory: tiny_icae.extend(m, [5]),
            ):
                with pytest.raises(Invalid, match="use the model that made the memory"):
                    call()

    def test_anything_but_a_memory_is_refused(self, tiny_icae, memory):
        for wrong in (memory.slots, None, "text", [[memory]], [memory, memory.slots]):
            for call in (
                lambda m=wrong: tiny_icae.generate(m, [5], return_ids=True),
                lambda m=wrong: tiny_icae.restore(m, return_ids=True),
                lambda m=wrong: tiny_icae.extend(m, [5]),
            ):
                with pytest.raises(Invalid, match=r"expected one Memory and got .*; compress returns a list of them"):
                    call()
        with pytest.raises(Invalid, match="expected one Memory and got list"):
            tiny_icae.extend([memory], [5])

    def test_a_failed_extension_leaves_the_memory_unchanged(self, tiny_icae, memory):
        before = memory.slots.clone()
        with pytest.raises(Invalid, match="the extension holds the id 96"):
            tiny_icae.extend(memory, [5, 96])
        assert torch.equal(memory.slots, before)


class TestGenerationArguments:
    @pytest.mark.parametrize(("low", "high"), [(4, 3), (-1, 3), (0, -1), (0, 2.5), (0, None), (True, 3)])
    def test_bad_numbers_of_new_tokens_are_refused(self, tiny_icae, memory, low, high):
        with pytest.raises(Invalid, match=f"min_new_tokens={low} and max_new_tokens={high}: give 0 <= min <= max"):
            tiny_icae.generate(memory, [5], high, min_new_tokens=low, return_ids=True)

    def test_a_minimum_that_is_not_a_number_is_refused(self, tiny_icae, memory):
        with pytest.raises(Invalid, match=r"min_new_tokens=few and max_new_tokens=36: .* whole numbers"):
            tiny_icae.restore(memory, min_new_tokens="few", return_ids=True)

    def test_a_streamer_for_several_prompts_is_refused(self, tiny_icae, memory, streamer):
        with pytest.raises(Invalid, match="there are 2 prompts; pass one prompt"):
            tiny_icae.generate(memory, [[5], [6]], 3, return_ids=True, streamer=streamer)
        assert (streamer.ids, streamer.ended) == ([], 0)


GOOD = ([[5, 6, 7]], [[97, 98, 99, 100, 101, 5, 6]], [[-100] * 5 + [5, 6]])
BAD_ROWS = {
    "too few memory ids": ({1: [[97, 98, 99, 101, 5]]}, "row 0 .* has 3 memory ids, .* gives 4 slots; put memory_size"),
    "too many memory ids": ({1: [[97] * 8 + [101]]}, "has 8 memory ids"),
    "no memory ids": ({1: [[5, 6]]}, "has 0 memory ids"),
    "an empty prompt": ({1: [[]]}, "has 0 memory ids"),
    "a prompt of padding": ({1: [[96, 96]]}, "has 0 memory ids"),
    "a negative id": ({1: [[97, 98, 99, 100, -1]]}, "ids outside 0 to 103"),
    "an id too high": ({1: [[97, 98, 99, 100, 104]]}, "ids outside 0 to 103"),
    "padding in the middle": ({1: [[97, 98, 99, 100, 96, 5]]}, r"\[PAD\] before its end"),
    "an empty context": ({0: [[]]}, "context 0 is empty"),
    "a context of padding": ({0: [[96, 96]]}, "context 0 is empty"),
    "a memory id in the context": ({0: [[5, 97]]}, "context 0 holds the id 97"),
    "padding in the context": ({0: [[5, 96, 5]]}, r"context 0 holds the id 96, which is the \[PAD\] id"),
    "more contexts than prompts": ({0: [[5], [6]]}, "2 contexts and 1 prompts; give one of each a row"),
    "too few labels": ({2: [[-100] * 4]}, "labels must have the shape of prompt_answer_ids"),
    "labels for other rows": ({2: [[-100] * 7] * 2}, "labels must have the shape of prompt_answer_ids"),
    "a label too high": ({2: [[-100] * 6 + [96]]}, "labels must be -100 or ids from 0 to 95"),
    "a negative label": ({2: [[-100] * 6 + [-1]]}, "labels must be -100 or ids from 0 to 95"),
    "labels of padding": ({2: [[-100] * 7 + [5]]}, "labels stand where .* is padding; set them to -100"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_training_rows_are_refused(tiny_icae, changes, message):
    rows = [changes.get(i, good) for i, good in enumerate(GOOD)]
    rows = rows[:2] if 1 in changes else rows  # the labels only fit the unchanged prompt
    tensors = [[torch.tensor(r, dtype=torch.int64) for r in row] for row in rows]
    with pytest.raises(Invalid, match=message):
        tiny_icae(*tensors)


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("bad", [[], [[5, 6]], [torch.ones(3)], torch.ones(3, dtype=torch.int64), [None], 5, "text"])
def test_training_rows_of_a_wrong_type_are_refused(tiny_icae, argument, bad):
    rows = [[torch.tensor(r) for r in row] for row in GOOD]
    assert torch.isfinite(tiny_icae(*rows)["loss"])
    rows[argument] = bad
    with pytest.raises(Invalid, match=r"must be an integer tensor of shape \(rows, length\) or a list of one-row"):
        tiny_icae(*rows)


def test_a_base_weight_that_requires_a_gradient_is_refused(make_icae, random_ids):
    icae = make_icae()
    icae.base_model.model.layers[1].self_attn.q_proj.weight.requires_grad_()
    with pytest.raises(errors.BackendError, match=r"freeze the base model with requires_grad_\(False\)"):
        icae.encode([random_ids(5)])


def run_python(code, **variables):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_an_unknown_value_of_icae_fast_require_is_refused():
    result = run_python("import icae_fast.ops", ICAE_FAST_REQUIRE="nonsense")
    assert result.returncode != 0
    assert (
        "BackendError: ICAE_FAST_REQUIRE is 'nonsense'; it may be empty, 'cpp', 'triton' or 'reference'"
        in result.stderr
    )


def test_missing_cpp_kernels_cause_a_warning_or_an_error():
    hide = "import sys; sys.modules['icae_fast._C'] = None; from icae_fast.ops import backend_of; "
    hide += "print(backend_of('varlen_attention'))"
    warned = run_python(hide, ICAE_FAST_REQUIRE="")
    assert (warned.returncode, warned.stdout) == (0, "reference\n")
    assert "slow plain-torch reference" in warned.stderr
    refused = run_python(hide, ICAE_FAST_REQUIRE="cpp")
    assert refused.returncode != 0
    assert "BackendError: ICAE_FAST_REQUIRE=cpp, but the C++ kernels cannot be loaded" in refused.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_dtype_without_kernels_is_refused(make_base, dtype):
    base, config = make_base().to(dtype), ICAEConfig(memory_size=4)
    if dtype in REGISTRY["lora_qkv_rope"].dtypes[backend_of("lora_qkv_rope")]:
        assert ICAE.from_base(base, config).dtype == dtype
    else:
        with pytest.raises(errors.UnsupportedModelError, match="load it in one of float32, bfloat16"):
            ICAE.from_base(base, config)
