"""The base model's layer stack run over packed rows, with the adapter on or off.

`Backbone` runs this package's ops on the weights of the Hugging Face model's own modules; it copies none, and the
model goes on working by itself. A module that is not what the ops compute (another activation, quantised, with
hooks, or asking for a gradient) is called itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from icae_fast.backbone.lora import MergedQKV, PackedLoRA
from icae_fast.backbone.rows import PackedRows
from icae_fast.backbone.sharding import gathered, is_sharded
from icae_fast.errors import BackendError, UnsupportedModelError
from icae_fast.ops import REGISTRY, backend_of, linear, rms_norm, swiglu, varlen_attention
from icae_fast.ops._declare import Op

_LORA_QKV_ROPE = Op("lora_qkv_rope")
_OF_ATTENTION, _OF_MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class KeyValueCache(Protocol):
    """What the backbone asks of a cache: `icae_fast.kv.segments.DecoderRows` is one."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, scale: float,
        window: int,
    ) -> torch.Tensor:  # fmt: skip
        """Append the keys and values of the rows announced last, and attend to all that these rows have read."""


def check_supported(model: nn.Module) -> None:
    """Raise unless the model is one that `Backbone` computes exactly.

    Raises:
        UnsupportedModelError: another architecture, quantised or wrapped projections, attention dropout, or a dtype
            that the kernels of its device do not take.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            "the base model carries PEFT adapters; pass what `model.unload()` gives, or `model.merge_and_unload()`"
        )
    if kind not in SUPPORTED_MODEL_TYPES or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"base models of type {kind!r} are not supported; use a causal language model of one of the types "
            f"{', '.join(SUPPORTED_MODEL_TYPES)} (LLaMA, Mistral, Qwen2, Qwen3)"
        )
    attention = model.model.layers[0].self_attn
    for name in _OF_ATTENTION:
        if type(getattr(attention, name)) is not nn.Linear:
            raise UnsupportedModelError(
                f"{name} is a {type(getattr(attention, name)).__name__}; load the base model unquantised, with plain "
                "nn.Linear layers"
            )
    embedding = model.get_input_embeddings().weight
    backend = backend_of("lora_qkv_rope", embedding.device)
    if embedding.dtype not in (dtypes := REGISTRY["lora_qkv_rope"].dtypes[backend]):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise UnsupportedModelError(
            f"the base model is in {str(embedding.dtype).removeprefix('torch.')}, which the {backend} kernels do not "
            f"take on {embedding.device.type}; load it in one of {names}"
        )
    if getattr(model.config, "attention_dropout", 0.0):
        raise UnsupportedModelError("the base model has attention dropout; load it with attention_dropout=0.0")


class Backbone:
    """Runs the decoder layers of a Hugging Face causal language model over packed rows.

    Args:
        model: the causal language model; see `SUPPORTED_MODEL_TYPES`.

    Raises:
        UnsupportedModelError: see `check_supported`.
    """

    def __init__(self, model: nn.Module) -> None:
        check_supported(model)
        config = model.config
        self.model = model.model
        self.n_layers = config.num_hidden_layers
        self.hidden_size = config.hidden_size
        self.num_q_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = self.model.layers[0].self_attn.head_dim
        self.windows = [_window(config, i) for i in range(self.n_layers)]

    def forward(
        self,
        x: torch.Tensor,
        rows: PackedRows,
        lora: Sequence[PackedLoRA] | Sequence[MergedQKV] | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Final-normed hidden states of packed embeddings.

        Args:
            x: (T, d) input embeddings.
            rows: where rows begin, their positions, and which hidden states are asked for; in the last layer
                queries, output projection and MLP run for those alone.
            lora: each layer's packed LoRA or merged weights (encoder), or None (frozen decoder).
            cache: holds earlier keys and values of each row, and is appended to.

        Returns:
            (Tq, d), or (T, d) when `rows.out_rows` is None.

        Raises:
            BackendError: the layers are sharded and autograd is on, which would keep weights that are let go of.
        """
        if self.is_sharded and torch.is_grad_enabled():
            raise BackendError(
                "the layers are sharded by FSDP2, and autograd would keep weights that are let go of behind each of "
                "them; train by `ICAE.token_losses`, or compute without a graph"
            )
        cos, sin = self.rotary_tables(rows.positions, x)
        stream = None  # the residual stream without what the last module gave, which the next norm adds
        for i in range(self.n_layers):
            with self.whole(i, 1) as layer:
                x, stream = self._layer(i, layer, x, stream, cos, sin, rows, lora[i] if lora else None, cache)
        return self.final_norm(x, stream)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 holds the layers' weights in shares (`fully_shard` of each layer)."""
        return is_sharded(self.model.layers[0])

    def whole(self, i: int, step: int) -> AbstractContextManager[nn.Module]:
        """Layer i with its weights in one piece, on the way to layer i + step; see
        `icae_fast.backbone.sharding.gathered`."""
        return gathered(self.model.layers, i, step)

    def stand_by(self, step: int) -> None:
        """Take part in the gathers of a pass over sharded layers that only other processes compute.

        Args:
            step: 1 for a forward, -1 for a backward.
        """
        for i in range(self.n_layers)[::step]:
            with self.whole(i, step):
                pass

    def final_norm(self, x: torch.Tensor, stream: torch.Tensor | None = None) -> torch.Tensor:
        """The norm behind the last layer, of `x` and the residual stream without it."""
        return _norm(self.model.norm, x, stream)[0]

    def is_plain_stack(self, x: torch.Tensor) -> bool:
        """Whether ops compute all that layers do, so that a backward may be put together of theirs."""

        return all(
            _is_plain_norm(layer.input_layernorm, x)
            and _is_plain_linear(layer.self_attn.o_proj, x)
            and _is_plain_norm(layer.post_attention_layernorm, x)
            and _is_plain_mlp(layer.mlp, x)
            for layer in self.model.layers
        )

    def pack(self) -> None:
        """Make weights of each layer that are read together adjacent, as a forward does by itself (see `packed`)."""
        for layer in self.model.layers:
            packed_qkv(layer.self_attn)
            if self.is_silu(layer.mlp):
                self.gate_up(layer)

    def compile(self, **options: Any) -> None:
        """Run forwards without a cache, which encode, by `torch.compile` from now on, and others as before.

        Args:
            options: for `torch.compile`; `fullgraph` is True unless it is given.
        """
        plain, compiled = self.forward, torch.compile(self.forward, **({"fullgraph": True} | options))

        def forward(x, rows, lora=None, cache=None):
            if cache is not None:
                return plain(x, rows, lora, cache)
            self.pack()
            return compiled(x, rows, lora)

        self.forward = forward

    def _layer(self, i, layer, x, stream, cos, sin, rows, lora, cache):
        last = i == self.n_layers - 1 and rows.out_rows is not None
        out_rows = rows.out_rows if last else None
        attention = _part(layer, "self_attn")
        h, stream = _norm(_part(layer, "input_layernorm"), x, stream)
        q, k, v = self._project(layer, h, cos, sin, out_rows, lora)
        cu_q, max_q = (rows.cu_seqlens_out, rows.max_seqlen_out) if last else (rows.cu_seqlens, rows.max_seqlen)
        scale, window = attention.scaling, self.windows[i]
        if cache is None:
            attended, _ = varlen_attention(
                q, k, v, cu_q, rows.cu_seqlens, max_q, rows.max_seqlen, scale=scale, window=window
            )
        else:
            attended = cache.attend(i, q, k, v, cu_q, scale, window)
        stream = stream[out_rows] if last else stream
        x = _linear(_part(attention, "o_proj"), attended.flatten(1))
        h, stream = _norm(_part(layer, "post_attention_layernorm"), x, stream)
        return _mlp(layer, h), stream

    def projection(self, layer, h, cos, sin, out_rows, lora) -> tuple:
        """The arguments that the op `lora_qkv_rope` takes for a layer, in its schema's order."""
        attention = _part(layer, "self_attn")
        weight, bias = packed_qkv(attention, move=not is_sharded(layer))
        if isinstance(lora, MergedQKV):
            weight, lora = lora.weight, None
        q_norm = attention._modules.get("q_norm")
        eps = 0.0 if q_norm is None else q_norm.variance_epsilon
        a, b, scale, p, seed = lora.parts if lora else (None, None, 0.0, 0.0, None)
        return (
            h, weight, bias, a, b, cos, sin, qk_norms(attention), out_rows, seed,
            self.num_q_heads, self.num_kv_heads, scale, eps, p,
        )  # fmt: skip

    def _project(self, layer, h, cos, sin, out_rows, lora):
        _check_frozen(layer.self_attn)
        return _LORA_QKV_ROPE(*self.projection(layer, h, cos, sin, out_rows, lora))

    @staticmethod
    def gate_up(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a layer's packed gate-up projection; see `packed`."""
        mlp = _part(layer, "mlp")
        return packed((_part(mlp, "gate_proj"), _part(mlp, "up_proj")), move=not is_sharded(layer))

    @staticmethod
    def is_silu(mlp: nn.Module) -> bool:
        """Whether an MLP is the one that `swiglu` computes: three linear modules and SiLU."""
        silu = type(mlp._modules.get("act_fn")).__name__ in ("SiLU", "SiLUActivation")
        return silu and all(type(mlp._modules.get(n)) is nn.Linear for n in _OF_MLP)

    def rotary_tables(self, positions: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (T, D / 2) of positions (T,), in fp32 (fp64 where x is)."""
        # Kept in fp32: the Hugging Face forward rounds them to bf16, which costs accuracy and gains nothing.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = self.model.rotary_emb(x.new_empty(0, dtype=dtype), positions[None])
        half = self.head_dim // 2  # both halves of a head turn by the same angles
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def is_plain(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether an op may compute from a module's weights: frozen, in the dtype of x, and with nobody looking on."""
    return not _hooked(module) and _computable(module, x.dtype, torch.is_grad_enabled())


def _hooked(module):
    return module._forward_hooks or module._forward_pre_hooks


def _computable(module, dtype, graph):
    """Are all parameters of that dtype, and frozen where there is a graph? `parameters()` takes ten times as long."""
    for p in module._parameters.values():
        if p is not None and (p.dtype != dtype or (graph and p.requires_grad)):
            return False
    children = module._modules
    return not children or all(_computable(c, dtype, graph) for c in children.values() if c is not None)


def _part(module, name):
    """A module's submodule or parameter of that name. `nn.Module.__getattr__` takes ten times as long."""
    found = module._modules.get(name)
    if found is None:
        found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def _is_plain_norm(module, x):
    return "variance_epsilon" in module.__dict__ and is_plain(module, x)


def _is_plain_linear(module, x):
    return type(module) is nn.Linear and is_plain(module, x)


def _is_plain_mlp(module, x):
    if not Backbone.is_silu(module) or not is_plain(module, x):  # of all parameters, those of the three among them
        return False
    gate, up, down = (_part(module, n) for n in _OF_MLP)
    return not (_hooked(gate) or _hooked(up) or _hooked(down)) and (gate.bias is None) == (up.bias is None)


def _norm(module, x, stream):
    """The norm of `stream + x`, and that sum."""
    if _is_plain_norm(module, x):
        return rms_norm(x, _part(module, "weight"), module.variance_epsilon, residual=stream)
    total = x if stream is None else stream + x
    return module(total), total


def _linear(module, x):
    return linear(x, _part(module, "weight"), module.bias) if _is_plain_linear(module, x) else module(x)


def _mlp(layer, x):
    mlp = _part(layer, "mlp")
    if not _is_plain_mlp(mlp, x):
        return mlp(x)
    down = _part(mlp, "down_proj")
    return linear(swiglu(x, *Backbone.gate_up(layer)), _part(down, "weight"), down.bias)


def _check_frozen(attention: nn.Module) -> None:
    """Raise where q, k or v would go without the gradient that their parameters ask for."""
    if not torch.is_grad_enabled():
        return
    for name in _OF_ATTENTION:
        if any(p.requires_grad for p in getattr(attention, name).parameters()):
            raise BackendError(
                f"{name} asks for a gradient and gets none here: freeze the base model with requires_grad_(False)"
            )


def _window(config, layer: int) -> int:
    """Sliding window of a layer in tokens, 0 for none."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return window or 0 if types[layer] == "sliding_attention" else 0
    return window or 0 if config.model_type == "mistral" else 0


def qk_norms(attention: nn.Module) -> torch.Tensor | None:
    """(2, D) weights of the norms of query and key heads, None for a model without them."""
    if attention._modules.get("q_norm") is None:
        return None
    return torch.stack((attention.q_norm.weight, attention.k_norm.weight)).detach()


def packed_qkv(attention: nn.Module, *, move: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W_q, W_k and W_v as one tensor, and their biases likewise; see `packed`.

    Returns:
        weight ((Hq + 2 Hkv) D, d) and bias ((Hq + 2 Hkv) D,) or None.
    """
    return packed(tuple(_part(attention, n) for n in _OF_ATTENTION), move=move)


def packed(modules: Sequence[nn.Linear], *, move: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights of linear modules one under the other as one tensor that shares its memory with them.

    The first call moves them into one block and makes the modules' parameters views of it, so there is no second
    copy; later calls find them adjacent and only make the view. Loading weights into the modules, saving them and
    training them go on as before.

    Args:
        modules: as they lie one under the other.
        move: False for weights whose memory is somebody else's, as that of gathered ones is FSDP2's: they are copied.

    Returns:
        weight (rows of all, d) and bias (rows of all,) or None.
    """
    weight = _packed([_part(m, "weight") for m in modules], move)
    return weight, None if modules[0].bias is None else _packed([m.bias for m in modules], move)


def _packed(parameters: list[nn.Parameter], move: bool) -> torch.Tensor:
    if not move:
        return torch.cat([p.detach() for p in parameters])
    first = parameters[0]
    # A graph cannot ask for addresses; `Backbone.compile` does before it runs.
    if not torch.compiler.is_compiling() and not _adjacent(parameters):
        with torch.no_grad():
            block = torch.cat([p.detach() for p in parameters])
            for p, part in zip(parameters, block.split([p.shape[0] for p in parameters]), strict=True):
                p.data = part
    rows, base = sum(p.shape[0] for p in parameters), first.detach() if torch.is_grad_enabled() else first
    return base.as_strided((rows, *first.shape[1:]), first.stride())


def _adjacent(parameters: list[nn.Parameter]) -> bool:
    address = parameters[0].data_ptr()
    end = parameters[0].untyped_storage().data_ptr() + parameters[0].untyped_storage().nbytes()
    for p in parameters:
        if p.data_ptr() != address or not p.is_contiguous():
            return False
        address += p.nbytes
    return address <= end
