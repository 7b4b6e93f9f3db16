"""`ICAE`: the In-context Autoencoder over one set of base weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from icae_fast.backbone.stack import check_supported
from icae_fast.config import ICAEConfig
from icae_fast.core import compress as compressing
from icae_fast.core.core import ICAECore
from icae_fast.core.inputs import Vocabulary
from icae_fast.generation import memory_kv as slot_kv
from icae_fast.generation import prompts, writing
from icae_fast.io import checkpoints
from icae_fast.io.hub import load_base_model, resolve_adapter_folder, upload_adapter
from icae_fast.io.peft_folder import is_peft_folder, read_peft_adapter
from icae_fast.io.reference_files import find_reference_file, is_safetensors, read_reference_file
from icae_fast.step import loss

if TYPE_CHECKING:
    from typing_extensions import Self


class ICAE(ICAECore):
    """Compress long contexts into memory slots that the frozen base model reads in their place.

    The encoder is the base model with LoRA on q and v, reading `[span, k memory tokens]`; the slots are its final
    hidden states at the memory tokens. The decoder is the same model without the LoRA. There is one set of base
    weights, and the base model stays usable by itself.

    Make one with `from_base`, `from_pretrained` or `from_reference_checkpoint`.

    Attributes:
        base_model: the Hugging Face causal language model, frozen.
        config: the adapter's `ICAEConfig`.
        tokenizer: the base model's, or None to work on token ids only.
        adapter: `LoRAAdapter`, trained.
        memory_token_embed: (k + 3, d) embeddings of the memory tokens, AE, LM and FT, trained.
        slot_gain: () gain of slot scaling, trained, or None.
        max_positions: the most positions that the decoder may use; the base model's limit unless set.
        special_tokens: how the spelling of a control token in a text is read: "text" or "control".
        chat_template_kwargs: variables for the chat template, such as `{"date_string": "1 Jan 2026"}`.
        adapter_mode: how compressing applies the LoRA: "auto", "fused" or "merged".
        slot_kv: `SlotKVTree` of the keys and values that the decoder has read.

    Source: Ge et al., arXiv 2307.06945; getao/icae `code/icae_v2/modeling_icae_multi_span.py`.
    """

    # Each method below is a function of the room that it belongs to. Those functions take an `ICAECore`, so that no
    # room depends on this class, and signature, types and documentation are written once.
    encode = compressing.encode
    compress = compressing.compress
    extend = compressing.extend

    generate = writing.generate
    answer = writing.answer
    stream = writing.stream
    restore = writing.restore
    restore_by_span = writing.restore_by_span
    prompt_ids = prompts.prompt_ids
    prefix_ids = property(prompts.prefix_ids)
    end_id = property(prompts.end_id)

    memory_kv = slot_kv.memory_kv
    adopt_kv = slot_kv.adopt_kv
    kv_cache = slot_kv.kv_cache
    generation_inputs = slot_kv.generation_inputs

    forward = loss.forward
    token_losses = loss.token_losses
    token_guesses = loss.token_guesses

    reference_named_parameters = checkpoints.reference_named_parameters
    adapter_hash = checkpoints.adapter_hash
    save_pretrained = checkpoints.save_adapter

    @classmethod
    def from_base(cls, base_model: nn.Module, config: ICAEConfig | None = None, tokenizer: Any = None) -> Self:
        """Make a new, untrained ICAE around a base model, which it freezes.

        Args:
            base_model: a causal language model of transformers, of a family in `icae_fast.backbone.families`.
            config: sizes and conventions; the paper's by default.
            tokenizer: the base model's, needed for text.

        Raises:
            UnsupportedModelError: another architecture, or quantised or wrapped layers.
            TokenizerMismatchError: a tokenizer of another size.
            ConfigError: a span exceeds the base model's positions.
        """
        return cls(base_model, config or ICAEConfig(), tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        base_model: nn.Module | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        tokenizer: Any = None,
        revision: str | None = None,
        compression_rate: int | None = None,
        memory_tokens: torch.Tensor | None = None,
    ) -> Self:
        """Load a saved adapter, with the base model that it names unless one is passed.

        Args:
            path: a folder written by `save_pretrained`, or by PEFT with plain LoRA on q and v; a hub id; or the name
                of an adapter that comes with the package: "smollm2-135m".
            base_model: a model, or the name or path of one; None for the one in the adapter's config.
            dtype: of a base model that is loaded here.
            tokenizer: None for the base model's own, where it can be found.
            revision: of the adapter on the hub.
            compression_rate: context tokens per slot, so that spans have k times as many tokens; None for the
                adapter's own. Use rates that the adapter was trained at: for "smollm2-135m" 2, its own, and 4. A folder
                of PEFT says none; there None is 4, the reference's.
            memory_tokens: (k + 3, d) embeddings of the memory tokens, AE, LM and FT, for a folder of PEFT without them.

        Raises:
            ConfigError: a compression rate below 1, or spans that exceed the base model's positions.
            CheckpointError: no adapter there, or a damaged, incomplete or misshaped one.
            BaseModelMismatchError: the adapter was trained on another base model.
        """
        folder = resolve_adapter_folder(path, revision)
        if is_peft_folder(folder):
            saved = read_peft_adapter(folder, memory_tokens, compression_rate)
        else:
            saved = checkpoints.read_adapter(folder)
        config = saved.config
        if compression_rate is not None:
            config = config.replace(compression_rate=compression_rate)
        model, tokenizer = load_base_model(base_model, config, dtype, tokenizer)
        check_supported(model)
        checkpoints.check_base(model, saved.header["base"], str(path))
        icae = cls(model, config, tokenizer)
        checkpoints.load_adapter(icae, saved)
        return icae.eval()

    @classmethod
    def from_reference_checkpoint(
        cls,
        path: str | Path,
        base_model: nn.Module,
        compression_rate: int = 4,
        lora_alpha: float = 32,
        tokenizer: Any = None,
    ) -> Self:
        """Load a checkpoint of getao/icae: v1 `.pt` (read with `weights_only=True`) or v2 `.safetensors`.

        Memory size, rank and ids follow from the tensors. Rate and alpha are in no file; the defaults are those of the
        published checkpoints. A `.pt` file gets the `"v1"` prompt format.

        Args:
            path: of the file, of the index of its shards, or of a folder with one of these.
            base_model: the model that the checkpoint was trained on.
            compression_rate: context tokens per slot.
            lora_alpha: alpha of the LoRA.
            tokenizer: the base model's, needed for text.

        Raises:
            CheckpointError: truncated, or keys missing, unknown or misshaped; the message lists all of them.
            BaseModelMismatchError: the file carries base weights, and they are not this model's.
        """
        file = find_reference_file(path)
        adapter, base = checkpoints.split_reference_tensors(read_reference_file(file))
        memory_size, rank = checkpoints.infer_sizes(adapter, str(path))
        config = ICAEConfig(
            memory_size=memory_size,
            compression_rate=compression_rate,
            lora_rank=rank,
            lora_alpha=lora_alpha,
            prompt_format="chat" if is_safetensors(file) else "v1",
        )
        check_supported(base_model)
        checkpoints.check_base_weights(base_model, base, str(path))
        icae = cls(base_model, config, tokenizer)
        checkpoints.load_adapter_tensors(icae, adapter, str(path))
        return icae.eval()

    def push_to_hub(self, name: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes to a hub repository, and return its address.

        Args:
            name: "user/repository".
            kwargs: for `huggingface_hub.HfApi.create_repo` (`private`, `token`).
        """
        return upload_adapter(self, name, **kwargs)

    def with_memory_size(self, memory_size: int) -> Self:
        """Return a smaller ICAE that compresses the same spans into the first `memory_size` of the k slots.

        This suits adapters trained with many memory sizes (see `encode`): one adapter then serves several compression
        rates. The slots equal those of `encode(contexts, memory_size=memory_size)`.

        Base model, LoRA factors, slot gain, merged weights and `slot_kv` are shared with this ICAE, so that the
        smaller one takes almost no memory, and training one trains the other. The memory tokens are copied.

        Args:
            memory_size: k' from 1 to k, a divisor of `k * rate`; the compression rate becomes `k * rate / k'`.

        Returns:
            An independent ICAE, which can be saved, with ids of AE, LM and FT that follow k'.

        Raises:
            ConfigError: another memory size.
        """
        config = self.config.with_memory_size(memory_size)
        # The adapter module is copied around shared factors: `eval()` of one must not change the other's dropout.
        shared = (
            self.base_model, self.tokenizer, self.backbone, self.slot_kv, self.encoder_weights, self.slot_gain,
            self.memory_token_embed, *self.adapter.parameters(),
        )  # fmt: skip
        smaller = copy.deepcopy(self, {id(x): x for x in shared})
        smaller.config, smaller.vocabulary = config, Vocabulary(self.vocabulary.n_base, config)
        weight = self.memory_token_embed.weight.detach()
        rows = torch.cat((weight[:memory_size], weight[self.config.memory_size :]))
        smaller.memory_token_embed = nn.Embedding.from_pretrained(rows, freeze=False).train(self.training)
        return smaller
