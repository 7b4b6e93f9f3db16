"""Training steps over a sharded base model in two processes: `torchrun sharding_worker.py FILE`.

FILE receives a list of the results of each process, for `torch.load`.
"""

import sys

import torch
import torch.distributed as dist

from icae_fast.backbone.sharding import whole_model
from icae_fast.errors import BackendError
from icae_fast.step import loss
from icae_fast.step.budget import ActivationBudget
from icae_fast.step.training_step import TrainingStep
from icae_fast.training.loop.model import TrainingModel
from icae_fast.training.loop.sharding import replicate_trained, shard_base_model
from icae_fast.training.methods.batch import pack
from icae_fast.training.methods.distill import Distillation
from training_worker import make_icae, make_sample

# Each span is one micro-batch: three in the first process, nine in the second.
ROWS = ((0, 1), (2, 5, 8))
# Keep nothing; some of one process's spans; everything within a budget; everything without a budget.
BUDGETS = {"none": 0, "some": 60_000, "default": ActivationBudget().bytes, "everything": None}


class CountingStep(TrainingStep):
    """A `TrainingStep` that counts the micro-batches of spans with kept activations."""

    last: tuple[int, int]  # with kept activations, and in total

    def _agree(self):
        if self.plan:
            CountingStep.last = sum(levels[0] > 0 for levels in self.plan.spans), len(self.batches)
        return super()._agree()


def make_model(name):
    """Return a model whose teacher reads one row at a time."""
    distillation = Distillation(0.5, objectives=("ae", "lm"), token_budget=8)
    return TrainingModel(make_icae(lora_dropout=0.0), ActivationBudget(BUDGETS[name], 12), distillation).train()


def batch_of(model, rows):
    """Return a batch and its number of labelled tokens."""
    batch = pack([make_sample(model.icae, i) for i in rows])
    return batch, int((batch.labels != -100).sum())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def expected(name):
    """Return loss and gradients of all rows in one process, without sharding."""
    model = make_model(name)
    batch, count = batch_of(model, [i for rows in ROWS for i in rows])
    mean = model(batch, num_items_in_batch=count)["loss"]
    mean.backward()
    return mean.detach(), gradients(model)


def held_bytes(model):
    """Return the bytes of the base model's weights in this process."""
    parameters = model.icae.base_model.parameters()
    return sum(p.to_local().untyped_storage().nbytes() if hasattr(p, "to_local") else p.nbytes for p in parameters)


def found(name):
    """Return model, loss, gradients and bytes of two sharded processes with two micro-batches each."""
    model = make_model(name)
    before = held_bytes(model)
    shard_base_model(model)
    wrapped = replicate_trained(model, torch.device("cpu"))
    rows = ROWS[dist.get_rank()]
    count = sum(batch_of(model, rows)[1] for rows in ROWS) / dist.get_world_size()  # DDP averages
    with wrapped.no_sync():
        first = wrapped(batch_of(model, rows[:1])[0], num_items_in_batch=count)["loss"]
        first.backward()
    second = wrapped(batch_of(model, rows[1:])[0], num_items_in_batch=count)["loss"]
    second.backward()
    mean = (first + second).detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return model, mean, gradients(model), (before, held_bytes(model))


def gathered_bytes(model):
    """Return the bytes of the base model's weights while it is gathered and afterwards."""
    with whole_model(model):
        weights = [p.detach() for p in model.icae.base_model.parameters()]
        whole = sum(w.untyped_storage().nbytes() for w in weights)
    return whole, sum(w.untyped_storage().nbytes() for w in weights)


def evaluate(model):
    """Return the mean loss of this process's rows with a sharded base model, without a graph."""
    with torch.no_grad():
        return model.eval()(batch_of(model, ROWS[dist.get_rank()])[0])["loss"]


def refusal(model):
    """Return the error of plain autograd through sharded layers."""
    with whole_model(model):
        try:
            model.icae.encode([torch.arange(3, 8)])
        except BackendError as error:
            return str(error)


def main(path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    loss.TrainingStep = CountingStep
    results, kept = {}, {}
    for name in BUDGETS:
        model, *ours = found(name)
        kept[name] = CountingStep.last
        results[name] = {"found": ours, "expected": expected(name)}
    losses = [evaluate(model), evaluate(make_model(name))]
    mine = {"budgets": results, "losses": losses, "kept": kept}
    mine |= {"gathered": gathered_bytes(model), "refusal": refusal(model)}
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    if dist.get_rank() == 0:
        torch.save(of_all, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
