"""The command line: files in, files out, and one line for a mistake."""

import json
import subprocess
import sys

import pytest

from helpers.store import count_compressed
from icae_fast import ICAE, ICAEConfig, MemoryStore
from icae_fast.store.memory_file import load_memory


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("The keeper of the light was called Marta, and the lamp burned colza oil. " * 8)
    return path


@pytest.mark.usefixtures("smollm2_bf16")  # converts SmolLM2 first if necessary, which prints progress
def test_the_packages_adapter_is_the_default(run, text_file, tmp_path):
    code, out, err = run("compress", text_file, "--json")
    assert (code, err.strip()) == (0, "")
    assert json.loads(out)[0]["slots"] == 32 * len(json.loads(out)[0]["spans"])
    for command in (["restore"], ["restore", "--by-span"], ["ask", "Who kept the light?"]):
        code, out, err = run(command[0], tmp_path / "note.txt.icae", *command[1:], "--max-new-tokens", 4)
        assert (code, err.strip()) == (0, "")


@pytest.mark.usefixtures("smollm2_bf16")
def test_a_saved_adapter_takes_another_rate(run, text_file, tmp_path):
    """`restore` finds the adapter by its hash, at any rate."""
    code, out, _ = run("compress", text_file, "--adapter", "smollm2-135m", "--rate", 4, "--json")
    (memory,) = json.loads(out)
    assert code == 0
    assert memory["slots"] == 32 * len(memory["spans"])
    assert 64 < max(memory["spans"]) <= 128
    code, _, err = run("restore", tmp_path / "note.txt.icae", "--max-new-tokens", 4)
    assert (code, err.strip()) == (0, "")
    code, _, err = run("compress", text_file, "--adapter", "smollm2-135m", "--memory-size", 16)
    assert code == 2
    assert "--memory-size is for untrained adapters" in err


@pytest.mark.usefixtures("smollm2_bf16")
def test_a_text_beyond_the_adapters_training_is_told_in_a_line(run, text_file, tmp_path):
    text_file.write_text("The keeper of the light was called Marta, and the lamp burned colza oil. " * 24)
    line = "icae-fast: warning: a memory has {} spans, and the adapter was trained with at most 4: what is read from it"
    code, out, err = run("compress", text_file, "--json")
    n = len(json.loads(out)[0]["spans"])
    assert (code, n > 4) == (0, True)
    for command in ((), ("ask", tmp_path / "note.txt.icae", "Who?", "--max-new-tokens", 4)):
        code, _, err = run(*command) if command else (code, out, err)
        assert code == 0
        assert err.startswith(line.format(n))
        assert err.strip().endswith("; compress the text in parts, or restore it with --by-span")
        assert len(err.strip().splitlines()) == 1


def test_compress_restore_ask(run, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("A second, shorter text.")
    code, out, err = run("compress", text_file, other, "--memory-size", 16, "--json")
    assert code == 0
    assert "untrained" in err
    rows = json.loads(out)
    assert [len(r["spans"]) for r in rows] == [3, 1]
    assert rows[0]["slots"] == 48
    assert rows[0]["bytes"] == 48 * 576 * 2
    memory = tmp_path / "note.txt.icae"
    assert memory.is_file()

    code, out, _ = run("restore", memory, "--max-new-tokens", 4, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == rows[0]["tokens"]
    code, out, _ = run("restore", memory, "--max-new-tokens", 4)
    assert code == 0

    code, out, _ = run("ask", memory, "Who kept the light?", "What burned?", "--max-new-tokens", 4, "--json")
    assert code == 0
    assert [a["prompt"] for a in json.loads(out)["answers"]] == ["Who kept the light?", "What burned?"]
    code, out, _ = run("ask", memory, "Who kept the light?", "What burned?", "--max-new-tokens", 4)
    assert out.startswith("> Who kept the light?\n")

    sampled = ("ask", memory, "Who kept the light?", "--max-new-tokens", 8, "--temperature", 1.5, "--seed", 3)
    code, out, _ = run(*sampled, "--json")
    answer = json.loads(out)["answers"][0]
    assert answer["finish_reason"] == "length"
    assert run(*sampled)[:2] == (0, answer["answer"] + "\n")
    stop = answer["answer"][3]
    cut = answer["answer"].partition(stop)[0]
    assert run(*sampled, "--stop", stop)[:2] == (0, cut + "\n")
    code, _, err = run(*sampled, "--top-p", 2)
    assert (code, "--top-p is 2" in err) == (2, True)


def test_compress_into_a_folder_as_a_table(run, text_file, tmp_path):
    folder = tmp_path / "memories"
    folder.mkdir()
    code, out, _ = run("compress", text_file, "-o", folder, "--memory-size", 16)
    assert code == 0
    assert "tokens" in out
    assert (folder / "note.txt.icae").is_file()


def test_a_store_is_compressed_into_listed_and_asked(run, text_file, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("A second, shorter text.")
    store = tmp_path / "store"
    code, out, _ = run("compress", text_file, "--store", store, "--memory-size", 16, "--json")
    assert code == 0
    (first,) = json.loads(out)
    calls = count_compressed(monkeypatch)
    code, out, _ = run("compress", text_file, other, "--store", store, "--kv", "--memory-size", 16, "--json")
    assert calls == [1]
    rows = json.loads(out)
    assert rows[0] == first
    with MemoryStore(store) as opened:
        assert all(opened.get_kv(row["memory"]).keys.shape[1] == row["slots"] for row in rows)
    assert not list(tmp_path.glob("*.icae"))
    code, out, _ = run("list", store, "--json")
    assert code == 0
    assert [row.pop("file") for row in rows] == [str(text_file), str(other)]
    assert json.loads(out) == sorted(rows, key=lambda row: row["memory"])
    code, out, _ = run("list", store)
    assert all(row["memory"] in out for row in rows)
    code, out, _ = run("ask", first["memory"], "Who?", "--store", store, "--max-new-tokens", 2, "--json")
    assert code == 0
    assert json.loads(out)["answers"][0]["prompt"] == "Who?"
    code, out, _ = run("restore", first["memory"], "--store", store, "--max-new-tokens", 2, "--json")
    assert json.loads(out)["tokens"] == first["tokens"]
    code, _, err = run("ask", "absent", "Who?", "--store", store)
    assert code == 2
    assert "no entry 'absent'" in err


def test_a_saved_adapter_is_used(run, text_file, tmp_path, smollm2):
    model, tokenizer = smollm2
    icae = ICAE.from_base(model, ICAEConfig(memory_size=8, lora_rank=4), tokenizer)
    icae.save_pretrained(tmp_path / "adapter")
    code, _, err = run("compress", text_file, "--adapter", tmp_path / "adapter", "--dtype", "float32")
    assert code == 0
    assert "untrained" not in err
    memory = load_memory(tmp_path / "note.txt.icae", icae)
    assert memory.memory_size == 8
    code, _, err = run("restore", tmp_path / "note.txt.icae")
    assert code == 2
    assert "made with another adapter" in err


def test_info(run):
    code, out, _ = run("info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["ops"]["varlen_attention"]["cpu"] in ("cpp", "reference")
    assert facts["versions"]["torch"]
    code, out, _ = run("info")
    assert code == 0
    assert "varlen_attention" in out
    cpu = facts["cpu"]
    if facts["extension"] != "loaded":
        assert cpu["isa"] is cpu["runnable_isas"] is None
        return
    assert cpu["isa"] in cpu["runnable_isas"]
    assert set(cpu["runnable_isas"]) <= set(cpu["build"]["isas"])
    rows = dict(line.split("\t")[:2] for line in out.splitlines())
    assert rows["instruction set"] == cpu["isa"]
    assert rows["sets in this build"] == ", ".join(cpu["build"]["isas"])
    assert rows["sets this CPU runs"] == ", ".join(cpu["runnable_isas"])


def test_bench_latency(run, text_file, tmp_path):
    target = tmp_path / "latency.json"
    code, out, _ = run("bench", "latency", text_file, "--memory-size", 16, "--new-tokens", 2, "--rounds", 1, "--json",
                       "-o", target)  # fmt: skip
    assert code == 0
    assert json.loads(out) == json.loads(target.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "missing.txt"], "there is no file missing.txt"),
        (["compress"], "Missing argument"),
        (["compress", "--frobnicate", "x"], "No such option"),
        (["restore", "damaged.icae"], "not a safetensors file"),
        (["compress", "note.txt", "-o", "nowhere"], "create it first"),
        (["compress", "note.txt", "note.txt"], "different names"),
        (["compress", "note.txt", "-o", ".", "--store", "store"], "two places"),
        (["compress", "note.txt", "--kv"], "give --store"),
        (["list", "nowhere"], "no memory store in nowhere"),
        (["ask", "key", "Who?", "--store", "nowhere"], "no memory store in nowhere"),
        (["compress", "note.txt", "--memory-size", "0"], "--memory-size is 0"),
        (["compress", "note.txt", "--dtype", "int4"], "bfloat16 or float32"),
        (["compress", "empty.txt"], "is empty"),
        (["compress", "binary.txt"], "as UTF-8 text"),
        (["compress", "note.txt", "--adapter", "no-such/adapter/at-all"], "neither a folder"),
        (["compress", "note.txt", "--model", "no/such/model"], "cannot be loaded"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, text_file, monkeypatch, arguments, message):
    monkeypatch.chdir(text_file.parent)
    (text_file.parent / "empty.txt").write_text("")
    (text_file.parent / "binary.txt").write_bytes(b"\xff\xfe\x00\x9f")
    (text_file.parent / "damaged.icae").write_bytes(b"\xff\xfe\x00\x9f")
    code, out, err = run(*arguments)
    assert code == 2
    assert not out
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err
    assert [p.name for p in text_file.parent.glob("*.icae")] == ["damaged.icae"]


def test_without_arguments_it_shows_help():
    result = subprocess.run([sys.executable, "-m", "icae_fast.cli.app"], capture_output=True, text=True, check=True)
    assert "compress" in result.stdout
