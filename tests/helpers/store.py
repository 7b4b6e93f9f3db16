"""Memories and provenance for tests of stores, without a model."""

import torch

from icae_fast import ICAEConfig, Memory, Origin, SlotKV
from icae_fast.store import compressing

K, D = 4, 16


def make_origin():
    """Return a provenance without a model, k = 4 and d = 16."""
    base = {"hidden_size": D, "num_hidden_layers": 2, "num_key_value_heads": 2, "fingerprint": "0123" * 8}
    return Origin(base, "0123456789abcdef", ICAEConfig(memory_size=K, compression_rate=4))


def count_compressed(monkeypatch):
    """Return a list that grows by the number of contexts of each call with which a store compresses."""
    calls = []
    compress = compressing.compress_cut

    def counting(core, cuts, **options):
        calls.append(len(cuts))
        return compress(core, cuts, **options)

    monkeypatch.setattr(compressing, "compress_cut", counting)
    return calls


def memory_for(key, spans=2):
    """Return the memory that belongs to a key: bf16, random numbers seeded by the key."""
    generator = torch.Generator().manual_seed(int.from_bytes(key.encode()[-7:], "little"))
    slots = torch.randn(spans * K, D, generator=generator).bfloat16()
    return Memory(slots, 10 * spans, (10,) * spans)


def slot_kv(n_slots=2 * K, prefix=(5, 6), seed=0):
    """Return random keys and values of slots behind two tokens."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, n_slots, 2, 8, generator=generator).bfloat16()
    return SlotKV(keys, values, prefix)


def file_of(store):
    """Return the file of the only entry of a local store."""
    (path,) = store._folder.root.glob("??/*.safetensors")
    return path
