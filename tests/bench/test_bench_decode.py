"""Parts of the decoding benchmarks: split timings, scaled times, KV bytes, targets, and llama.cpp's row."""

import ctypes
import json
import math
import sys
import time
import types

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the harness needs pytest-benchmark")
pytest.importorskip("peft", reason="the baseline needs peft")

from bench.harness import compare as harness
from bench.harness import decoders, models, shapes, targets
from bench.rivals import llama_cpp
from docs import tables
from icae_fast.benchmark.baseline import BaselineICAE

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = shapes.QUESTION_WORKLOADS["small"][0]
MACHINE = {"cpu": "AMD EPYC", "threads": 2, "isa": "avx512", "commit": "0" * 40, "cpu_features": ["avx512f"]}


def ratios(value):
    """Return a ratio that was the same in every round."""
    return {"median": value, "min": value, "max": value, "of_minima": value}


def decode_row(over=4.5, fraction=0.85):
    """Return a row of `bench_decode.py`."""
    times = {"generate": {"median": 9.0, "min": 9.0}, harness.OURS: {"median": 2.0, "min": 2.0}}
    return {
        "name": "decode", "case": "smollm2-135m-bf16-1x512", "new_tokens": 128, "weight_bytes": 270_000_000,
        "step_gbs": 21.0, "read_gbs": 25.0, "fraction_of_read": ratios(fraction), "seconds": times, "step_ms": times,
        "speedup_over": {"generate": ratios(over)}, "step_speedup_over": {"generate": ratios(5.0)},
    }  # fmt: skip


def question_row(by_prompt=25.0, one_by_one=9.0, memories=1.02, scaled=None):
    """Return a row of `bench_decode_questions.py`."""
    names = (decoders.BY_PROMPT, decoders.ONE_BY_ONE)
    words = {name: f"{name} for 2 of 16" for name in names} if scaled is None else scaled
    return {
        "name": "questions", "case": "smollm2-135m-bf16-1x4096", "prompts": 16, "new_tokens": 32, "scaled": words,
        "prompts_measured": {**dict.fromkeys(names, 2), harness.OURS: 16},
        "kv": {"mb": 44.0, "memory_mb": 23.6, "own_mb": 19.9, "memories": memories},
        "seconds": {name: {"median": 10.0, "min": 9.0} for name in (*names, harness.OURS)},
        "speedup_over": dict(zip(names, map(ratios, (by_prompt, one_by_one)), strict=True)),
    }  # fmt: skip


def first_token_row(**speedups):
    """Return a row of `bench_decode_first_token.py`."""
    names = {"slots": harness.OURS, "kv": decoders.KV_TIER}
    return {
        "name": "first", "case": "smollm2-135m-bf16-1x4096",
        "first_token_speedup": {names[tier]: ratios(value) for tier, value in speedups.items()},
        "seconds": {name: {"median": 1.0, "min": 1.0} for name in (*names.values(), decoders.BASELINE)},
    }  # fmt: skip


def llama_row(over=1.1):
    """Return a row of `bench.rivals.llama_cpp`."""
    steps = {name: {"median": 12.0, "min": 11.0} for name in (decoders.LLAMA_CPP, harness.OURS)}
    return {
        "name": llama_cpp.ROW, "case": "smollm2-135m-bf16-1x512", "step_ms": steps,
        "step_speedup_over": {decoders.LLAMA_CPP: ratios(over)},
    }  # fmt: skip


def test_a_call_in_parts():
    def call():
        moments.append(time.perf_counter())
        return len(moments), moments[-1]

    moments = []
    parted = decoders.SplitTimer(call)
    assert [parted(), parted()] == [1, 2]
    assert len(parted.before) == len(parted.after) == 2
    assert all(t >= 0 for t in parted.before + parted.after)
    start = time.perf_counter()
    early = decoders.SplitTimer(lambda: (None, start + 1e6))  # the parts meet at the moment, wherever it is
    early()
    assert early.before[0] > 9e5
    assert early.after[0] < -9e5


def test_step_facts_are_by_token():
    facts = decoders.step_facts(100, {harness.OURS: [1.0, 2.0], "generate": [4.0, 10.0]})
    assert facts["step_ms"] == {harness.OURS: {"median": 15.0, "min": 10.0}, "generate": {"median": 70.0, "min": 40.0}}
    assert facts["step_speedup_over"] == {"generate": {"median": 4.5, "min": 4.0, "max": 5.0, "of_minima": 4.0}}


def test_the_bandwidth_bound_is_judged_round_by_round():
    facts = decoders.bandwidth_facts(10**9, 4, after=[2.0, 4.0], read=[1.0, 3.0])
    assert facts["fraction_of_read"] == {"median": 0.625, "min": 0.5, "max": 0.75, "of_minima": 0.5}
    assert (facts["weight_bytes"], facts["read_gbs"]) == (10**9, 2.0)
    assert math.isclose(facts["step_gbs"], 4 / 3)


def test_the_reader_reads_the_weights_once_a_step():
    case = shapes.DECODE_WORKLOADS["small"][0]
    model, _ = models.build_base(case.model, case.torch_dtype)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n]
    assert decoders.weight_bytes(case) == sum(p.nbytes for p in matrices)
    work = decoders.reading_work(case)
    assert work.bytes == (case.new_tokens - 1) * decoders.weight_bytes(case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        decoders.weight_reader(case)()
    sizes = [e.input_shapes[0] for e in profile.events() if e.name == "aten::max"]
    assert [4 * math.prod(s) for s in sizes] == [decoders.weight_bytes(case)] * (case.new_tokens - 1)


def test_scaled_times_say_so():
    times, words = decoders.scaled_times(16, 2, by_prompt=[20.0], compress=[8.0], asking=[6.0])
    assert times == {decoders.BY_PROMPT: [160.0], decoders.ONE_BY_ONE: [8.0 + 48.0]}
    assert words == {
        decoders.BY_PROMPT: "measured for 2 of 16 prompts, times 8",
        decoders.ONE_BY_ONE: "measured compressing once, and asking for 2 of 16 prompts, times 8",
    }
    times, words = decoders.scaled_times(2, 2, [20.0], [8.0], [6.0])
    assert (times, words) == ({decoders.BY_PROMPT: [20.0], decoders.ONE_BY_ONE: [14.0]}, {})


@pytest.mark.parametrize("shared", [True, False])
def test_kv_is_that_of_one_memory_or_of_many(shared):
    icae, prompts = models.models_for(TINY).icae, decoders.prompts_for(TINY)
    memory = icae.compress(models.documents_for(TINY))[0]
    if not shared:
        memory = icae.compress([models.documents_for(TINY)[0].roll(i) for i in range(len(prompts))])
    with decoders.recorded_kv_bytes() as held:
        answers = icae.generate(memory, prompts, return_ids=True, **decoders.answer_limits(TINY))
    assert len(held) == 1
    own = sum(len(icae.prompt_ids(p)[1]) + len(a) for p, a in zip(prompts, answers, strict=True))
    kv = decoders.kv_facts(TINY, held[0], own)["kv"]
    assert math.isclose(kv["memories"], 1.0 if shared else len(prompts))
    assert math.isclose(kv["mb"], kv["own_mb"] + kv["memory_mb"] * kv["memories"])


def test_every_answer_is_checked(make_icae, random_ids):
    icae = make_icae()
    both = types.SimpleNamespace(icae=icae, baseline=BaselineICAE.from_icae(icae))
    case = shapes.Case("tiny", "fp32", 1, 9, prompts=2, new_tokens=3)
    memory, asked = icae.compress(random_ids(9))[0], [random_ids(3, seed=1), random_ids(2, seed=2)]
    answers = icae.generate(memory, asked, return_ids=True, **decoders.answer_limits(case))
    decoders.assert_answers(both, case, memory.slots, asked, answers)
    with pytest.raises(AssertionError, match="1 answers to 2 prompts"):
        decoders.assert_answers(both, case, memory.slots, asked, answers[:1])
    with pytest.raises(AssertionError, match="2 tokens instead of 3"):
        decoders.assert_answers(both, case, memory.slots, asked, [answers[0], answers[1][:2]])
    wrong = [answers[0], [(answers[1][0] + 1) % 96, *answers[1][1:]]]
    with pytest.raises(AssertionError, match="below the best"):
        decoders.assert_answers(both, case, memory.slots, asked, wrong)


def verdicts(*rows):
    """Return the last column of the table of targets."""
    text = targets.render(MACHINE, rows)
    assert "…" not in text
    return [next((v for v in ("met", "missed") if v in line), "") for line in text.splitlines() if "│" in line]


def test_targets_of_answering():
    assert verdicts(decode_row()) == ["met", "", "met", "", ""]
    assert verdicts(decode_row(over=3.9, fraction=0.79)) == ["missed", "", "missed", "", ""]
    assert verdicts(question_row()) == ["met", "missed", "met"]
    assert verdicts(question_row(by_prompt=19.0, one_by_one=10.0, memories=16.1)) == ["missed", "met", "missed"]
    assert verdicts(first_token_row(slots=8.0)) == ["met"]
    assert verdicts(first_token_row(slots=7.9, kv=49.0)) == ["missed", "missed"]
    assert verdicts(first_token_row(kv=51.0)) == ["met"]
    assert verdicts(llama_row()) == ["met"]
    assert verdicts(llama_row(0.9)) == ["missed"]


def test_both_bandwidths_and_the_scaling_are_shown():
    text = targets.render(MACHINE, [decode_row(), question_row()])
    assert all(value in text for value in ("GB/s, plain read", "25", "GB/s, of weights in decoding", "21"))
    assert text.count("(of 2 prompts, scaled)") == 2
    assert "scaled" not in targets.render(MACHINE, [question_row(scaled={})])


def test_the_table_of_answering():
    rows = [decode_row(), question_row(), first_token_row(slots=9.0, kv=60.0), llama_row()]
    lines = tables._decode({"machine": MACHINE, "rows": rows}).splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1
    short = "`smollm2-135m-bf16-1x512`"
    assert lines[4] == f"| {short}, 128 tokens | 2 s | generate | 9 s | 4.5 |"
    assert lines[5] == (
        f"| {short}, a token after the first | 2 ms | reading 270 MB of weights at 25 GB/s | 10.8 ms | 0.85 |"
    )
    assert f"{decoders.BY_PROMPT} ({decoders.BY_PROMPT} for 2 of 16)" in lines[6]
    assert lines[8].endswith("prompts' and answers' own | 24.1 MB | one memory's slots | 23.6 MB | - |")
    assert [line.split(", ")[1].split(" |")[0] for line in lines[9:11]] == ["first token", "first token"]
    assert lines[-1] == f"| {short}, a token after the first | 12 ms | {decoders.LLAMA_CPP} | 12 ms | 1.1 |"


class FakeLlama:
    """A stub of llama_cpp's model; its logits favour the id after the last one."""

    def __init__(self, path, *, n_ctx, n_batch, n_threads, n_threads_batch, verbose):
        assert (n_threads, n_threads_batch) == (torch.get_num_threads(),) * 2
        self.ctx, self.room, self.n_batch, self.read = self, n_ctx, n_batch, []

    def n_vocab(self):
        return TINY.shape.vocabulary

    def reset(self):
        self.read = []

    def eval(self, ids):
        assert len(ids) <= self.n_batch
        self.read += ids
        assert len(self.read) <= self.room

    @staticmethod
    def logits(ctx, index):
        assert index == -1
        values = (ctypes.c_float * ctx.n_vocab())()
        values[(ctx.read[-1] + 1) % ctx.n_vocab()] = 1.0
        return ctypes.cast(values, ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def fake_llama(monkeypatch):
    """Make the stub importable as `llama_cpp`."""
    module = types.ModuleType("llama_cpp")
    module.Llama, module.llama_get_logits_ith = FakeLlama, FakeLlama.logits
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(llama_cpp.importlib.metadata, "version", lambda name: f"version of {name}")


def test_llama_cpp_decodes_greedily_behind_its_context(fake_llama, tmp_path):
    decode = llama_cpp.llama_decoder(tmp_path / "model.gguf", [7, 8, 9], 4)
    for _ in range(2):
        before = time.perf_counter()
        ids, first = decode()
        assert ids == [10, 11, 12, 13]
        assert before <= first <= time.perf_counter()


def test_llama_cpp_s_row(fake_llama, tmp_path):
    case = shapes.DECODE_WORKLOADS["small"][0]
    row = llama_cpp.measure(case, tmp_path / "model.gguf", rounds=2)
    assert row["name"] == llama_cpp.ROW
    assert row["context_tokens"] == len(case.span_lengths) * case.memory_size + decoders.PROMPT_TOKENS + 1
    assert row["step_ms"].keys() == {decoders.LLAMA_CPP, harness.OURS}
    assert (row["rounds"], row["file"], row["llama_cpp_python"]) == (2, "model.gguf", "version of llama-cpp-python")
    assert len(verdicts(row)) == 1
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"suite": "decode", "rows": [decode_row(), llama_row()]}))
    llama_cpp.merge(path, row)
    written = json.loads(path.read_text())
    assert written == {"suite": "decode", "rows": [decode_row(), row]}
    assert list(tmp_path.iterdir()) == [path]


def test_without_llama_cpp_or_results_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(llama_cpp, "RESULTS", tmp_path)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install llama-cpp-python"):
        llama_cpp.main()
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SystemExit, match="make bench-decode"):
        llama_cpp.main()
