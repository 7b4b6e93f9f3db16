"""Two checkouts timed in turns, with stubs in place of the package. No test asserts a time."""

import re
import subprocess
import sys

import pytest
import torch

from bench.rivals import checkout

# What `timed_calls` uses of the public API. `{scale}` multiplies the slots; `{log}` collects the calls of both sides.
PACKAGE = """
import types
import torch


class Memory:
    n_slots = 4

    def __init__(self, ids):
        self.slots = {scale} * ids[:4, None].float()


class ICAE:
    vocabulary = types.SimpleNamespace(first_memory=7, ae=6)

    @classmethod
    def from_pretrained(cls, name):
        return cls()

    def log(self, name):
        with open({log!r}, "a") as file:
            file.write(f"{side} {{name}}\\n")

    def compress(self, contexts):
        self.log("compress")
        return [Memory(ids) for ids in ([contexts] if torch.is_tensor(contexts) else contexts)]

    def generate(self, memory, prompts, return_ids, max_new_tokens, min_new_tokens):
        self.log(f"generate {{max_new_tokens}}")
        return [list(range(max_new_tokens))]

    def parameters(self):
        return []

    def train(self):
        pass

    def eval(self):
        pass

    def token_losses(self, contexts, prompts, labels):
        self.log("train")
        return types.SimpleNamespace(losses=torch.ones(3, requires_grad=True))
"""


@pytest.fixture
def make_checkout(tmp_path):
    """`make_checkout(side, scale=1)` returns a repository with the stub in `icae_fast/`; calls go to `tmp_path/log`."""

    def make(side, scale=1):
        package = tmp_path / side / "icae_fast"
        package.mkdir(parents=True)
        text = PACKAGE.format(side=side, scale=scale, log=str(tmp_path / "log"))
        (package / "__init__.py").write_text(text)
        git = ["git", "-C", str(tmp_path / side), "-c", "user.name=a", "-c", "user.email=a@b.c"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", side]):
            subprocess.run([*git, *command], check=True)
        return tmp_path / side

    return make


def test_both_run_every_call_in_turns_that_change_places(make_checkout, tmp_path):
    commits, rows = checkout.measure(make_checkout("new"), make_checkout("old"), rounds=2)
    assert [row["name"] for row in rows] == list(checkout.CALLS)
    assert all(row["ratio"].keys() >= {"median", "min", "max", "of_minima"} for row in rows)
    assert all(row["noise"].keys() == {"median", "min", "max"} for row in rows)
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits.values())
    assert commits["this"] != commits["other"]
    what = ("compress", "generate 1", "generate 64", "train")
    loaded = ["new compress", "old compress"]  # the memory that is asked
    rounds = [[f"{side} {call}" for call in what for side in sides] for sides in (("new", "old"), ("old", "new"))]
    assert (tmp_path / "log").read_text().splitlines() == [*loaded, *rounds[0], *rounds[1], *rounds[0]]


def test_nothing_is_timed_when_the_results_differ(make_checkout, tmp_path):
    with pytest.raises(AssertionError, match=r"compress differ by .* of their RMS"):
        checkout.measure(make_checkout("new", scale=1.1), make_checkout("old"), rounds=2)
    assert len((tmp_path / "log").read_text().splitlines()) == 4


def test_answers_may_differ_in_tokens_but_not_in_their_number():
    checkout.check("decode", torch.tensor([[1, 2]]), torch.tensor([[1, 3]]))
    with pytest.raises(AssertionError, match="decode: shapes"):
        checkout.check("decode", torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]]))


def test_a_folder_without_the_package_is_refused(tmp_path, make_checkout, monkeypatch):
    stub = make_checkout("installed")
    (tmp_path / "empty").mkdir()
    # The process imports the stub from its working folder's neighbour, as it would an installed package.
    real = subprocess.Popen
    environment = {"PYTHONPATH": f"{tmp_path / 'empty'}:{stub}"}
    monkeypatch.setattr(
        checkout.subprocess, "Popen", lambda *a, env, **rest: real(*a, env={**env, **environment}, **rest)
    )
    with pytest.raises(SystemExit, match=r"empty was to be measured, but .*installed.* was imported"):
        checkout.Checkout(tmp_path / "empty", threads=1)


def test_a_process_that_ends_is_one_sentence(make_checkout, capfd):
    broken = make_checkout("broken")
    (broken / "icae_fast" / "__init__.py").write_text("raise ImportError('no extension')")
    with pytest.raises(SystemExit, match=r"the process of .*broken ended; its error message is above"):
        checkout.Checkout(broken, threads=1)
    assert "no extension" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "name the folder"), (("no-such-folder",), "name the folder"), ((".", "--rounds", "1"), "at least 2")],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, words):
    done = subprocess.run(
        [sys.executable, "-m", "bench.rivals.checkout", *arguments], capture_output=True, text=True,
        cwd=checkout.Path(checkout.__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
