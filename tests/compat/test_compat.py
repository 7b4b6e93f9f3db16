"""The reference's scripts run with `icae_fast.compat`, and their results equal those of `icae_fast.ICAE`."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from helpers import golden, reference_flow
from icae_fast import ICAE as FastICAE  # noqa: N811
from icae_fast import ICAEConfig
from icae_fast.compat import ICAE
from icae_fast.errors import BaseModelMismatchError, CheckpointError, ConfigError, InvalidInputError, NonFiniteError
from icae_fast.io import hub
from icae_fast.io.bundled import BUNDLED_NAME, load_smollm2
from icae_fast.io.checkpoints import MEMORY_KEY

TEXT = (
    "Marta had kept the light at Harrow Point since the storm of 1911. Every evening she climbed the hundred and "
    "twelve steps, trimmed the wick, filled the lamp with colza oil, and wrote the weather into a ledger whose pages "
    "smelled of salt. In spring the herring boats came home before dusk and their crews waved to her."
)


def save_folder(model, folder):
    """Save a base model with a word-level tokenizer whose words are "t0" to "t95"; id 1 is BOS, id 2 EOS."""
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(96)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2"
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_folder(golden.load_base(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_folder, tmp_path):
    """`tiny(*arguments)`: the golden model made through compat, with the reference's checkpoint unless `untrained`."""

    def make(*arguments, untrained=False):
        model_args, _, training_args = reference_flow.parse(
            ["--model_name_or_path", tiny_folder, "--fixed_mem_size", 8, "--lora_r", 8,
             "--output_dir", tmp_path / "out", "--report_to", "none", *arguments]
        )  # fmt: skip
        model = ICAE(model_args, training_args, reference_flow.lora_config(8, 0.0))
        if not untrained:
            model.load_state_dict(load_file(golden.reference_checkpoint_path()), strict=False)
        return model

    return make


def pad(rows, value):
    return torch.nn.utils.rnn.pad_sequence([r[0] for r in rows], batch_first=True, padding_value=value)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(model made by the reference's script, `icae_fast.ICAE` with the same weights), in fp32."""
    torch.manual_seed(2)  # with this seed no answer is empty
    fast = FastICAE.from_base(
        load_smollm2(torch.float32)[0], ICAEConfig(memory_size=16, lora_rank=8), hub.load_smollm2_tokenizer()
    )
    with torch.no_grad():
        for _, _, factor, parameter in fast.adapter.named_factors():
            if factor == "B":
                parameter.normal_(0, 0.05)
    path = tmp_path_factory.mktemp("smollm2") / "icae.safetensors"
    save_file({k: p.detach() for k, p in fast.reference_named_parameters()}, path)
    model = reference_flow.inference_model(
        ["--mean_compression_rate", 4, "--model_max_length", 5120, "--fixed_mem_size", 16, "--lora_r", 8,
         "--output_dir", path, "--model_name_or_path", BUNDLED_NAME, "--train", False]
    )  # fmt: skip
    return model, fast.eval()


def without_eos(ids, model):
    return ids[:-1] if ids and ids[-1] == model.eos_id else ids


def test_the_pretrained_inference_script_restores_like_icae_fast(smollm2):
    model, fast = smollm2
    memory = fast.compress(TEXT)[0]
    assert len(memory.span_lengths) > 1
    expected = fast.restore(memory, max_new_tokens=16, return_ids=True)
    produced = reference_flow.restore(model, TEXT, 16)
    assert produced == without_eos(expected, model)
    assert len(produced) > 2


def test_the_fine_tuned_inference_script_answers_like_icae_fast(smollm2):
    model, fast = smollm2
    prompt = "Who kept the light?"
    before, after = fast.prompt_ids("x")
    after = after[after.index(fast.vocabulary.ft) + 2 :]
    assert before
    assert after
    expected = fast.generate(fast.compress(TEXT)[0], prompt, max_new_tokens=16, return_ids=True)[0]
    produced = reference_flow.ask(model, TEXT, prompt, (before, after), 16)
    assert produced == without_eos(expected, model)
    assert len(produced) > 2


def test_ids_and_sizes_equal_the_references(tiny):
    model, s = tiny("--train", False), golden.SETTINGS
    assert (model.vocab_size, model.pad_token_id, model.vocab_size_with_mem) == (97, s["pad_token_id"], 105)
    assert (model.ae_token_id, model.lm_token_id, model.ft_token_id) == (
        s["ae_token_id"], s["lm_token_id"], s["ft_token_id"],
    )  # fmt: skip
    assert (model.mem_size, model.mean_compression_rate, model.dim, model.bos_id, model.eos_id) == (8, 4, 64, 1, 2)
    assert model.append_sequence.tolist() == [list(range(97, 105))]
    assert [model.compute_num_segments(n) for n in (1, 32, 33, 75)] == [1, 1, 2, 3]
    assert not model.training
    assert tiny().training
    assert not tiny().decoder.training
    assert model.decoder is model.icae.get_base_model()
    assert model.icae.config.vocab_size == model.vocab_size - 1


@pytest.mark.parametrize("name", golden.CASES)
def test_slots_logits_and_loss_of_the_golden_cases(tiny, name):
    model, case = tiny("--train", False), golden.case(name)
    torch.testing.assert_close(model._compress(case["input_ids"]), case["slots"], rtol=1e-5, atol=1e-5)
    out = model(case["input_ids"], case["prompt_answer_ids"], case["labels"])
    torch.testing.assert_close(out["loss"], case["loss"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["logits"], case["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", golden.CASES)
def test_the_references_forward_loop_runs_on_the_callable(tiny, name):
    """The reference's encoder and decoder loops work unchanged; a subclass of its `ICAE` may contain them."""
    model, case = tiny("--train", False), golden.case(name)
    ids, prompt = case["input_ids"], case["prompt_answer_ids"]
    n = model.compute_num_segments(ids.size(1))
    slots = []
    for span in ids.split(-(-ids.size(1) // n), dim=1):
        span = torch.cat((span, model.append_sequence), dim=1)
        out = model.icae(inputs_embeds=model.tokens_to_embeddings(span), output_hidden_states=True)
        slots.append(out.hidden_states[-1][span >= model.vocab_size])
    torch.testing.assert_close(torch.cat(slots), case["slots"], rtol=1e-5, atol=1e-5)
    embeddings = model.tokens_to_embeddings(prompt)
    is_memory = (prompt >= model.vocab_size) & (prompt < model.vocab_size + model.mem_size)
    embeddings = embeddings.masked_scatter(is_memory[..., None], torch.cat(slots))
    with model.icae.disable_adapter():
        logits = model.icae(inputs_embeds=embeddings, output_hidden_states=True).logits
    torch.testing.assert_close(logits, case["logits"], rtol=1e-5, atol=1e-5)


def test_the_callable_takes_padded_rows(tiny):
    model = tiny("--train", False)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    ids = torch.arange(5, 23).reshape(3, 6)
    out = model.icae(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for i, row in enumerate(mask.bool()):
        alone = model.icae(input_ids=ids[i : i + 1, row])
        torch.testing.assert_close(out.logits[i, row], alone.logits[0], rtol=1e-5, atol=1e-5)
    assert not out.hidden_states[-1][mask == 0].any()
    with model.icae.disable_adapter():
        plain = model.icae(input_ids=ids).logits
    assert not torch.allclose(plain, model.icae(input_ids=ids).logits)


def test_the_loss_of_a_padded_batch_is_the_mean_over_all_labels(tiny):
    model = tiny()
    cases = [golden.case(name) for name in golden.CASES]
    batch = (
        pad([c["input_ids"] for c in cases], model.pad_token_id),
        pad([c["prompt_answer_ids"] for c in cases], model.pad_token_id),
        pad([c["labels"] for c in cases], -100),
    )
    counts = [(c["labels"][:, 1:] != -100).sum() for c in cases]
    expected = sum(c["loss"][0] * n for c, n in zip(cases, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model(*batch)["loss"], expected, rtol=1e-5, atol=1e-5)


def test_compressing_a_padded_batch_equals_single_rows(tiny):
    model = tiny("--train", False)
    rows = [golden.case("exact")["input_ids"][:, :n] for n in (32, 7, 20)]
    slots = model._compress(pad(rows, model.pad_token_id))
    assert slots.shape == (3, 8, 64)
    for row, own in zip(rows, slots, strict=True):
        torch.testing.assert_close(model._compress(row), own, rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidInputError, match="different numbers of slots"):
        model._compress(pad([*rows, golden.case("three_spans")["input_ids"]], model.pad_token_id))


def training_data(model):
    texts = [" ".join(f"t{3 + (7 * i + 5 * j) % 90}" for j in range(n)) for i, n in enumerate((40, 12, 30, 21))]
    mem = list(range(model.vocab_size, model.vocab_size + model.mem_size))
    return Dataset.from_dict({"text": texts}).map(
        reference_flow.autoencoding_rows, batched=True, fn_kwargs={"model": model, "mem": mem}
    )


def train(tiny, *arguments):
    torch.manual_seed(0)
    model = tiny("--max_steps", 8, "--learning_rate", 1e-2, "--per_device_train_batch_size", 4, "--save_steps", 4,
                 "--logging_steps", 1, "--lr_scheduler_type", "constant", *arguments, untrained=True)  # fmt: skip
    model.training_args.gradient_checkpointing_kwargs = {"use_reentrant": False}  # as in the scripts
    data, collator = training_data(model), reference_flow.PaddingCollator(model.pad_token_id)
    return model, *reference_flow.train_model(model, data, data, model.training_args, collator)


def test_training_saves_resumes_and_evaluates(tiny, tmp_path):
    _, trainer, metrics = train(tiny, "--overwrite_output_dir", True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.05
    assert metrics["eval_loss"] == pytest.approx(losses[-1], abs=0.1)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == set(load_file(golden.reference_checkpoint_path()))

    final = tmp_path / "out" / "checkpoint-8"
    final.rename(tmp_path / "first-run-8")
    resumed, trainer, _ = train(tiny)  # finds checkpoint-4
    assert trainer.state.global_step == 8
    assert len([e for e in trainer.state.log_history if "loss" in e]) == 8
    for key, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, saved[key], rtol=1e-4, atol=1e-5)

    tuned = tiny("--restore_from", tmp_path / "out" / "model.safetensors", untrained=True)
    for key, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key])
    assert not torch.equal(tiny(untrained=True).memory_token_embed.weight, tuned.memory_token_embed.weight)


def test_training_in_bf16_with_one_row_per_step(tiny):
    model, trainer, _ = train(tiny, "--bf16", "--per_device_train_batch_size", 1, "--per_device_eval_batch_size", 1)
    assert model.core.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < loss < 20 for loss in losses)


def test_only_the_adapter_gets_gradients(tiny):
    model, case = tiny(), golden.case("short")
    model(case["input_ids"], case["prompt_answer_ids"], case["labels"])["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in model.state_dict(keep_vars=True).values()
    }


def test_a_state_dict_loads_inside_a_parent_module(tiny):
    source, target = torch.nn.ModuleDict({"m": tiny()}), torch.nn.ModuleDict({"m": tiny(untrained=True)})
    state = source.state_dict()
    assert set(state) == {f"m.{key}" for key in load_file(golden.reference_checkpoint_path())}
    target.load_state_dict(state)
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, state[key])
    with pytest.raises(RuntimeError, match=r"m\.extra"):
        target.load_state_dict(state | {"m.extra": torch.zeros(1)})


def test_base_weights_in_a_state_dict_are_compared_and_not_loaded(tiny):
    """The reference's trainer also saves the base model, twice, with embeddings of the added tokens."""
    model, adapter = tiny(untrained=True), load_file(golden.reference_checkpoint_path())
    base = {k: v.clone() for k, v in model.decoder.state_dict().items()}
    whole = {f"decoder.{k}": v for k, v in base.items()} | adapter
    for key, value in base.items():
        if key.startswith(("model.embed_tokens", "lm_head")):
            value = torch.cat((value, torch.ones(12, 64)))
        projection = key.endswith(("q_proj.weight", "v_proj.weight"))
        whole["icae.base_model.model." + (key.replace(".weight", ".base_layer.weight") if projection else key)] = value
    assert model.load_state_dict(whole) == ([], [])
    assert torch.equal(model.memory_token_embed.weight, adapter[MEMORY_KEY])
    whole["icae.base_model.model.model.norm.weight"] = base["model.norm.weight"] + 1
    with pytest.raises(BaseModelMismatchError, match=r"model\.norm"):
        model.load_state_dict(whole, strict=False)


def test_incomplete_and_foreign_state_dicts_are_refused(tiny):
    model, adapter = tiny(untrained=True), load_file(golden.reference_checkpoint_path())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    no_lora = {k: v for k, v in adapter.items() if ".layers.1." not in k}
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"missing .*layers\.1"):
            model.load_state_dict(no_lora, strict=strict)
        for part in (MEMORY_KEY, "lora", "nothing"):
            with pytest.raises(CheckpointError, match=f"it needs {MEMORY_KEY}"):
                model.load_state_dict({k: v for k, v in adapter.items() if part in k}, strict=strict)
        with pytest.raises(CheckpointError, match="slot_scale"):
            model.load_state_dict(adapter | {"slot_gain": torch.zeros(())}, strict=strict)
        with pytest.raises(CheckpointError, match=r"16 memory tokens .* --fixed_mem_size"):
            model.load_state_dict(adapter | {MEMORY_KEY: torch.zeros(19, 64)}, strict=strict)
        with pytest.raises(CheckpointError, match="misshaped"):
            model.load_state_dict(adapter | {MEMORY_KEY: torch.zeros(11, 32)}, strict=strict)
        with pytest.raises(NonFiniteError):
            model.load_state_dict({k: v * float("nan") for k, v in adapter.items()}, strict=strict)
    with pytest.raises(CheckpointError, match="unknown other"):
        model.load_state_dict(adapter | {"other": torch.zeros(1)})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.load_state_dict(adapter | {"other": torch.zeros(1)}, strict=False).unexpected_keys == ["other"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "k_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"bias": "all"},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 4}},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_unsupported_lora_options_are_refused(tiny_folder, options):
    model_args, _, training_args = reference_flow.parse(["--model_name_or_path", tiny_folder])
    with pytest.raises(ConfigError, match=next(iter(options))):
        ICAE(model_args, training_args, LoraConfig(r=8, task_type="CAUSAL_LM", **options))


def test_any_object_with_the_lora_fields_is_a_lora_config(tiny_folder):
    model_args, _, training_args = reference_flow.parse(["--model_name_or_path", tiny_folder, "--fixed_mem_size", 8])
    lora = SimpleNamespace(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], bias="none")
    config = ICAE(model_args, training_args, lora).core.config
    assert (config.lora_rank, config.lora_scale, config.lora_dropout) == (4, 2.0, 0.1)
    with pytest.raises(ConfigError, match="bias"):
        ICAE(model_args, training_args, SimpleNamespace(**(vars(lora) | {"bias": "all"})))


def test_the_encoder_refuses_a_cache_and_other_unsupported_input(tiny):
    model = tiny("--train", False)
    embeddings = model.tokens_to_embeddings(torch.tensor([[5, 6, 7]]))
    with model.icae.disable_adapter():
        cache = model.icae(inputs_embeds=embeddings, use_cache=True).past_key_values
    for options in ({"use_cache": True}, {"past_key_values": cache}):
        with pytest.raises(InvalidInputError, match="disable_adapter"):
            model.icae(inputs_embeds=embeddings, **options)
    with pytest.raises(InvalidInputError, match="output_attentions"):
        model.icae(inputs_embeds=embeddings, output_attentions=True)
    with pytest.raises(InvalidInputError, match="pass either input_ids or inputs_embeds"):
        model.icae()
    with pytest.raises(InvalidInputError, match="at least one token"):
        model.compute_num_segments(0)


def test_the_adapter_is_enabled_again_after_an_error(tiny):
    model = tiny("--train", False)
    with pytest.raises(KeyError), model.icae.disable_adapter(), model.icae.disable_adapter():
        raise KeyError
    assert model.icae.adapter_enabled


def test_a_copy_has_its_own_weights(tiny):
    model = tiny("--train", False)
    ids = golden.case("short")["input_ids"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.icae.base_model is other.core.base_model
        assert other.icae.adapter is other.core.adapter
        assert other.core.adapter is not model.core.adapter
        torch.testing.assert_close(other._compress(ids), model._compress(ids))


def test_a_pickle_holds_each_weight_once(tiny):
    model, case = tiny("--train", False), golden.case("three_spans")
    before = len(pickle.dumps(model))
    slots = model._compress(case["input_ids"])
    model.core.restore(model.core.compress(case["input_ids"][0])[0], 3, return_ids=True)  # moves the weights together
    data = pickle.dumps(model)
    assert len(data) < before * 1.02
    again = pickle.loads(data)
    assert again.decoder is again.icae.get_base_model() is again.core.backbone.view.model
    assert not again.icae.training
    torch.testing.assert_close(again._compress(case["input_ids"]), slots, rtol=1e-5, atol=1e-5)
