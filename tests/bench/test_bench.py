"""The benchmark harness checks results, interleaves rounds, counts work and writes files. No test asserts a time."""

import json
import math
import types

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("pytest_benchmark", reason="the harness needs pytest-benchmark")
pytest.importorskip("peft", reason="the baseline needs peft")

from bench.harness import compare as harness
from bench.harness import shapes
from icae_fast.benchmark import checks, latency, machine, measure
from icae_fast.benchmark.baseline import BaselineICAE

pytest_plugins = ["pytester"]

ROW_KEYS = {"name", "rounds", "seconds", "speedup_over", "rates", "bound", "peak_bytes", "backends"}
MACHINE_KEYS = {"device", "cpu", "isa", "threads", "versions", "commit", "dirty"}


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch):
    """Measure the bounds at tiny sizes."""
    monkeypatch.setattr(machine, "GEMM_SIZE", {"cpu": 32})
    monkeypatch.setattr(machine, "READ_BYTES", {"cpu": 4096})


def test_pair_ratios_are_those_of_the_pairs():
    times, reference = [1.0, 2.0, 4.0], [2.0, 2.0, 12.0]
    assert measure.pair_ratios(times, reference) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert measure.speedup(times, reference) == {"median": 2.0, "min": 1.0, "max": 3.0, "of_minima": 2.0}


def test_rounds_alternate():
    log = []
    calls = {name: lambda name=name: log.append(name) or len(log) for name in "abc"}
    assert measure.interleave(calls, 2) == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}
    assert log == list("abcabc")


@pytest.mark.parametrize("method", ["kernel", "sampled"])
def test_peak_memory_sees_what_is_freed_again(method, monkeypatch, tmp_path):
    if method == "sampled":
        monkeypatch.setattr(measure, "_CLEAR_REFS", tmp_path / "no" / "such")

    def call():
        block = torch.ones(16 * 2**20)  # 64 MiB
        return float((block * 2).sum())  # and 64 more for a moment

    result, peak = measure.peak_memory(call)
    assert result == 2.0 * 16 * 2**20
    assert 100 * 2**20 < peak < 300 * 2**20


def test_first_token_notes_the_first_after_the_prompt():
    clock = measure.FirstToken(skip=1)
    clock.put(torch.tensor([[1, 2]]))
    assert clock.at is None
    clock.put(torch.tensor([3]))
    first = clock.at
    clock.put(torch.tensor([4]))
    clock.end()
    assert first is not None
    assert clock.at == first


def test_work_rates():
    bounds = types.SimpleNamespace(rates={"gemm_bf16": 8e9, "read": 4e9})
    work = harness.Work("gemm_bf16", flops=4 * 10**9, tokens=10)
    assert work.rates(2.0, bounds) == {"tokens_per_s": 5.0, "gflops": 2.0, "fraction_of_bound": 0.25}
    read = harness.Work("read", bytes=10**9)
    assert read.rates(0.5, bounds) == {"gbs": 2.0, "fraction_of_bound": 0.5}
    times = {"icae_fast": [2.0], "half": [2.0]}
    half = harness.Work("gemm_bf16", flops=2 * 10**9)
    rates = harness.Outcome("toy", {}, times, {}, work, {}, {"half": half}).row(bounds)["rates"]
    assert (rates["icae_fast"]["gflops"], rates["half"]["gflops"]) == (2.0, 1.0)
    assert measure.rounded({"a": [0.123456, 7], "b": "x"}) == {"a": [0.1235, 7], "b": "x"}


def test_bounds_keep_the_best():
    bounds = machine.Bounds().probe()
    assert set(bounds.rates) == {"gemm_bf16", "gemm_fp32", "read"}
    assert all(rate > 0 for rate in bounds.rates.values())
    bounds.rates = dict.fromkeys(bounds.rates, 1e30)
    bounds.probe()
    assert set(bounds.rates.values()) == {1e30}
    assert set(bounds.as_dict()["gemm_gflops"]) == {"bf16", "fp32"}


def test_machine_is_described_without_paths(monkeypatch, tmp_path):
    described = machine.describe_machine()
    assert described.keys() >= MACHINE_KEYS | {"cores", "ram_gb", "date", "cpu_features"}
    assert described["versions"]["torch"] == torch.__version__
    assert str(machine.REPOSITORY) not in json.dumps(described)
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    assert machine.describe_machine()["commit"] is None
    facts = {"device": "cpu", "cpu": "AMD EPYC 9R14", "cores": 2, "isa": "avx512", "cpu_features": ["avx512_bf16"]}
    assert machine.machine_slug(facts) == "amd-epyc-9r14-2-cores-avx512"
    assert machine.machine_slug(facts | {"device": "NVIDIA H100"}) == "nvidia-h100"


def test_decode_weights_are_the_model_s(make_base):
    model = make_base()
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n]
    assert shapes.ModelShape.of(model).decode_weights() == sum(p.numel() for p in matrices)


def test_encode_flops_are_those_of_the_products(make_icae, random_ids):
    icae = make_icae()
    shape, k, r = shapes.ModelShape.of(icae.base_model), icae.config.memory_size, icae.config.lora_rank
    baseline = BaselineICAE.from_icae(icae)
    with FlopCounterMode(display=False) as counter:
        baseline.compress(random_ids(13))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    products += counter.get_flop_counts()["Global"].get(torch.ops.aten.addmm, 0)
    t, q = 13 + k, shape.q_heads * shape.head_dim
    head = 2 * t * shape.hidden_size * (shape.vocabulary + 1 + k + 3)
    # The last layer skips the context's queries with their LoRA, output projection and MLP.
    spared = 2 * 13 * (2 * q * shape.hidden_size + r * (shape.hidden_size + q) + 3 * shape.hidden_size * shape.mlp)
    attention = (shape.layers - 1) * shapes.attention_flops(shape, [(t, t)]) + shapes.attention_flops(shape, [(k, t)])
    assert shapes.encode_flops(shape, [13], k, r) == products - head - spared + attention
    pairs = sum(j <= i + 3 for i in range(4) for j in range(7))
    assert shapes.attention_flops(shape, [(4, 7)]) == 4 * pairs * q


def test_spans_of_a_case_follow_the_reference_s_rule():
    assert shapes.Case("tiny", "fp32", 2, 37, memory_size=4).span_lengths == [13, 13, 11] * 2


def test_checks_reject_what_is_wrong(make_icae, random_ids):
    a = torch.randn(50, generator=torch.Generator().manual_seed(0))
    checks.assert_same(a * (1 + 1e-6), a, torch.float32, "values")
    with pytest.raises(AssertionError, match=r"values differ by 1\.00e-02"):
        checks.assert_same(a * 1.01, a, torch.float32, "values")
    with pytest.raises(AssertionError, match="shapes"):
        checks.assert_same(a[:1], a, torch.float32, "values")
    icae = make_icae()
    baseline, memory = BaselineICAE.from_icae(icae), icae.compress([random_ids(9)])[0]
    prefix, suffix = icae.prompt_ids([5, 6])
    answer = icae.generate(memory, [[5, 6]], max_new_tokens=5, min_new_tokens=5, return_ids=True)[0]
    sides = (baseline, memory.slots, prefix, suffix)
    checks.assert_greedy(*sides, answer, icae.eos_token_ids, torch.float32)
    wrong = [*answer[:2], (answer[2] + 1) % 96, *answer[3:]]
    with pytest.raises(AssertionError, match="below the best"):
        checks.assert_greedy(*sides, wrong, icae.eos_token_ids, torch.float32)


BENCHMARK = """
from bench.harness.compare import Work

LOG = []

def test_toy(compare, case):
    LOG.clear()

    def provider(name):
        return lambda: LOG.append(name) or {value}

    def check(results):
        LOG.append("check")
        assert results["icae_fast"] == results["torch"] == 7

    compare({{name: provider(name) for name in ("torch", "icae_fast")}}, check,
            Work("gemm_fp32", flops=100, tokens=5), ops=("varlen_attention",), rounds={rounds}, mode="fwd")
    print("\\nLOG", *LOG)
"""


@pytest.fixture
def run_benchmark(pytester, monkeypatch):
    """Run a benchmark of two providers in a separate session; return (outcome, order of calls, results folder)."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under xdist, pytest-benchmark times nothing

    def run(*options, value=7, rounds=None):
        pytester.makeconftest("from bench.conftest import *")
        pytester.makepyfile(bench_toy=BENCHMARK.format(value=value, rounds=rounds))
        folder = pytester.path / "results"
        result = pytester.runpytest_inprocess("-s", "--workload", "small", f"--results={folder}", *options)
        lines = [line.split()[1:] for line in result.outlines if line.startswith("LOG")]
        return result, lines[0] if lines else None, folder

    return run


def test_a_benchmark_checks_interleaves_and_writes(run_benchmark, pytester):
    options = ("--benchmark-min-rounds=4", "--benchmark-max-time=0", "--benchmark-json=full.json")
    result, log, folder = run_benchmark(*options)
    n = len(shapes.WORKLOADS["small"])
    result.assert_outcomes(passed=n)
    pair = ["torch", "icae_fast"]
    assert log == [*pair, "check", *pair * (1 + 1 + 4)]  # checked, peak memory, warm-up, four rounds
    (path,) = folder.iterdir()
    assert path.name == f"toy-{machine.machine_slug(machine.describe_machine())}.json"
    written = json.loads(path.read_text())
    assert written.keys() == {"suite", "machine", "bounds", "rows"}
    assert len(written["rows"]) == n
    row = written["rows"][0]
    assert row.keys() == ROW_KEYS | {"mode"}
    assert row["rounds"] == 4
    assert row["seconds"].keys() == row["rates"].keys() == row["peak_bytes"].keys() == set(pair)
    assert row["speedup_over"].keys() == {"torch"}
    assert row["speedup_over"]["torch"].keys() == {"median", "min", "max", "of_minima"}
    assert row["rates"]["torch"].keys() == {"tokens_per_s", "gflops", "fraction_of_bound"}
    full = json.loads((pytester.path / "full.json").read_text())["benchmarks"][0]
    assert full["extra_info"].keys() >= ROW_KEYS | MACHINE_KEYS | {"mode", "bounds"}
    assert full["stats"]["rounds"] == 4


def test_few_rounds_of_long_calls(run_benchmark):
    options = ("--benchmark-min-rounds=4", "--benchmark-max-time=0")
    result, log, _ = run_benchmark(*options, rounds=2)
    result.assert_outcomes(passed=len(shapes.WORKLOADS["small"]))
    pair = ["torch", "icae_fast"]
    assert log == [*pair, "check", *pair * 2]  # the checked calls also measured the peak and were the warm-up


def test_a_suite_of_several_files_is_written_whole_or_not_at_all(run_benchmark, pytester):
    pytester.makepyfile(bench_toy_more=BENCHMARK.format(value=7, rounds=None))
    options = ("--benchmark-min-rounds=3", "--benchmark-max-time=0")
    result, _, folder = run_benchmark("bench_toy.py", *options)
    assert result.parseoutcomes()["passed"] == len(shapes.WORKLOADS["small"])
    assert not folder.exists()
    run_benchmark(*options)
    (path,) = folder.iterdir()
    assert len(json.loads(path.read_text())["rows"]) == 2 * len(shapes.WORKLOADS["small"])


def test_disabled_benchmarks_run_once_and_are_checked(run_benchmark):
    result, log, folder = run_benchmark("--benchmark-disable")
    result.assert_outcomes(passed=len(shapes.WORKLOADS["small"]))
    assert log == ["torch", "icae_fast", "check"]
    assert not folder.exists()


@pytest.mark.parametrize("options", [("--benchmark-min-rounds=3", "--benchmark-max-time=0"), ("--benchmark-disable",)])
def test_a_wrong_result_is_never_reported(run_benchmark, options):
    result, log, folder = run_benchmark(*options, value="len(LOG)")
    result.assert_outcomes(failed=len(shapes.WORKLOADS["small"]))
    assert log is None
    assert not folder.exists()


def test_a_partial_run_writes_nothing(run_benchmark):
    name = shapes.WORKLOADS["small"][0].name
    result, _, folder = run_benchmark("-k", name, "--benchmark-min-rounds=3", "--benchmark-max-time=0")
    assert result.parseoutcomes()["passed"] == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    "config",
    [{}, {"memory_positions": "spread", "slot_scale": "embedding_norm", "prompt_format": "v1", "sink_token": "bos"}],
    ids=["reference", "spread-scaled-bos-v1"],
)
def test_latency_table(make_icae, random_ids, config, monkeypatch):
    order = []
    calls = latency._Rows.calls

    def recorded(rows):
        return {name: lambda n=name, c=call: order.append(n) or c() for name, call in calls(rows).items()}

    monkeypatch.setattr(latency._Rows, "calls", recorded)
    icae = make_icae(**config)
    result = latency.latency_table(icae, random_ids(37), random_ids(3), new_tokens=4, rounds=2)
    names = [latency.RAW, latency.BASELINE, latency.COLD, latency.STORED]
    assert order == names * 3  # once for peak memory and the check, and two rounds
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result.keys() == {
        "machine", "bounds", "backends", "model", "dtype", "document_tokens", "prompt_tokens", "slots", "new_tokens",
        "rounds", "least_ms_per_token", "rows",
    }  # fmt: skip
    assert (result["document_tokens"], result["slots"], result["new_tokens"], result["rounds"]) == (37, 12, 4, 2)
    assert [row["name"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert (row["compress_s"] is None) == (row["name"] in (latency.RAW, latency.STORED))
        assert (row["compress_s"] or 0) < row["first_token_s"] < row["total_s"]
        assert row["per_token_ms"] > 0
        assert row["peak_mb"] >= 0
        ratio = row["speedup_over_baseline"]
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert result["rows"][1]["speedup_over_baseline"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(latency.render(result))
    text = console.export_text()
    assert all(name in text for name in names)
    assert "…" not in text


def test_latency_of_a_single_token(make_icae, random_ids):
    result = latency.latency_table(make_icae(), random_ids(5), random_ids(2), new_tokens=1, rounds=1)
    assert {row["per_token_ms"] for row in result["rows"]} == {None}
    latency.render(result)
    with pytest.raises(ValueError, match="rounds is 0"):
        latency.latency_table(make_icae(), random_ids(5), random_ids(2), rounds=0)


def test_latency_refuses_a_baseline_with_other_weights(make_icae, random_ids):
    other = BaselineICAE.from_icae(make_icae(seed=7))
    with pytest.raises(AssertionError, match="slots differ"):
        latency.latency_table(make_icae(), random_ids(5), random_ids(2), new_tokens=2, rounds=1, baseline=other)


def test_timing_per_token():
    timing = latency.Timing(0.5, 1.0, 2.0, [1, 2, 3, 4, 5], None)
    assert timing.per_token_ms() == 250.0
    assert latency._number(None) == "-"
    rows = {latency.BASELINE: [timing, timing], "x": [latency.Timing(None, 0.5, s, [1, 2], None) for s in (1.0, 0.5)]}
    row = latency._row("x", rows, 3_000_000)
    assert row["compress_s"] is None
    assert math.isclose(row["total_s"], 0.75)
    assert row["peak_mb"] == 3.0
    assert row["speedup_over_baseline"] == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_small_workloads_exist_for_every_argument():
    encoding = (shapes.WORKLOADS, shapes.ENCODE_WORKLOADS, shapes.SHAPE_WORKLOADS)
    answering = (shapes.DECODE_WORKLOADS, shapes.QUESTION_WORKLOADS, shapes.FIRST_TOKEN_WORKLOADS)
    assert all(c.documents == 1 for table in answering for cases in table.values() for c in cases)
    for table in encoding + answering:
        assert all(c.model in shapes.MODELS for cases in table.values() for c in cases)
        assert table.keys() == shapes.ATTENTION_WORKLOADS.keys() == shapes.GROWTH_WORKLOADS.keys()
    (long,) = [c for c in shapes.SHAPE_WORKLOADS["real"] if c.tokens > 8000]
    assert long.span_lengths == [8064]
    assert long.span_lengths[0] + long.memory_size == 8192
