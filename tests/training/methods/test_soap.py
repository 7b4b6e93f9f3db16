"""SOAP: its update rule, and its advantage on LoRA pairs."""

import copy

import pytest
import torch

from icae_fast.errors import ConfigError
from icae_fast.training.loop.arguments import TrainSection
from icae_fast.training.methods.soap import Soap


def gradients(shape, n=6, seed=0, dtype=torch.float64):
    """Return gradients of several steps with directions of very different size."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, shape[0], dtype=dtype)[:, None]
    return [scale * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(n)]


def run(optimizer, parameters, steps):
    """Make a step with each of the given gradients."""
    for step in steps:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize(("shape", "max_basis"), [((5, 9), 0), ((5, 9), 4), ((7,), 256)])
def test_what_has_no_short_side_is_trained_by_adamw(shape, max_basis):
    start, steps = (
        torch.randn(shape, dtype=torch.float64),
        [[torch.randn(shape, dtype=torch.float64)] for _ in range(5)],
    )
    ours, torchs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    run(Soap([ours], max_basis=max_basis, **options), [ours], steps)
    run(torch.optim.AdamW([torchs], **options), [torchs], steps)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


def test_first_step_of_a_gradient_of_rank_one():
    # Q^T G has one row that is not zero, the length of u times v: Adam's first step is its sign.
    u, v = torch.randn(4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(4, 9, dtype=torch.float64))
    run(Soap([weight], lr=1.0, max_basis=4), [weight], [[torch.outer(u, v)]])
    torch.testing.assert_close(weight.data, -torch.outer(u / u.norm(), v.sign()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("update_every", [1, 3])
def test_a_rotation_of_the_rank_changes_nothing(update_every):
    """B A = (B R)(R^T A): SOAP updates both pairs equally, AdamW does not."""
    rank, d_in, d_out = 4, 17, 11
    g_a, g_b = gradients((rank, d_in)), [g.T for g in gradients((rank, d_out), seed=1)]
    rotation = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))[0]

    def product(kind, turn, **options):
        a = torch.nn.Parameter(turn.T @ torch.ones(rank, d_in, dtype=torch.float64))
        b = torch.nn.Parameter(torch.ones(d_out, rank, dtype=torch.float64) @ turn)
        run(kind([a, b], lr=0.1, **options), [a, b], [[turn.T @ x, y @ turn] for x, y in zip(g_a, g_b, strict=True)])
        return (b @ a).detach()

    still, plain = torch.eye(rank, dtype=torch.float64), {"max_basis": 10, "update_every": update_every}
    torch.testing.assert_close(product(Soap, rotation, **plain), product(Soap, still, **plain), rtol=1e-7, atol=1e-7)
    assert (product(torch.optim.AdamW, rotation) - product(torch.optim.AdamW, still)).abs().max() > 0.1


def test_the_basis_finds_the_eigenvectors():
    weight = torch.nn.Parameter(torch.zeros(4, 30, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    optimizer = Soap([weight], lr=0.0, max_basis=4, update_every=1, basis_beta=0.9)
    run(optimizer, [weight], [[turn @ g] for g in gradients((4, 30), n=60)])
    found = optimizer.state[weight]["basis_0"].T @ turn
    assert found.diagonal().abs().min() > 0.98  # in descending order, up to the sign


def test_moments_keep_to_their_directions_when_the_order_changes():
    weight = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = Soap([weight], lr=0.0, max_basis=2, update_every=2, basis_beta=0.5)
    small, large = torch.tensor([[0.1] * 3, [0.0] * 3]), torch.tensor([[0.0] * 3, [10.0] * 3])
    run(optimizer, [weight], [[small.double()], [large.double()]])
    state = optimizer.state[weight]
    torch.testing.assert_close(state["basis_0"].abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double())
    assert (state["exp_avg_sq"][0] > 1).all()
    assert (state["exp_avg_sq"][1] < 1).all()


def test_a_loaded_state_goes_on_with_the_same_bits():
    steps = [[g] for g in gradients((4, 12), n=8, dtype=torch.float32)]
    whole = torch.nn.Parameter(torch.zeros(4, 12))
    run(Soap([whole], update_every=3), [whole], steps)
    half = torch.nn.Parameter(torch.zeros(4, 12))
    first = Soap([half], update_every=3)
    run(first, [half], steps[:4])
    second = Soap([half], update_every=3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, [half], steps[4:])
    assert torch.equal(half, whole)


def test_gradients_of_zero_or_none_change_nothing():
    weights = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
    optimizer = Soap(weights, update_every=1)
    weights[0].grad = torch.zeros(4, 6)
    for _ in range(3):
        assert optimizer.step(lambda: torch.tensor(2.0)) == 2.0
    assert all(torch.equal(w, torch.ones(4, 6)) for w in weights)
    assert weights[1] not in optimizer.state


def test_an_ill_conditioned_product_is_learned_faster_than_by_adamw():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    x = torch.randn(512, 16, generator=generator) * torch.logspace(0, -2, 16) @ turn.T
    target = x @ torch.randn(16, 24, generator=generator)

    def loss_after(kind, **options):
        weight = torch.nn.Parameter(torch.zeros(16, 24))
        optimizer = kind([weight], lr=0.02, betas=(0.9, 0.95), **options)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (x @ weight - target).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert loss_after(Soap, max_basis=16) < 0.5 * loss_after(torch.optim.AdamW, weight_decay=0.0)


def test_its_name_is_a_setting():
    section = TrainSection(optim="soap", adam_beta2=0.95)
    assert section.given()["optim"] == "soap"
    assert section.arguments("out", 3, use_cpu=True).adam_beta2 == 0.95
    with pytest.raises(ValueError, match="optim_args has no effect on soap"):
        TrainSection(optim="soap", optim_args="a=1")
    with pytest.raises(ConfigError, match=r"rejects the section train.*soup"):
        TrainSection(optim="soup").arguments("out", 3, use_cpu=True)
