"""Making, loading and saving an `ICAE`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from icae_fast.backbone.stack import check_supported
from icae_fast.config import ICAEConfig
from icae_fast.core.inputs import Vocabulary
from icae_fast.io import checkpoints
from icae_fast.io.hub import load_base_model, resolve_adapter_folder, upload_adapter
from icae_fast.io.identity import tensors_hash

if TYPE_CHECKING:
    from icae_fast.model.icae import ICAE


class PretrainedMixin:
    """The constructors of `ICAE` and their counterparts, and the names of what is trained."""

    @classmethod
    def from_base(cls, base_model: nn.Module, config: ICAEConfig | None = None, tokenizer: Any = None) -> ICAE:
        """A new, untrained ICAE around a base model (which it freezes).

        Args:
            base_model: a `transformers` LLaMA, Mistral, Qwen2 or Qwen3 causal language model.
            config: sizes and conventions; the paper's by default.
            tokenizer: the base model's, needed for text.

        Raises:
            UnsupportedModelError: another architecture, or quantised or wrapped layers.
            TokenizerMismatchError: a tokenizer of another size.
            ConfigError: a span does not fit the base model's positions.
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
    ) -> ICAE:
        """Load a saved adapter, with the base model that it names unless one is given.

        Args:
            path: a folder written by `save_pretrained`, a hub id, or the name of an adapter that comes with the
                package: "smollm2-135m".
            base_model: a model, or the name or path of one; None for the one in the adapter's config.
            dtype: of a base model that is loaded here.
            tokenizer: None for the base model's own, where it can be found.
            revision: of the adapter on the hub.
            compression_rate: context tokens a slot, and so spans of k times as many tokens; None for the adapter's own.
                Good for what it was trained at: "smollm2-135m" for 2, its own, and 4.

        Raises:
            ConfigError: a compression rate below 1, or spans that do not fit the base model's positions.
            CheckpointError: no adapter there, or a damaged, incomplete or misshaped one.
            BaseModelMismatchError: the base model is not the one that the adapter was trained on.
        """
        folder = resolve_adapter_folder(path, revision)
        config, header = checkpoints.read_header(folder)
        if compression_rate is not None:
            config = config.replace(compression_rate=compression_rate)
        model, tokenizer = load_base_model(base_model, config, dtype, tokenizer)
        checkpoints.check_base(model, header["base"], str(path))
        icae = cls(model, config, tokenizer)
        checkpoints.load_adapter(icae, folder, header)
        return icae.eval()

    @classmethod
    def from_reference_checkpoint(
        cls,
        path: str | Path,
        base_model: nn.Module,
        compression_rate: int = 4,
        lora_alpha: float = 32,
        tokenizer: Any = None,
    ) -> ICAE:
        """Load a checkpoint of getao/icae: v1 `.pt` (read with `weights_only=True`) or v2 `.safetensors`.

        Memory size, rank and ids follow from the tensors; rate and alpha are in no file, and the defaults
        are those of the published ones. A `.pt` file gets the `"v1"` prompt format.

        Raises:
            CheckpointError: truncated, or keys missing, unknown or misshaped, all of them listed.
            BaseModelMismatchError: the file carries base weights, and they are not this model's.
        """
        adapter, base = checkpoints.split_reference_tensors(checkpoints.read_reference_file(path))
        memory_size, rank = checkpoints.infer_sizes(adapter, str(path))
        config = ICAEConfig(
            memory_size=memory_size,
            compression_rate=compression_rate,
            lora_rank=rank,
            lora_alpha=lora_alpha,
            prompt_format="chat" if str(path).endswith(".safetensors") else "v1",
        )
        check_supported(base_model)
        checkpoints.check_base_weights(base_model, base, str(path))
        icae = cls(base_model, config, tokenizer)
        checkpoints.load_adapter_tensors(icae, adapter, str(path))
        return icae.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `adapter.safetensors` (trained tensors alone, under the reference's keys) and `icae_config.json`.

        Args:
            folder: where to.
            dtype: of the tensors in the file; None as they are held, in fp32. bf16 halves the file and rounds as
                computing in bf16 does anyway, but what is trained further should keep fp32.

        Raises:
            CheckpointError: the folder cannot be written; nothing half-written stays.
        """
        checkpoints.save_adapter(self, folder, dtype)

    def push_to_hub(self, name: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes to a hub repository; gives its address.

        Args:
            name: "user/repository".
            kwargs: for `huggingface_hub.HfApi.create_repo` (`private`, `token`).
        """
        return upload_adapter(self, name, **kwargs)

    def with_memory_size(self: ICAE, memory_size: int) -> ICAE:
        """A smaller ICAE that compresses the same spans into the first `memory_size` slots of the k.

        Good where training drew many memory sizes (see `encode`): one adapter then serves several compression rates.
        Its slots are those of `encode(contexts, memory_size=memory_size)`.

        Base model, LoRA factors, slot gain, merged weights and `slot_kv` are shared with this one, so that it takes
        no memory to speak of, and training one trains the other; the memory tokens are copied as they are now.

        Args:
            memory_size: k' from 1 to k, a divisor of `k * rate`; its compression rate is `k * rate / k'`.

        Returns:
            An ICAE of its own, which can be saved, and whose ids of AE, LM and FT follow its k'.

        Raises:
            ConfigError: another memory size.
        """
        config = self.config.with_memory_size(memory_size)
        # The adapter is a module of its own on the same factors, so that `eval()` of one leaves the other's dropout be.
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

    def reference_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (key in the reference's checkpoints, trained parameter)."""
        for layer, projection, factor, parameter in self.adapter.named_factors():
            yield checkpoints.lora_key(layer, projection, factor), parameter
        yield checkpoints.MEMORY_KEY, self.memory_token_embed.weight
        if self.slot_gain is not None:
            yield checkpoints.GAIN_KEY, self.slot_gain

    def adapter_hash(self) -> str:
        """16 hex digits that identify the trained tensors."""
        return tensors_hash(self.reference_named_parameters())
