"""`icae-fast make-pwc` on the command line: with a server, with a local model, killed, interrupted, and misused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch

from helpers.chat import PARAGRAPHS, ChatServer

LIMITS = ("--max-tokens", 30, "--min-tokens", 5)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(PARAGRAPHS))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_rows(rows):
    assert rows
    for row in rows:
        assert all(isinstance(row[field], str) and row[field].strip() for field in ("input", "prompt", "answer"))
    assert len({row["id"] for row in rows}) == len(rows)


def test_an_endpoint_fills_a_file_and_failures_are_exit_code_1(run, text_file, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    (tmp_path / "more.jsonl").write_text('{"text": "broken\n')
    monkeypatch.setenv("SOME_KEY", "secret")
    with ChatServer([429, b"nonsense"]) as server:
        arguments = ("make-pwc", tmp_path, "-o", out, "--endpoint", server.url, "--model", "m", *LIMITS)
        options = ("--questions", 3, "--at-once", "--api-key-env", "SOME_KEY", "--jobs", 2, "--temperature", 0.5)
        code, stdout, err = run(*arguments, *options, "--json")
        assert code == 1
        assert f"{tmp_path / 'more.jsonl'}:1: not JSON" in err
        report = json.loads(stdout)
        assert report["failed"] == {"bad row": 1}
        assert report["retried"] == {"rate limit": 1, "unusable reply": 1}
        assert sum(report["written"].values()) == 45
        assert all(headers["Authorization"] == "Bearer secret" for _, _, headers, _ in server.requests)
        assert all(body["temperature"] == 0.5 for *_, body in server.requests)
        (tmp_path / "more.jsonl").unlink()
        n_requests = len(server.requests)
        code, stdout, err = run(*arguments, *options)
        assert (code, err.strip(), len(server.requests)) == (0, "", n_requests)
        assert "there already" in stdout
    check_rows(read(out))
    assert "secret" not in out.read_text()
    loaded = datasets.Dataset.from_json(str(out), cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 45
    assert all(loaded.features[name] == datasets.Value("string") for name in ("input", "prompt", "answer"))


def start(text_file, out, server):
    command = [
        sys.executable,
        "-m",
        "icae_fast.cli.app",
        "make-pwc",
        str(text_file),
        "-o",
        str(out),
        "--endpoint",
        server.url,
    ]
    command += ["--model", "m", *map(str, LIMITS), "--questions", "3"]
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
        # If a shell runs the tests in the background, they and their children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 8):
        time.sleep(0.01)
    return process


def test_an_interrupted_and_a_killed_run_are_taken_up(run, text_file, tmp_path):
    out = tmp_path / "out.jsonl"
    with ChatServer(delay=0.2) as server:
        process = start(text_file, out, server)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "again to go on" in err
        assert "Traceback" not in err
        interrupted = read(out)
        check_rows(interrupted)
        assert len(interrupted) < 45

        out.unlink()
        process = start(text_file, out, server)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        whole = out.read_bytes()
        assert whole.endswith(b"\n")
        out.write_bytes(whole[:-9])
        server.delay = 0.0
        code, stdout, err = run("make-pwc", text_file, "-o", out, "--endpoint", server.url, "--model", "m", *LIMITS,
                                "--questions", 3, "--json")  # fmt: skip
    assert code == 0
    assert "half-written" in err
    kept = whole.count(b"\n") - 1
    report = json.loads(stdout)
    assert (report["resumed"], sum(report["written"].values())) == (kept, 45 - kept)
    assert out.read_bytes().startswith(whole[: whole[:-1].rindex(b"\n") + 1])
    check_rows(read(out))
    assert len(read(out)) == 45


def test_a_refusal_is_exit_code_2_and_leaves_nothing(run, text_file, tmp_path):
    with ChatServer([401] * 9) as server:
        options = ("--endpoint", server.url, "--model", "m", "--kinds", "title", *LIMITS)
        code, stdout, err = run("make-pwc", text_file, "-o", tmp_path / "out.jsonl", *options)
    assert (code, stdout) == (2, "")
    assert "refuses the key" in err.splitlines()[-1]
    assert not (tmp_path / "out.jsonl").exists()


@pytest.fixture
def local_model(tmp_path, make_base, byte_tokenizer, one_thread):
    """Return a folder with a random model that ends its answers soon, since a quarter of its tokens are EOS."""
    model = make_base(vocab_size=320, max_position_embeddings=2048)
    model.generation_config.eos_token_id = list(range(2, 320, 4))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_local_model_answers(run, text_file, tmp_path, local_model):
    out = tmp_path / "out.jsonl"
    torch.manual_seed(0)
    options = ("--dtype", "float32", "--temperature", 1, "--max-answer-tokens", 48, "--batch-size", 4, "--questions", 2)
    arguments = ("make-pwc", text_file, "-o", out, "--local", local_model, *options, "--max-tokens", 200, "--json")
    code, stdout, _ = run(*arguments)
    report = json.loads(stdout)
    assert code == (1 if report["failed"] else 0)
    assert set(report["failed"]) <= {"answer cut off", "unusable reply", "too few questions"}
    rows = read(out)
    check_rows(rows)
    by_model = [row for row in rows if row["teacher"] == str(local_model)]
    assert len(by_model) >= 5  # noise, of which a part is empty or has no end
    passages = len({row["input"] for row in rows})
    assert report["written"]["restate"] == passages
    assert sum(report["written"].values()) + sum(report["failed"].values()) == passages * 8
    code, stdout, _ = run(*arguments)
    assert json.loads(stdout)["resumed"] == len(rows)
    assert read(out)[: len(rows)] == rows


def test_a_message_that_does_not_fit_is_a_failure(run, text_file, tmp_path, local_model):
    options = ("--local", local_model, "--kinds", "title", "--questions", 0, "--max-answer-tokens", 2000)
    code, stdout, err = run("make-pwc", text_file, "-o", tmp_path / "out.jsonl", *options, "--json")
    assert code == 1
    assert set(json.loads(stdout)["failed"]) == {"message too long"}
    assert "do not fit the model's 2048 positions" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text.txt"], "Missing option"),
        (["text.txt", "-o", "out.jsonl"], "need a teacher"),
        (["text.txt", "-o", "out.jsonl", "--endpoint", "http://localhost/v1"], "needs --model"),
        (["text.txt", "-o", "out.jsonl", "--model", "m"], "give --endpoint"),
        (["text.txt", "-o", "out.jsonl", "--local", "x", "--endpoint", "http://localhost/v1"], "two teachers"),
        (["text.txt", "-o", "out.jsonl", "--local", "no/such/model"], "cannot be loaded"),
        (["text.txt", "-o", "out.jsonl", "--local", "smollm2", "--dtype", "int4"], "bfloat16 or float32"),
        (["text.txt", "-o", "nowhere/out.jsonl", "--local", "smollm2"], "create it first"),
        (["text.txt", "-o", "text.txt", "--local", "smollm2"], "text.txt:1 is not a record"),
        (["absent.txt", "-o", "out.jsonl", "--kinds", "restate", "--questions", "0"], "there is no"),
        (["empty.txt", "-o", "out.jsonl", "--kinds", "restate", "--questions", "0"], "no passage"),
        (["text.txt", "-o", "out.jsonl", "--kinds", "poem"], "no kind of prompt 'poem'"),
        (["text.txt", "-o", "out.jsonl", "--kinds", "", "--questions", "0"], "nothing is asked"),
        (["text.txt", "-o", "out.jsonl", "--max-tokens", "9"], "cannot be cut"),
        (["text.txt", "-o", "out.jsonl", "--tokenizer", "no/such/model", "--local", "x"], "cannot be loaded"),
        (["text.txt", "-o", "out.jsonl", "--endpoint", "localhost", "--model", "m"], "no http or https URL"),
        (["text.txt", "-o", "out.jsonl", "--endpoint", "http://localhost", "--model", "m", "--body", "[]"],
         "--body is"),
        (["text.txt", "-o", "out.jsonl", "--endpoint", "http://localhost", "--model", "m", "--api-key-env", "NO_KEY"],
         "NO_KEY of the API key is not set"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(run, text_file, monkeypatch, arguments, message):
    monkeypatch.chdir(text_file.parent)
    (text_file.parent / "empty.txt").write_text("")
    before = text_file.read_bytes()
    code, out, err = run("make-pwc", *arguments)
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(text_file.parent.glob("*.jsonl"))
    assert text_file.read_bytes() == before
