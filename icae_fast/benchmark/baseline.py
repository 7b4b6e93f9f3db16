"""The baseline: ICAE as the public reference runs it, on current transformers and PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

IGNORE = -100
GAIN_KEY = "slot_gain"


class BaselineICAE(nn.Module):
    """ICAE as getao/icae `code/icae_v2` computes it, to compare accuracy, time and memory with.

    Same as the reference:
        * LoRA on q and v uses PEFT's unmerged modules with PEFT's defaults (so fp32 factors next to a bf16 base,
          `autocast_adapter_dtype`); `disable_adapter()` switches it off for decoding.
        * The base's embeddings and head are resized for [PAD], k memory tokens, AE, LM and FT. The trained embeddings
          of the last k + 3 are in `memory_token_embed` (fp32) and overwrite rows of `inputs_embeds`.
        * Encoding runs the whole causal language model, head included, with `output_hidden_states=True` and the
          model's default `use_cache`, one document and one span at a time.
        * Slots are collected in an fp32 tensor on the CPU.
        * Decoding runs the prefill of template, slots and prompt again for every prompt, with the head over all of
          their positions, and then one token a step with a `DynamicCache` and one host synchronisation each.
        * Logits of added tokens are sliced off before the argmax.
        * With `two_copies` (the reference in training) a second, unresized copy decodes, with gradient checkpointing
          in training mode.

    Different from the reference:
        * flash-attn is not required: attention is the base model's own (SDPA by default), which is what a user
          without a GPU for flash-attn runs.
        * `torch.cuda.empty_cache()` after each span is left out, which only helps the baseline.
        * The loss is over the base vocabulary even without `two_copies`. The reference's shared decoder (its
          evaluation mode) includes the added tokens in the softmax; its training decoder does not.
        * The embeddings of [PAD] and of the other added rows are newly initialised, so the effect of v1's padding on
          slots (`compress_batch`) is reproduced in kind, not in digits.
        * End-of-sequence ids, `min_new_tokens` and a streamer are arguments.
        * `memory_positions="spread"` and `slot_gain` do not exist in the reference. They are implemented here at the
          same cost, so that newer adapters can be compared too.

    Args:
        base_model: a Hugging Face causal language model; it is resized in place, so pass a copy.
        memory_size: k, memory tokens per span.
        compression_rate: context tokens per slot.
        lora_rank, lora_alpha, lora_dropout: LoRA hyperparameters.
        two_copies: hold a second copy of the base as decoder, as the reference does in training.
        memory_positions: `"append"` or `"spread"`, as in `icae_fast.ICAEConfig`.
        leading_ids: ids read before each span, as `ICAE.leading_ids`; the reference has none.

    Attributes:
        icae: the PEFT model.
        memory_token_embed: embeddings of memory and special tokens, (k + 3, d).
        decoder: the second copy, or None.

    The names of all trained parameters are the keys of the reference's checkpoints.

    Source: getao/icae, `code/icae_v2/modeling_icae_multi_span.py`, and `fine_tuned_inference.py` for decoding.
    """

    icae: Any
    decoder: Any

    def __init__(
        self, base_model: Any, memory_size: int = 128, compression_rate: int = 4, lora_rank: int = 128,
        lora_alpha: float = 32, lora_dropout: float = 0.05, two_copies: bool = False, memory_positions: str = "append",
        leading_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.memory_size, self.compression_rate = memory_size, compression_rate
        self.memory_positions, self.leading_ids = memory_positions, list(leading_ids)
        self.n_base = base_model.get_input_embeddings().weight.shape[0]
        self.vocab_size = self.n_base + 1
        self.ae_token_id = self.vocab_size + memory_size
        self.lm_token_id, self.ft_token_id = self.ae_token_id + 1, self.ae_token_id + 2
        self.dim = base_model.config.hidden_size
        self.embedding_norm = base_model.get_input_embeddings().weight.detach().float().norm(dim=1).mean()
        self.decoder = copy.deepcopy(base_model).requires_grad_(False) if two_copies else None
        if two_copies:
            self.decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Newer transformers draw new rows from the embeddings' mean and covariance: costly, and never used here.
        base_model.resize_token_embeddings(self.vocab_size + memory_size + 3, mean_resizing=False)
        lora = LoraConfig(
            r=lora_rank, lora_dropout=lora_dropout, bias="none", task_type="CAUSAL_LM",
            lora_alpha=cast(int, lora_alpha),  # PEFT declares an int and takes fractions
            target_modules=["q_proj", "v_proj"],
        )  # fmt: skip
        self.icae = get_peft_model(base_model, lora)
        device = base_model.get_input_embeddings().weight.device
        self.memory_token_embed = nn.Embedding(memory_size + 3, self.dim, device=device)
        self.slot_gain: torch.Tensor | None = None

    @classmethod
    def from_icae(cls, icae: Any, two_copies: bool = False) -> BaselineICAE:
        """Return a baseline with a copy of the weights of an `icae_fast.ICAE`, in evaluation mode."""
        c = icae.config
        baseline = cls(
            copy.deepcopy(icae.base_model), c.memory_size, c.compression_rate, c.lora_rank, c.lora_alpha,
            c.lora_dropout, two_copies, c.memory_positions, icae.leading_ids,
        )  # fmt: skip
        baseline.load_reference_tensors({key: p.detach() for key, p in icae.reference_named_parameters()})
        return baseline.eval()

    def load_reference_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load LoRA and memory embeddings by the reference's checkpoint keys.

        Raises:
            KeyError: a key is missing or unknown.
            ValueError: a tensor has the wrong shape.
        """
        tensors = dict(tensors)
        gain = tensors.pop(GAIN_KEY, None)
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if own.keys() != tensors.keys():
            raise KeyError(
                f"missing {sorted(own.keys() - tensors.keys())}, unknown {sorted(tensors.keys() - own.keys())}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != tensors[name].shape:
                    raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
                parameter.copy_(tensors[name])
        self.slot_gain = None if gain is None else gain.detach().clone()

    @property
    def _embed_tokens(self) -> nn.Embedding:
        return self.icae.get_base_model().get_input_embeddings()

    def span_lengths(self, length: int) -> list[int]:
        """Return the lengths of `n = ceil(L / (k * rate))` spans of `ceil(L / n)` tokens; the last may be shorter."""
        n = math.ceil(length / (self.memory_size * self.compression_rate))
        step = math.ceil(length / n)
        return [min(step, length - start) for start in range(0, length, step)]

    def tokens_to_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed base, memory and special ids: (B, L) to (B, L, d) in the base's dtype."""
        embeddings = self._embed_tokens(ids)
        added = ids >= self.vocab_size
        embeddings[added] = self.memory_token_embed(ids[added] - self.vocab_size).to(embeddings)
        return embeddings

    def _encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the slots (B, k, d) of a (B, L) batch of spans; padding is read like text."""
        k, n_rows = self.memory_size, ids.shape[0]
        memory = torch.arange(self.vocab_size, self.vocab_size + k, device=ids.device).expand(n_rows, k)
        leading = torch.tensor(self.leading_ids, dtype=ids.dtype, device=ids.device).expand(n_rows, -1)
        extra = {}
        if self.memory_positions == "spread":
            length, n = ids.shape[1], len(self.leading_ids)
            spread = n + (torch.arange(1, k + 1) * length // k - 1).clamp_min(0)
            positions = torch.cat((torch.arange(n + length), spread)).to(ids.device).expand(n_rows, -1)
            # With an explicit mask, transformers does not take the jump in positions for the start of a new sequence.
            extra = {"position_ids": positions, "attention_mask": torch.ones_like(positions)}
        embeddings = self.tokens_to_embeddings(torch.cat((leading, ids, memory), dim=1))
        out = self.icae(inputs_embeds=embeddings, output_hidden_states=True, **extra)
        slots = out.hidden_states[-1][:, -k:]
        if self.slot_gain is None:
            return slots
        norm = self.embedding_norm * self.slot_gain.exp()
        return (F.normalize(slots.float(), dim=-1) * norm).to(slots.dtype)

    def _encode_spans(self, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        for i, span in enumerate(ids.split(self.span_lengths(ids.shape[1]), dim=1)):
            out[i * self.memory_size : (i + 1) * self.memory_size] = self._encode(span)[0]
        return out

    def _as_batch(self, ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        return torch.as_tensor(ids, dtype=torch.int64, device=self._embed_tokens.weight.device).view(1, -1)

    @torch.no_grad()
    def compress(self, input_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Compress one document, span after span (the reference's `_compress`).

        Args:
            input_ids: (L,) or (1, L) ids of base tokens.

        Returns:
            (n * k, d) fp32 on the CPU.
        """
        ids = self._as_batch(input_ids)
        n = len(self.span_lengths(ids.shape[1]))
        return self._encode_spans(ids, torch.zeros(n * self.memory_size, self.dim))

    @torch.no_grad()
    def compress_batch(self, rows: Sequence[torch.Tensor | Sequence[int]]) -> torch.Tensor:
        """Compress several documents of one span each in one batch, as the reference's version 1 does.

        Rows are padded with [PAD] to the longest, the memory tokens follow, and there is no attention mask. The memory
        tokens of a shorter row therefore read the padding and stand further from its text, so its slots differ from
        those of `compress` (getao/icae issues 3 and 23). With rows of equal length they are the same.

        Returns:
            (B, k, d) in the base's dtype.

        Raises:
            ValueError: a row is longer than one span.
        """
        ids = [self._as_batch(r)[0] for r in rows]
        longest = max(len(r) for r in ids)
        if longest > self.memory_size * self.compression_rate:
            raise ValueError(
                f"a row has {longest} tokens; version 1 has spans of {self.memory_size * self.compression_rate}"
            )
        return self._encode(nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.vocab_size - 1))

    def forward(
        self, input_ids: torch.Tensor, prompt_answer_ids: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Run the reference's training forward for a batch of one.

        Args:
            input_ids: context, (1, L).
            prompt_answer_ids: (1, S), with one memory id per slot.
            labels: (1, S), -100 at positions without a loss.

        Returns:
            `{"loss": (), "logits": (1, S, V + k + 3)}`, with `two_copies` (1, S, base vocabulary).
        """
        embeddings = self.tokens_to_embeddings(prompt_answer_ids)
        n = len(self.span_lengths(input_ids.shape[1]))
        slots = self._encode_spans(input_ids, torch.zeros(n * self.memory_size, self.dim).to(embeddings))
        is_memory = (prompt_answer_ids >= self.vocab_size) & (prompt_answer_ids < self.ae_token_id)
        embeddings[is_memory] = slots
        with self.icae.disable_adapter() if self.decoder is None else nullcontext():
            decoder = self.icae if self.decoder is None else self.decoder
            logits = decoder(inputs_embeds=embeddings, output_hidden_states=True).logits
        scores = logits[:, :-1, : self.n_base].flatten(0, 1)
        return {"loss": F.cross_entropy(scores, labels[:, 1:].flatten(), ignore_index=IGNORE), "logits": logits}

    def _decoder_input(self, slots: torch.Tensor, prompt_ids: Sequence[int], prefix_ids: Sequence[int]) -> torch.Tensor:
        prefix = self.tokens_to_embeddings(self._as_batch(prefix_ids))
        prompt = self.tokens_to_embeddings(self._as_batch(prompt_ids))
        return torch.cat((prefix, slots.to(prompt)[None], prompt), dim=1)

    @torch.no_grad()
    def generate(
        self, slots: torch.Tensor, prompt_ids: Sequence[int], prefix_ids: Sequence[int] = (), max_new_tokens: int = 128,
        min_new_tokens: int = 0, eos_ids: Sequence[int] = (), streamer: Any = None,
    ) -> list[int]:  # fmt: skip
        """Decode greedily from `prefix, slots, prompt`; every call runs the whole prefill again.

        Args:
            slots: result of `compress`, (n * k, d).
            prompt_ids: ids after the slots, special ones (AE, FT) included; at least one.
            prefix_ids: ids before the slots.
            max_new_tokens, min_new_tokens: bounds of the answer's length.
            eos_ids: ids that end the answer; they are not returned.
            streamer: called with `put(ids)` for every token and `end()`, like transformers' streamers.

        Returns:
            The new ids.
        """
        step_input, cache, produced = self._decoder_input(slots, prompt_ids, prefix_ids), DynamicCache(), []
        for step in range(max_new_tokens):
            with self.icae.disable_adapter():
                out = self.icae(inputs_embeds=step_input, past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1, : self.n_base]
            if step < min_new_tokens:
                logits[:, list(eos_ids)] = float("-inf")
            token = logits.argmax(-1)
            cache = out.past_key_values
            value = token.item()
            if value in eos_ids:
                break
            if streamer is not None:
                streamer.put(token)
            step_input = self._embed_tokens(token)[:, None]
            produced.append(value)
        if streamer is not None:
            streamer.end()
        return produced

    def answer(self, input_ids: torch.Tensor | Sequence[int], prompt_ids: Sequence[int], **options: Any) -> list[int]:
        """Call `compress`, then `generate` with its options."""
        return self.generate(self.compress(input_ids), prompt_ids, **options)

    @torch.no_grad()
    def answer_logits(
        self, slots: torch.Tensor, prompt_ids: Sequence[int], answer: Sequence[int], prefix_ids: Sequence[int] = ()
    ) -> torch.Tensor:
        """Return the frozen decoder's logits for every token of `answer` (used by checks; not in the reference).

        Returns:
            (len(answer), base vocabulary) fp32; row t scores the candidates for `answer[t]`.
        """
        embeddings = self._decoder_input(slots, [*prompt_ids, *answer[:-1]], prefix_ids)
        with self.icae.disable_adapter():
            out = self.icae(inputs_embeds=embeddings, use_cache=False)
        return out.logits[0, -len(answer) :, : self.n_base].float()
