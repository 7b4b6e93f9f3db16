"""Shipped adapters: they load by name, and their bf16 files load into fp32 parameters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icae_fast import ICAE
from icae_fast.config import Trained
from icae_fast.errors import CheckpointError, ConfigError
from icae_fast.io import hub
from icae_fast.io.checkpoints import TENSORS_FILE, read_adapter
from icae_fast.training.methods.objectives import autoencoding_sample

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def icae(make_icae):
    """An ICAE whose slot gain is not exact in bf16."""
    icae = make_icae(slot_scale="embedding_norm")
    with torch.no_grad():
        icae.slot_gain.fill_(0.1)
    return icae


def test_bf16_tensors_load_into_fp32_parameters(icae, make_base, tmp_path):
    icae.save_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / TENSORS_FILE)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    again = ICAE.from_pretrained(tmp_path, base_model=make_base())
    for (name, mine), (_, loaded) in zip(
        icae.reference_named_parameters(), again.reference_named_parameters(), strict=True
    ):
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, mine.bfloat16().float()), name
    again.save_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert (tmp_path / "again" / TENSORS_FILE).read_bytes() == (tmp_path / TENSORS_FILE).read_bytes()


def test_a_shipped_adapter_loads_by_its_name(icae, make_base, tmp_path, monkeypatch, random_ids):
    monkeypatch.setattr(hub, "ADAPTERS", tmp_path / "adapters")
    icae.save_pretrained(tmp_path / "adapters" / "tiny")
    (tmp_path / "adapters" / "half-written").mkdir()
    assert list(hub.shipped_adapters()) == ["tiny"]
    again = ICAE.from_pretrained("tiny", base_model=make_base())
    ids = random_ids(30)
    assert torch.equal(again.compress(ids)[0].slots, icae.compress(ids)[0].slots)


def test_the_shipped_adapter_says_what_it_was_trained_with():
    folder = hub.shipped_adapters()["smollm2-135m"]
    assert read_adapter(folder).trained == Trained(max_spans=4, span_tokens=128, dtype="bfloat16")


def test_an_adapter_loads_with_another_compression_rate(icae, make_base, tmp_path, random_ids):
    icae.save_pretrained(tmp_path)
    k, rate, ids = icae.config.memory_size, icae.config.compression_rate, random_ids(40)
    longer = ICAE.from_pretrained(tmp_path, base_model=make_base(), compression_rate=2 * rate)
    assert longer.config == icae.config.replace(compression_rate=2 * rate)
    assert longer.adapter_hash() == icae.adapter_hash()
    assert len(longer.compress(ids)[0].span_lengths) == -(-40 // (2 * rate * k))
    with pytest.raises(ConfigError, match="compression_rate is 0"):
        ICAE.from_pretrained(tmp_path, base_model=make_base(), compression_rate=0)


def test_a_local_folder_has_precedence_over_a_shipped_adapter(icae, make_base, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "ADAPTERS", tmp_path / "adapters")
    icae.save_pretrained(tmp_path / "adapters" / "tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(CheckpointError):  # the local folder is empty
        ICAE.from_pretrained("tiny", base_model=make_base())


def test_the_error_for_an_unknown_name_lists_the_shipped_ones(icae, make_base, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "ADAPTERS", tmp_path / "adapters")
    icae.save_pretrained(tmp_path / "adapters" / "tiny")
    with pytest.raises(CheckpointError, match=r"nor one that ships with this package \(tiny\)"):
        ICAE.from_pretrained("no such/name, ever", base_model=make_base())


def test_the_default_adapter_of_a_base_model_is_found(make_icae, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "ADAPTERS", tmp_path / "adapters")
    assert hub.default_adapter("some/base") is None
    make_icae(base_model="some/base").save_pretrained(tmp_path / "adapters" / "tiny")
    name, config = hub.default_adapter("some/base")
    assert (name, config.base_model) == ("tiny", "some/base")
    assert hub.default_adapter("some/other") is None


HARROW_POINT = Path(__file__).parents[2] / "examples" / "harrow_point.txt"


def test_the_shipped_adapter_restores_unseen_text(smollm2_bf16):
    """Score passages of a text outside the training data with their own slots and with another passage's."""
    base, tokenizer = smollm2_bf16
    icae = ICAE.from_pretrained("smollm2-135m", base_model=base, tokenizer=tokenizer)
    length = icae.config.max_span_tokens
    ids = torch.tensor(tokenizer(HARROW_POINT.read_text())["input_ids"])
    contexts = list(ids[: 8 * length].split(length))
    samples = [autoencoding_sample(icae, context.tolist()) for context in contexts]
    prompts, labels = ([torch.tensor(getattr(s, n)) for s in samples] for n in ("prompt_answer_ids", "labels"))
    with torch.no_grad():
        slots = icae.encode(contexts)
        right, wrong = (
            icae.token_losses(contexts, prompts, labels, slots=given).correct.float().mean().item()
            for given in (slots, slots[1:] + slots[:1])
        )
    assert right > 0.6
    assert wrong < 0.4


def test_shipped_adapters_are_small_and_have_a_readme():
    for folder in hub.shipped_adapters().values():
        assert (folder / TENSORS_FILE).stat().st_size <= 20e6
        assert "hours" in (folder / "README.md").read_text()
