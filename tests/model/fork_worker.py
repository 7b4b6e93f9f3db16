"""Use an ICAE, fork, and use it again in the child; prints "equal" or fails. Run by test_fork.py in a process."""

import logging
import os
import signal
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from icae_fast import ICAE, ICAEConfig

SECONDS = 60  # a hanging child is killed


def use(icae):
    """Return slots, an answer and a gradient."""
    ids = torch.arange(3, 90).repeat(4)
    memory = icae.compress(ids)[0]
    v = icae.vocabulary
    memory_ids = torch.arange(v.first_memory, v.ae).repeat(len(memory.span_lengths))
    row = torch.cat((memory_ids, torch.tensor([v.ae]), ids))
    labels = torch.cat((torch.full((len(memory_ids) + 1,), -100), ids))
    icae.zero_grad()
    icae.token_losses([ids], [row], [labels]).losses.mean().backward()
    answer = icae.generate(memory, [[5, 6], [7]], 8, min_new_tokens=8, return_ids=True)
    return memory.slots, answer, icae.memory_token_embed.weight.grad.clone()


def main():
    logging.basicConfig(stream=sys.stdout)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    icae = ICAE.from_base(LlamaForCausalLM(config), ICAEConfig(memory_size=16, compression_rate=4, lora_rank=4)).eval()
    icae.adapter_mode = "fused"
    if "unused" not in sys.argv:
        expected = use(icae)
        torch.randn(512, 512) @ torch.randn(512, 512)  # starts the threads, whatever the model's sizes do
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # ends a child that hangs
        found = use(icae)
        if "unused" not in sys.argv:
            assert torch.get_num_threads() == 1
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        print("equal", flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if "unused" not in sys.argv:
        assert torch.get_num_threads() == 2
        torch.testing.assert_close(use(icae), expected, rtol=1e-4, atol=1e-4)
    sys.exit(os.waitstatus_to_exitcode(status))


main()
