"""Write one valid input or more for each target into its corpus: `python -m fuzz.seeds` with `tests` on the path."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from fuzz import CORPORA
from helpers.store import make_origin, memory_for, slot_kv
from icae_fast.config import ICAEConfig, Trained
from icae_fast.io.checkpoints import MEMORY_KEY, lora_key
from icae_fast.store.index_files import install_index
from icae_fast.store.memory_file import PackedMemory
from icae_fast.training.evaluation.cache import AnswerCache
from icae_fast.training.loop.checkpoint_folder import FILES, RECORD_FILE, _seal
from icae_fast.training.loop.settings_file import installed_configs

_CONFIG = {
    "format_version": 1,
    "config": ICAEConfig(memory_size=4, compression_rate=4).to_dict(),
    "base": {"hidden_size": 16},
    "adapter_hash": "0" * 16,
}
_HEADER = _CONFIG | {
    "config": ICAEConfig(memory_size=4, lora_rank=2).to_dict(),
    "trained": Trained(max_spans=2, span_tokens=16, dtype="bfloat16").to_dict(),
}
_PEFT = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"],
    "bias": "none", "use_dora": False, "base_model_name_or_path": "base",
}  # fmt: skip
_SHARDS = {"weight_map": dict.fromkeys((MEMORY_KEY, lora_key(0, "q", "A")), "a.safetensors")}


def _memories() -> Iterator[bytes]:
    for dtype in (None, "int8"):
        packed = PackedMemory.of(memory_for("a"), dtype)
        for flag in (b"\0", b"\1"):
            yield flag + packed.encode(make_origin(), kv=slot_kv() if dtype else None, key="a")


def adapter_tensors() -> dict[str, torch.Tensor]:
    """Return a tiny adapter's tensors: k = 4, d = 4 and LoRA of rank 2."""
    factors = {lora_key(0, "q", "A"): torch.ones(2, 4), lora_key(0, "q", "B"): torch.ones(4, 2)}
    return {MEMORY_KEY: torch.zeros(7, 4), **factors}


def _pickle() -> bytes:
    file = io.BytesIO()
    torch.save(adapter_tensors(), file)
    return file.getvalue()


def _index(folder: Path) -> bytes:
    install_index(folder / "index", {"a": "ab/0123.safetensors", "b": "../victim"})
    with sqlite3.connect(folder / "index") as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # fold the log into the file
    return (folder / "index").read_bytes()


def _answers(path: Path) -> bytes:
    with AnswerCache(path) as cache:
        cache.put("a", {"text": "one"})
    return path.read_bytes()


def _record(folder: Path) -> bytes:
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(b"content")
    _seal(folder)
    return (folder / RECORD_FILE).read_bytes()


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"]}), file)
    return file.getvalue()


def seeds(folder: Path) -> dict[str, list[bytes]]:
    """Return valid inputs by target.

    Args:
        folder: an empty folder for files in between.
    """
    yaml = installed_configs()["smollm2-cpu-pretrain"].read_bytes()
    lines = b'{"text": "one"}\n{"text": "tw\\u00f6"}\n'
    return {
        "memory": list(_memories()),
        "adapter_config": [json.dumps(_CONFIG).encode()],
        "adapter_header": [json.dumps(_HEADER).encode()],
        "peft_config": [json.dumps(_PEFT).encode()],
        "shard_index": [json.dumps(_SHARDS).encode()],
        "reference_safetensors": [save(adapter_tensors())],
        "reference_pickle": [_pickle()],
        "store_index": [_index(folder)],
        "store_rows": [b"../victim\nab/notes.txt\ncd/victim\n/etc/hostname\nab/" + b"0" * 32],
        "records": [b"\0" + lines, b"\1text", b"\2" + _parquet(), b"\x83" + lines, b"\x84" + lines, b"\x85" + lines],
        "settings": [yaml, yaml + b"\0train.max_steps=20"],
        "judge_reply": [b"<think>a</think>It is B.\n**Verdict: B**", b"TIE", b"Final answer: A"],
        "checkpoint_record": [flag + _record(folder / flag.hex()) for flag in (b"\0", b"\1")],
        "answer_cache": [_answers(folder / "answers.jsonl")],
    }


def main(folder: Path) -> None:
    """Write the seeds into the corpora."""
    for name, examples in seeds(folder).items():
        (CORPORA / name).mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(examples):
            (CORPORA / name / f"seed-{i}").write_bytes(data)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
