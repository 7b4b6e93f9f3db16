"""The base model's layer stack over packed rows, with the adapter on or off.

`Backbone` runs this package's ops on the weights of the Hugging Face model's own modules. It copies no weights, and the
model still works by itself. Where the ops do not compute what a module does (another activation, quantised weights,
hooks, another forward of an instance, or a parameter that requires a gradient), the module itself is called. Layers,
attention and q, k and v are never called: where one is more than its class, a forward refuses the model
(`icae_fast.backbone.hooks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

from icae_fast.backbone.families.table import view_of
from icae_fast.backbone.hooks import is_frozen
from icae_fast.backbone.layer import KeyValueCache, StackPass, Tables, forward_layer
from icae_fast.backbone.lora import MergedQKV, PackedLoRA
from icae_fast.backbone.modules import apply_norm, is_plain_linear, is_plain_mlp, is_plain_norm
from icae_fast.backbone.packing import packed_gate_up, packed_qkv
from icae_fast.backbone.rows import PackedRows
from icae_fast.backbone.sharding import gathered, is_sharded
from icae_fast.backbone.support import check_supported
from icae_fast.errors import BackendError, UnsupportedModelError

Pass = TypeVar("Pass", bound=StackPass)


class Backbone:
    """The decoder layers of a Hugging Face causal language model, run over packed rows.

    Args:
        model: a causal language model of a type in `icae_fast.backbone.families.table.FAMILIES`.

    Attributes:
        model: the model without its head.
        view: the causal language model by role.
        n_layers, hidden_size, num_q_heads, num_kv_heads, head_dim: sizes, as in the model's configuration.
        windows: sliding window of each layer in keys, 0 for none.
        all_rope: whether every layer rotates its queries and keys.

    Raises:
        UnsupportedModelError: see `icae_fast.backbone.support.check_supported`.
    """

    def __init__(self, model: nn.Module) -> None:
        check_supported(model)
        config: Any = model.config
        self.view = view_of(model)
        self.model: nn.Module = self.view.decoder
        self.n_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.num_q_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = self.view.layer(0).head_dim
        self.windows: list[int] = [layer.window for layer in self.view]
        self.all_rope: bool = all(layer.rope for layer in self.view)

    def forward(
        self,
        x: torch.Tensor,
        rows: PackedRows,
        lora: Sequence[PackedLoRA] | Sequence[MergedQKV] | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Return the final-normed hidden states of packed embeddings.

        Args:
            x: (T, d) input embeddings.
            rows: row boundaries, positions, and which hidden states are requested. In the last layer only those rows
                have queries, an output projection and an MLP.
            lora: packed LoRA or merged weights of each layer (encoder), or None (frozen decoder).
            cache: holds earlier keys and values of each row, and is appended to.

        Returns:
            (Tq, d), or (T, d) when `rows.out_rows` is None.

        Raises:
            BackendError: the layers are sharded and autograd is on, which would keep gathered weights alive.
        """
        if self.is_sharded and torch.is_grad_enabled():
            raise BackendError(
                "the layers are sharded by FSDP2, and autograd would keep gathered weights alive behind each layer; "
                "train by `ICAE.token_losses`, or compute under torch.no_grad()"
            )
        p = self.new_pass(StackPass, x, rows, lora, cache=cache)
        residual = None
        for i in range(self.n_layers):
            with self.whole(i, 1) as module:
                x, residual = forward_layer(p, i, self.view.layer(i, module), x, residual)
        return self.final_norm(x, residual)

    def new_pass(
        self,
        kind: type[Pass],
        x: torch.Tensor,
        rows: PackedRows,
        lora: Sequence[PackedLoRA] | Sequence[MergedQKV] | None,
        **fields: Any,
    ) -> Pass:
        """Return what the layers of one forward share.

        Args:
            kind: `StackPass` or a subclass of it.
            x, rows, lora: see `forward`.
            fields: the other fields of `kind`.
        """
        return kind(
            rows=rows, tables=self._tables(rows.positions, x), heads=(self.num_q_heads, self.num_kv_heads),
            windows=self.windows, lora=lora, **fields,
        )  # fmt: skip

    @property
    def embedding(self) -> torch.Tensor:
        """The base model's token embedding (V, d), which has the compute dtype and the device."""
        return self.view.embedding.weight

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards the layers' weights (`fully_shard` of each layer)."""
        return is_sharded(self.view.layers[0])

    def whole(self, i: int, step: int) -> AbstractContextManager[nn.Module]:
        """Return a context that yields layer i's module with its weights unsharded.

        Args:
            i: number of the layer.
            step: 1 or -1; the weights of layer i + step are prefetched. See `icae_fast.backbone.sharding.gathered`.
        """
        return gathered(self.view.layers, i, step)

    def stand_by(self, step: int) -> None:
        """Take part in the gathers of a pass over sharded layers that only other processes compute.

        Args:
            step: 1 for a forward, -1 for a backward.
        """
        for i in range(self.n_layers)[::step]:
            with self.whole(i, step):
                pass

    def final_norm(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return the norm behind the last layer, of `residual + x`."""
        return apply_norm(self.view.final_norm, x, residual)[0]

    def is_plain_stack(self, x: torch.Tensor) -> bool:
        """Return whether ops compute everything in the layers, so that a backward can be composed of their backwards.

        Args:
            x: a tensor of the compute dtype.
        """
        return all(
            is_frozen(layer.qkv)
            and is_plain_norm(layer.attention_norm, x)
            and is_plain_linear(layer.o, x)
            and is_plain_norm(layer.mlp_norm, x)
            and is_plain_mlp(layer, x)
            for layer in self.view
        )

    def pack(self) -> None:
        """Make adjacent the weights of each layer that an op reads together, as a forward does (see `packed`)."""
        for layer in self.view:
            packed_qkv(layer)
            if layer.swiglu is not None:
                packed_gate_up(layer)

    def compile(self, **options: Any) -> None:
        """Run forwards without a cache (encoding) by `torch.compile` from now on; forwards with a cache stay as is.

        Args:
            options: for `torch.compile`; `fullgraph` is True by default.
        """
        plain, compiled = self.forward, torch.compile(self.forward, **({"fullgraph": True} | options))

        def forward(
            x: torch.Tensor,
            rows: PackedRows,
            lora: Sequence[PackedLoRA] | Sequence[MergedQKV] | None = None,
            cache: KeyValueCache | None = None,
        ) -> torch.Tensor:
            if cache is not None:
                return plain(x, rows, lora, cache)
            self.pack()
            return compiled(x, rows, lora)

        vars(self)["forward"] = forward  # in front of the method

    def rotary_tables(self, positions: torch.Tensor, x: torch.Tensor) -> Tables:
        """Return cos and sin (T, D / 2) of positions (T,), in fp32 (fp64 where x is fp64).

        Raises:
            UnsupportedModelError: positions beyond `ModelView.rope_limit`.
        """
        limit = self.view.rope_limit
        if limit is not None and len(positions) and int(positions.max()) >= limit:
            raise UnsupportedModelError(
                f"a row of {int(positions.max()) + 1} positions: the base model's RoPE of type "
                f"{self.view.rope_type!r} depends on a row's length beyond {limit}, so that a row would depend on "
                f"those beside it; stay below, or load the model with another rope_type"
            )
        # The Hugging Face forward rounds them to bf16, which costs accuracy and saves no time.
        cos, sin = self.view.rotary_tables(positions, torch.float64 if x.dtype == torch.float64 else torch.float32)
        half = self.head_dim // 2  # both halves of a head rotate by the same angles
        return cos[:, :half].contiguous(), sin[:, :half].contiguous()

    def _tables(self, positions: torch.Tensor, x: torch.Tensor) -> tuple[Tables, Tables]:
        """Return the tables of layers without RoPE (cos = 1, sin = 0), and of layers with RoPE."""
        cos, sin = self.rotary_tables(positions, x)
        if self.all_rope:
            return (cos, sin), (cos, sin)
        return (torch.ones_like(cos), torch.zeros_like(sin)), (cos, sin)
