"""Memories and origins for tests of stores, without a model."""

import torch

from icae_fast import ICAEConfig, Memory, Origin, SlotKV

K, D = 4, 16


def make_origin():
    """An origin without a model, k = 4 and d = 16."""
    base = {"hidden_size": D, "num_hidden_layers": 2, "num_key_value_heads": 2, "fingerprint": "0123" * 8}
    return Origin(base, "0123456789abcdef", ICAEConfig(memory_size=K, compression_rate=4))


def memory_for(key, spans=2):
    """The memory that belongs to a key: bf16, random by the key's characters."""
    generator = torch.Generator().manual_seed(int.from_bytes(key.encode()[-7:], "little"))
    slots = torch.randn(spans * K, D, generator=generator).bfloat16()
    return Memory(slots, 10 * spans, (10,) * spans)


def slot_kv(n_slots=2 * K, prefix=(5, 6), seed=0):
    """Keys and values of slots behind two tokens."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, n_slots, 2, 8, generator=generator).bfloat16()
    return SlotKV(keys, values, prefix)


def file_of(store):
    """The file of the only entry of a local store."""
    (path,) = store._folder.root.glob("??/*.safetensors")
    return path
