"""LoRA fused or merged: the slots are equal, merged weights are never stale, and training always fuses."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from icae_fast.adapter import mode as adapter_mode
from icae_fast.errors import InvalidInputError
from icae_fast.store.memory_file import load_memory, save_memory

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MODES = ("fused", "merged")


@pytest.fixture
def merged(make_icae):
    """A fresh ICAE in merged mode that has merged its weights."""
    icae = make_icae()
    icae.adapter_mode = "merged"
    icae.compress([5, 6, 7])
    return icae


def in_mode(icae, mode, ids):
    icae.adapter_mode = mode
    slots = icae.compress(ids)[0].slots
    assert icae.adapter_mode_in_use == mode
    return slots


def test_both_modes_give_the_same_slots(make_icae, random_ids, model_kind):
    icae = make_icae(model_kind)
    ids = random_ids(40)
    fused, merged = (in_mode(icae, mode, ids) for mode in MODES)
    torch.testing.assert_close(merged, fused, **CLOSE)
    assert (merged - fused).norm() < 1e-5 * fused.norm()


def test_merged_weights_are_the_formula(make_icae, make_base):
    for base in (make_base(), make_base().bfloat16(), make_base().double()):
        icae = make_icae(base=base)
        for layer, factors, merged in zip(
            base.model.layers, icae.adapter.layers, adapter_mode.merge(icae.backbone, icae.adapter), strict=True
        ):
            a, wide = layer.self_attn, torch.float64
            delta = {p: 4.0 / 3 * factors[f"{p}_B"].to(wide) @ factors[f"{p}_A"].to(wide) for p in "qv"}
            expected = [a.q_proj.weight + delta["q"], a.k_proj.weight, a.v_proj.weight + delta["v"]]
            # The fp32 sum may round to the other neighbour in bf16.
            tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-14}[icae.dtype]
            assert merged.weight.dtype == icae.dtype
            torch.testing.assert_close(merged.weight.to(wide), torch.cat(expected).to(wide), rtol=tolerance, atol=1e-6)
            q, k = a.q_proj.weight.shape[0], a.k_proj.weight.shape[0]
            assert torch.equal(merged.weight[q : q + k], a.k_proj.weight)


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_extending_and_batches_are_the_same_in_each_mode(make_icae, random_ids, mode):
    icae, ids = make_icae(), random_ids(48)
    icae.adapter_mode = mode
    whole = icae.compress(ids)[0]
    extended = icae.extend(icae.compress(ids[:16])[0], ids[16:])
    assert extended.span_lengths == whole.span_lengths
    torch.testing.assert_close(extended.slots, whole.slots, **CLOSE)
    documents = [random_ids(n, seed=n) for n in (3, 50, 16, 1)]
    forward, backward = icae.compress(documents), icae.compress(documents[::-1], token_budget=30)
    for one, other in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(one.slots, other.slots, **CLOSE)


def step(icae):
    optimizer = torch.optim.AdamW(icae.adapter.parameters(), lr=1e-2)
    sum(p.square().sum() for p in icae.adapter.parameters()).backward()
    optimizer.step()


def load(icae):
    icae.adapter.load_state_dict({n: t + 0.1 for n, t in icae.adapter.state_dict().items()})


def exchange_rows(icae):
    a = icae.adapter.layers[1]["q_A"].data
    a.copy_(a.flip(0))


def new_parameter(icae):
    icae.adapter.layers[0]["v_A"] = nn.Parameter(icae.adapter.layers[0]["v_A"].detach() * 2)


def there_and_back(icae):
    icae.base_model.to(torch.bfloat16).to(torch.float32)


def new_data(icae):
    p = icae.adapter.layers[2]["v_B"]
    p.data = p.data * 0.5


CHANGES = {
    "optimizer step": step,
    "load_state_dict": load,
    "copy into data": lambda i: i.adapter.layers[0]["q_A"].data.copy_(torch.ones(3, 32)),
    "other data": new_data,
    "sign through data": lambda i: i.adapter.layers[2]["v_A"].data.neg_(),
    "one value through data": lambda i: i.adapter.layers[0]["v_B"].data[5, 1].add_(1.0),
    "numpy": lambda i: i.adapter.layers[0]["q_B"].detach().numpy().fill(0.5),
    "order of rows": exchange_rows,
    "another parameter": new_parameter,
    "another scale": lambda i: setattr(i.adapter, "scale", 0.5),
    "base q": lambda i: i.base_model.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5),
    "base k": lambda i: i.base_model.model.layers[1].self_attn.k_proj.weight.data[3].neg_(),
    "base v": lambda i: i.base_model.model.layers[2].self_attn.v_proj.weight.data.zero_(),
    "base model loaded": lambda i: i.base_model.load_state_dict(
        {n: t * 1.1 for n, t in i.base_model.state_dict().items()}
    ),
    "base cast": lambda i: i.base_model.to(torch.bfloat16),
    "base cast and back": there_and_back,
    "all cast": lambda i: i.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_merged_weights_are_never_stale(merged, random_ids, change):
    ids = random_ids(30)
    before = merged.compress(ids)[0].slots
    kept = merged.encoder_weights._held[1]
    assert torch.equal(merged.compress(ids)[0].slots, before)
    assert merged.encoder_weights._held[1] is kept
    CHANGES[change](merged)
    slots = merged.compress(ids)[0].slots
    assert (slots.float() - before.float()).abs().max() > 1e-3
    assert torch.equal(slots, copy.deepcopy(merged).compress(ids)[0].slots)  # a copy merges again
    if slots.dtype == torch.float32:
        torch.testing.assert_close(slots, in_mode(merged, "fused", ids), **CLOSE)


def test_weights_and_hashes_and_memory_files_do_not_depend_on_the_mode(merged, random_ids, tmp_path):
    other = copy.deepcopy(merged)
    other.adapter_mode = "fused"
    assert merged.adapter_hash() == other.adapter_hash()
    assert list(merged.state_dict()) == list(other.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    other.save_pretrained(tmp_path / "fused")
    for name in ("adapter.safetensors", "icae_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    memory = merged.compress(random_ids(20))[0]
    save_memory(tmp_path / "one.icae", memory, merged)
    save_memory(tmp_path / "other.icae", memory, other)
    assert (tmp_path / "one.icae").read_bytes() == (tmp_path / "other.icae").read_bytes()
    assert torch.equal(load_memory(tmp_path / "one.icae", other).slots, memory.slots)


def test_training_is_fused_in_every_mode(make_icae, random_ids):
    results = []
    for mode in (*MODES, "auto"):
        icae = make_icae(lora_dropout=0.3).train()
        icae.adapter_mode = mode
        torch.manual_seed(0)
        slots = icae.encode([random_ids(30)])[0]
        slots.square().sum().backward()
        assert icae.adapter_mode_in_use is None
        results.append([slots.detach(), *(p.grad for p in icae.adapter.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropout_without_gradients_is_fused(merged, random_ids):
    merged.train()
    merged.adapter.dropout_p = 0.3

    def slots(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return merged.encode([random_ids(30)])[0]

    assert torch.equal(slots(0), slots(0))
    assert (slots(0) - slots(1)).abs().max() > 1e-3
    merged.eval()
    assert torch.equal(slots(0), merged.compress(random_ids(30))[0].slots)


def test_autocast_does_not_narrow_the_merged_weights(make_icae):
    icae = make_icae()
    exact = adapter_mode.merge(icae.backbone, icae.adapter)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(
            torch.equal(a.weight, b.weight)
            for a, b in zip(adapter_mode.merge(icae.backbone, icae.adapter), exact, strict=True)
        )


def test_two_threads_compress_at_once(merged, random_ids):
    ids = random_ids(40)
    expected = merged.compress(ids)[0].slots

    def run(i):
        torch.set_num_threads(1)
        if i % 3 == 0:
            merged.free_merged_weights()
        return merged.compress(ids)[0].slots

    fresh = copy.deepcopy(merged)  # its base weights are not packed yet
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(s, expected) for s in pool.map(run, range(40)))
        assert all(torch.equal(s, expected) for s in pool.map(lambda _: fresh.compress(ids)[0].slots, range(8)))


@pytest.mark.parametrize("value", ["both", "", None, 1, ["merged"], torch.ones(2)])
def test_another_value_is_refused(tiny_icae, value):
    with pytest.raises(InvalidInputError, match=r"adapter_mode is .*; it must be one of auto, fused, merged"):
        tiny_icae.adapter_mode = value
    assert tiny_icae.adapter_mode == "auto"


def test_copies_and_pickles_keep_the_mode_and_not_the_weights(merged, random_ids):
    ids = random_ids(30)
    slots = merged.compress(ids)[0].slots
    buffer = io.BytesIO()
    torch.save(merged, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(merged), pickle.loads(pickle.dumps(merged)), torch.load(buffer, weights_only=False),
    ):  # fmt: skip
        assert (other.adapter_mode, other.adapter_mode_in_use) == ("merged", None)
        assert torch.equal(other.compress(ids)[0].slots, slots)
    assert adapter_mode.merged_bytes(merged.backbone) == sum(m.weight.nbytes for m in merged.encoder_weights._held[1])


def test_weights_can_be_let_go(merged, random_ids):
    slots = merged.compress(random_ids(20))[0].slots
    merged.free_merged_weights()
    assert merged.encoder_weights._held is None
    assert torch.equal(merged.compress(random_ids(20))[0].slots, slots)


class TestAuto:
    """`"auto"` measures, chooses and reports its choice."""

    def test_one_of_the_two_is_chosen_and_kept(self, make_icae, random_ids):
        icae = make_icae()
        assert (icae.adapter_mode, icae.adapter_mode_in_use) == ("auto", None)
        assert "adapter_mode='auto'\n" in repr(icae)
        state = torch.get_rng_state()
        slots = icae.compress(random_ids(30))[0].slots
        assert torch.equal(torch.get_rng_state(), state)
        used = icae.adapter_mode_in_use
        assert used in MODES
        assert f"adapter_mode='auto' ({used} in use)" in repr(icae)
        assert torch.equal(in_mode(icae, used, random_ids(30)), slots)
        assert torch.equal(copy.deepcopy(icae).compress(random_ids(30))[0].slots, slots)

    @pytest.mark.parametrize("pays", [True, False])
    @pytest.mark.parametrize("memory", [0, 2**40])
    def test_it_pays_and_fits_or_is_fused(self, make_icae, monkeypatch, pays, memory):
        monkeypatch.setattr(adapter_mode, "merging_pays", lambda backbone, config: pays)
        monkeypatch.setattr(adapter_mode, "available_memory", lambda device: memory)
        icae = make_icae()
        icae.compress([5, 6, 7])
        assert icae.adapter_mode_in_use == ("merged" if pays and memory else "fused")

    def test_available_memory(self, tmp_path):
        assert adapter_mode.available_memory(torch.device("cpu")) > 0
        assert adapter_mode._container_memory(str(tmp_path)) == float("inf")
        for name, text in (("current", "700\n"), ("stat", "anon 500\ninactive_file 100\n"), ("max", "max\n")):
            (tmp_path / f"memory.{name}").write_text(text)
        assert adapter_mode._container_memory(str(tmp_path)) == float("inf")
        (tmp_path / "memory.max").write_text("1000\n")
        assert adapter_mode._container_memory(str(tmp_path)) == 400
