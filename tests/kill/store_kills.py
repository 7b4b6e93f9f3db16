"""Kill a writer of stores many times, and count what was lost: `python store_kills.py WRITER KILLS FOLDER`.

Each time a forked process does the work and is killed: half of the times by itself at a line of the package (the lines
are evenly spread over the work), half of the times from outside at a random moment. Then the folder is checked. It
prints one JSON object with `kills`, `finished` (the work was done before) and `failures` (sentences). It runs with one
thread, because a forked process has no others.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from helpers.faults.cuts import count_lines, killed
from helpers.store import make_origin, memory_for
from icae_fast import ICAE, ICAEConfig, MemoryStore, errors
from icae_fast.store.memory_file import read_memory_header

MODULES = ("store", "io/files.py", "cli/commands")
OLD = [f"old-{i}" for i in range(4)]


def put_all(store, keys, salt=""):
    for key in keys:
        store.put(key, memory_for(key + salt))


def expect(store, key, *salts):
    """Raise unless the entry of a key is one of its versions."""
    slots = store.get(key).slots
    if not any(torch.equal(slots, memory_for(key + salt).slots) for salt in salts):
        raise AssertionError(f"{key} has the slots of another memory")


class Put:
    """Replaces entries and puts new ones."""

    new = tuple(f"new-{i}" for i in range(3))

    def prepare(self, root):
        with MemoryStore(root, make_origin()) as store:
            put_all(store, OLD)

    def work(self, root):
        with MemoryStore(root, make_origin()) as store:
            put_all(store, OLD[:2], "!")
            put_all(store, self.new)

    def check(self, root):
        with MemoryStore(root, make_origin(), create=False) as store:
            for key in OLD:
                expect(store, key, *(["", "!"] if key in OLD[:2] else [""]))
            found = tuple(key for key in self.new if key in store)
            if found != self.new[: len(found)]:
                raise AssertionError(f"{found} are there without those before")
            for key in found:
                expect(store, key, "")
            store.clean(older_than=-1)
            if len(list(root.glob("[0-9a-f][0-9a-f]/*"))) != len(store):
                raise AssertionError("files without an entry are left")


class Delete(Put):
    """Deletes entries."""

    def work(self, root):
        with MemoryStore(root, make_origin()) as store:
            for key in OLD[:2]:
                store.delete(key)

    def check(self, root):
        with MemoryStore(root, make_origin(), create=False) as store:
            for key in store:
                expect(store, key, "")
            if not set(OLD[2:]) <= set(store):
                raise AssertionError("an entry is gone that nobody deleted")


class Clean(Put):
    """Deletes waste beside entries."""

    def prepare(self, root):
        super().prepare(root)
        for path in list(root.glob("[0-9a-f][0-9a-f]/*")):
            path.with_name(f"{path.name[:33]}{'0' * 16}.safetensors").write_bytes(b"x")
            path.with_name(f".{path.name}.{'0' * 32}").write_bytes(b"x")

    def work(self, root):
        with MemoryStore(root, make_origin()) as store:
            store.clean(older_than=-1)


class Rebuild(Put):
    """Rebuilds an intact index whose rows are in its log alone."""

    def prepare(self, root):
        child = os.fork()
        if child == 0:
            put_all(MemoryStore(root, make_origin()), OLD)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)

    def work(self, root):
        MemoryStore.rebuild(root)

    def check(self, root):
        try:
            super().check(root)
        except errors.StoreError as error:
            if "MemoryStore.rebuild" not in str(error):
                raise
        if MemoryStore.rebuild(root):
            raise AssertionError("entries cannot be read")
        super().check(root)


class RebuildDamaged(Rebuild):
    """Rebuilds a damaged index."""

    def prepare(self, root):
        super().prepare(root)
        index = root / "index.sqlite"
        index.write_bytes(b"\xff" * 200 + index.read_bytes()[200:])


def tiny_icae():
    """Return an ICAE with random weights and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, max_position_embeddings=256, **sizes))
    words = ["<pad>", "<bos>", "</s>", *(f"w{i}" for i in range(3, 96))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="</s>"
    )
    return ICAE.from_base(base.eval(), ICAEConfig(memory_size=4, compression_rate=4, lora_rank=2), tokenizer).eval()


class Compress:
    """`MemoryStore.compress` of six texts, a batch each."""

    texts = tuple(" ".join(f"w{3 + (i * j) % 90}" for j in range(1, 25)) for i in range(1, 7))

    def __init__(self):
        self.icae = tiny_icae()
        self.memories = [memory.slots for memory in self.icae.compress(list(self.texts))]

    def prepare(self, root):
        MemoryStore(root, self.icae).close()

    def work(self, root):
        with MemoryStore(root, self.icae) as store:
            store.compress(list(self.texts), token_budget=40)

    def check(self, root):
        with MemoryStore(root, self.icae, create=False) as store:
            found = [i for i, text in enumerate(self.texts) if store.key_of(text) in store]
            if found != list(range(len(found))) or len(store) != len(found):
                raise AssertionError(f"texts {found} are there without those before")
            for i in found:
                if not torch.equal(store.get(store.key_of(self.texts[i])).slots, self.memories[i]):
                    raise AssertionError(f"text {i} has other slots")


class CommandIntoStore(Compress):
    """`icae-fast compress *.txt --store`."""

    options = ("--store",)

    def prepare(self, root):
        root.mkdir()
        for i, text in enumerate(self.texts):
            (root / f"{i}.txt").write_text(text)
        Compress.prepare(self, root / "store")

    def work(self, root):
        from icae_fast.cli import app
        from icae_fast.cli.commands import compress
        from icae_fast.core import compress as core_compress

        compress.load = lambda *_: self.icae
        core_compress.token_budget_on = lambda device, budget: budget or 40
        arguments = ["compress", *(str(root / f"{i}.txt") for i in range(len(self.texts)))]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(SystemExit):
            app.main([*arguments, *([*self.options, str(root / "store")] if self.options else [])])

    def check(self, root):
        super().check(root / "store")


class CommandIntoFiles(CommandIntoStore):
    """`icae-fast compress *.txt`, over memory files of before."""

    options = ()

    def check(self, root):
        found = sorted(int(path.name.partition(".")[0]) for path in root.glob("*.txt.icae"))
        if found != list(range(len(found))):
            raise AssertionError(f"files {found} are there without those before")
        for i in found:
            if not torch.equal(read_memory_header(root / f"{i}.txt.icae")[0].slots, self.memories[i]):
                raise AssertionError(f"file {i} has other slots")


WRITERS = {
    "put": Put, "delete": Delete, "clean": Clean, "rebuild": Rebuild, "rebuild-damaged": RebuildDamaged,
    "compress": Compress, "command-store": CommandIntoStore, "command-files": CommandIntoFiles,
}  # fmt: skip


def killed_after(work, seconds):
    """Run `work()` in a forked process that is killed after some seconds; return whether it was still at work."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill(name, kills, folder):
    """Return the counts of so many kills of a writer."""
    writer, root = WRITERS[name](), folder / "work"
    original = folder / "original"
    writer.prepare(original)

    def fresh():
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original, root)

    fresh()
    writer.work(root)  # loads what is loaded on first use, which is no part of the measured time
    fresh()
    start = time.perf_counter()
    writer.work(root)
    seconds = time.perf_counter() - start
    fresh()
    lines = count_lines(lambda: writer.work(root), MODULES)
    chance, done = random.Random(0), {"writer": name, "kills": 0, "finished": 0, "lines": lines, "failures": []}
    while done["kills"] < kills and done["finished"] < 3 * kills:
        fresh()
        n = done["kills"] + done["finished"]
        if n % 2:
            hit, where = killed_after(lambda: writer.work(root), chance.uniform(0, 1.2 * seconds)), "a moment"
        else:
            at = 1 + (n // 2) * 2 * lines // kills % lines
            hit, where = killed(lambda: writer.work(root), MODULES, at), f"line {at}"
        done["kills" if hit else "finished"] += 1
        try:
            writer.check(root)
        except Exception as error:
            done["failures"].append(f"at {where}: {type(error).__name__}: {error}")
    return done


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
