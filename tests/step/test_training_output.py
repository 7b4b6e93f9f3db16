"""The training forward makes logits only where somebody asks for them by name."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import golden
from icae_fast.errors import InvalidInputError
from icae_fast.step.output import LazyTensor, TrainingOutput

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def rows_of(icae, random_ids, sizes=((37, 40), (9, 30))):
    """Return contexts, prompts and labels of rows that restore a context in part."""
    v, k = icae.vocabulary, icae.config.memory_size
    rows = []
    for n, m in sizes:
        spans = -(-n // icae.config.max_span_tokens)
        answer = random_ids(m, seed=m)
        ids = torch.cat((torch.arange(v.first_memory, v.ae).repeat(spans), torch.tensor([v.ae]), answer))
        rows.append((random_ids(n, seed=n), ids, torch.cat((torch.full((spans * k + 1,), -100), answer))))
    return list(map(list, zip(*rows, strict=True)))


def gradients(icae):
    return {n: p.grad.clone() for n, p in icae.named_parameters() if p.grad is not None}


class LargestResult(TorchDispatchMode):
    """Record the most elements of a tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_a_step_makes_no_logits_until_they_are_read(make_base, make_icae, random_ids):
    icae = make_icae(base=make_base(vocab_size=960))
    # More labels than `head_loss` scores at once, and a vocabulary that makes all logits the largest tensor by far.
    rows = rows_of(icae, random_ids, [(9, 200)] * 6)
    icae.max_positions = 1000
    everything = sum(map(len, rows[1])) * icae.vocabulary.n_base
    with LargestResult() as seen:
        out = icae(*rows)
        out["loss"].backward()
    assert seen.elements < everything / 2
    with LargestResult() as seen, torch.no_grad():
        logits = out["logits"]
    assert seen.elements == everything == logits.numel()
    assert out["logits"] is logits
    assert not logits.requires_grad


def test_logits_equal_those_without_labels(make_icae, random_ids, model_kind):
    icae = make_icae(model_kind)
    icae.adapter_mode = "fused"  # merged weights, which "auto" may choose under `no_grad`, round otherwise
    rows = rows_of(icae, random_ids)
    out, plain = icae(*rows), icae(*rows[:2])
    torch.testing.assert_close(out["logits"], plain["logits"], **CLOSE)
    with torch.no_grad():
        eager = icae(*rows)
    assert type(eager) is dict
    torch.testing.assert_close(eager, dict(out), **CLOSE)


def test_a_loss_of_the_logits_adds_to_the_gradient(make_icae, random_ids):
    """The second forward reads the same slots, dropout included."""
    icae = make_icae(lora_dropout=0.3).train()
    rows = rows_of(icae, random_ids)
    torch.manual_seed(0)
    out = icae(*rows)
    (out["loss"] + out["logits"].square().mean()).backward()
    both = gradients(icae)
    for add in (lambda out: out["loss"], lambda out: out["logits"].square().mean()):
        icae.zero_grad()
        torch.manual_seed(0)
        add(icae(*rows)).backward()
        for name, gradient in gradients(icae).items():
            both[name] -= gradient
    for name, rest in both.items():
        torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-5, msg=name)


def test_a_row_without_a_label_adds_nothing(make_icae, random_ids):
    icae = make_icae()
    contexts, prompts, labels = rows_of(icae, random_ids)
    icae(contexts[:1], prompts[:1], labels[:1])["loss"].backward()
    expected = gradients(icae)
    icae.zero_grad()
    out = icae(contexts, prompts, [labels[0], torch.full_like(labels[1], -100)])
    out["loss"].backward()
    torch.testing.assert_close(gradients(icae), expected, **CLOSE)
    torch.testing.assert_close(out["logits"], icae(contexts, prompts)["logits"], **CLOSE)
    with pytest.raises(InvalidInputError, match="row 0 has no label"):
        icae.token_losses(contexts[:1], prompts[:1], [torch.full_like(labels[0], -100)])


def test_a_head_that_ops_do_not_compute_takes_plain_autograd(make_icae, random_ids):
    icae = make_icae()
    rows = rows_of(icae, random_ids)
    expected = icae(*rows)["loss"]
    icae.base_model.lm_head.requires_grad_(True)
    out = icae(*rows)
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], expected, **CLOSE)
    assert icae.base_model.lm_head.weight.grad.abs().max() > 0


def test_looking_through_an_output_computes_nothing():
    """Accelerate rebuilds an output from its items, DDP looks through its values."""
    calls = []

    def compute():
        calls.append(1)
        return torch.ones(2)

    out = TrainingOutput(loss=torch.zeros(()), logits=LazyTensor(compute))
    again = type(out)({k: v for k, v in out.items()})  # noqa: C416 - as accelerate does it
    assert list(again) == ["loss", "logits"]
    assert isinstance(list(again.values())[1], LazyTensor)
    assert "not computed" in repr(again)
    assert calls == []
    assert again["logits"] is out.get("logits") is dict(out)["logits"] is {**out}["logits"]
    assert calls == [1]
    assert out.get("none", 3) == out.pop("none", 3) == 3
    assert torch.equal(TrainingOutput(logits=LazyTensor(compute)).pop("logits"), torch.ones(2))


def test_accelerate_leaves_logits_alone(make_icae, random_ids):
    from accelerate.utils import convert_to_fp32

    icae = make_icae(base=golden.load_base().to(torch.bfloat16))
    rows = rows_of(icae, random_ids)
    out = convert_to_fp32(icae(*rows))
    assert isinstance(dict.__getitem__(out, "logits"), LazyTensor)
    out["loss"].backward()
    assert out["logits"].shape == (2, max(map(len, rows[1])), icae.vocabulary.n_base)
