"""`bench.gpu.check` on a CPU at small sizes: every part runs, failures are recorded, results and report are written."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("peft", reason="the baseline needs peft")

from bench.gpu import check as gpu_check
from bench.gpu import parts as gpu_parts
from bench.gpu.report import report
from bench.gpu.setting import Setting
from icae_fast.benchmark import machine


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch):
    monkeypatch.setattr(machine, "GEMM_SIZE", {"cpu": 32})
    monkeypatch.setattr(machine, "READ_BYTES", {"cpu": 4096})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_3():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.check"], cwd=machine.REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "torch finds no GPU" in done.stderr


# The golden cases run by themselves, and the ops' samples in tests/ops/test_ops.py.
PARTS = [
    "ops at real", "encode", "answer", "latency", "train", "attention", "tuned",
    "torch.compile",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_each_part_runs_at_small_sizes(part, tmp_path):
    assert gpu_check.main(["--device", "cpu", "--small", "--only", part, "--output", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("gpu-check-")
    result = json.loads((folder / "results.json").read_text())
    assert result["parts"]
    assert all(part["ok"] for part in result["parts"].values())
    assert "All parts passed." in (folder / "report.md").read_text()


def test_processes_find_what_one_finds():
    settings = [Setting("cpu", small=True, jobs=jobs) for jobs in (1, 2)]
    one, two = (gpu_parts.ops_at_real_sizes(setting) for setting in settings)
    assert one == two
    assert {row["op"] for row in one["rows"]} == {"rms_norm"}


def test_a_part_that_raises_is_written_down_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(setting):
        raise RuntimeError("out of luck")

    wrong = {"rows": [{"op": "linear", "failed": 1}], "failures": ["fp16: linear is off"]}
    parts = [("first", broken), ("second", lambda s: wrong), ("third", lambda s: {"rows": [{"seconds": 1.23456}]})]
    monkeypatch.setattr(gpu_check, "parts", lambda setting: iter(parts))
    assert not gpu_check.check(Setting("cpu", small=True), tmp_path)
    result = json.loads((tmp_path / "results.json").read_text())
    assert [part["ok"] for part in result["parts"].values()] == [False, False, True]
    text = (tmp_path / "report.md").read_text()
    assert text == report(result)
    for words in (
        "**2 of 3 parts failed: first, second.**",
        "RuntimeError: out of luck",
        "fp16: linear is off",
        "1.235",
    ):
        assert words in text


def test_a_provider_that_fails_does_not_stop_the_others():
    from bench.gpu.timings import compare

    def too_large():
        raise torch.OutOfMemoryError("too large")

    def wrong():
        raise ValueError("no such kernel")

    calls = {"baseline": lambda: 1.0, "other": too_large, "icae_fast": too_large, "icae_fast, merged": wrong}
    result = compare(calls, Setting("cpu", small=True))
    assert [row["name"] for row in result["rows"]] == ["baseline"]
    assert result["failures"] == [
        "icae_fast: OutOfMemoryError: too large", "icae_fast, merged: ValueError: no such kernel",
    ]  # fmt: skip
    assert result["notes"] == ["other: OutOfMemoryError: too large"]
    assert "in wrong" in result["tracebacks"]["icae_fast, merged"]
