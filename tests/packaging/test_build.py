"""The C++ build: instruction sets and their choice, bad arguments, threads, and `setup.py` itself."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from icae_fast.backbone.rows import cumulative
from icae_fast.ops import EXTENSION_ERROR, REGISTRY, backend_of

if EXTENSION_ERROR is not None:
    pytest.skip(f"there are no C++ kernels: {EXTENSION_ERROR}", allow_module_level=True)

from icae_fast import _C

ROOT = Path(__file__).resolve().parents[2]
ISAS = _C.build_info()["isas"]
SANITIZERS = _C.build_info()["sanitizers"]
# The features by which to tell that a CPU runs an instruction set.
NEEDS = {"scalar": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx2", "fma", "avx512f", "avx512_vbmi", "avx512_bf16"}}
NEEDS["avx512_fp16"] = NEEDS["avx512"] | {"avx512_fp16"}
NEEDS["amx"] = NEEDS["avx512"] | {"amx_tile", "amx_bf16", "amx_in_torch"}
# Those that this CPU cannot run, but tests can: torch's brgemm, which `amx` multiplies with, also runs on AVX512-BF16.
EMULATED = {"amx"} & set(ISAS) if set(_C.runnable_isas()) & {"avx512", "amx"} == {"avx512"} else set()
OPS = sorted(REGISTRY)


def run_python(*arguments, folder=ROOT, **environment):
    """Run this Python in a fresh process, from the checkout, with the given environment variables."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def make_inputs(op, name, dtype=torch.float32):
    sample = next(s for s in REGISTRY[op].samples if s.name == name)
    return sample.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(5))


def call(op, inputs):
    return getattr(torch.ops.icae_fast, op)(**inputs)


def test_every_op_has_a_cpp_kernel():
    assert {op: backend_of(op, "cpu") for op in OPS} == dict.fromkeys(OPS, "cpp")


def test_module_tells_what_was_built_and_runs():
    assert _C.isa() in ISAS
    assert _C.isa() == os.environ.get("ICAE_FAST_ISA", _C.isa())
    assert _C.build_info()["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert _C.runnable_isas() == [isa for isa in ISAS if NEEDS[isa] <= set(_C.cpu_features())]


def test_the_best_instruction_set_is_chosen():
    result = run_python("-c", "import icae_fast._C as c; print(c.isa())", ICAE_FAST_ISA="")
    best = _C.runnable_isas()[-1]
    # Which of the two for AVX512-BF16 is measured.
    assert result.stdout.strip() in (("avx512_fp16", "avx512") if best == "avx512" else (best,)), result.stderr


def forcing(isa):
    return {"ICAE_FAST_ISA": isa, "ICAE_FAST_TEST_AMX": str(int(isa in EMULATED))}


@pytest.mark.parametrize(
    "isa",  # but the one that all tests here run under
    [pytest.param(isa, id=isa + "-emulated" * (isa in EMULATED)) for isa in ISAS if isa != _C.isa()],
)
def test_each_other_instruction_set_passes_the_op_tests_and_golden_cases(isa):
    probe = run_python("-c", "import icae_fast._C as c; print(c.isa())", **forcing(isa))
    if isa not in _C.runnable_isas() and isa not in EMULATED:
        assert "this CPU lacks" in probe.stderr
        pytest.skip(probe.stderr.strip().splitlines()[-1])
    assert probe.stdout.strip() == isa, probe.stderr
    result = run_python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops/test_ops.py", "tests/model/test_golden.py",
        "-k",
        "cpp and (budget or gradcheck or gradients) or test_golden",
        ICAE_FAST_REQUIRE="cpp", **forcing(isa),
    )  # fmt: skip
    assert result.returncode == 0, f"under {isa}:\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
    assert re.search(r"\d{3} passed", result.stdout), result.stdout[-300:]


@pytest.mark.skipif(not EMULATED, reason="this CPU has AMX, or not even AVX512-BF16")
def test_emulated_amx_has_to_be_asked_for_twice():
    script = "import icae_fast._C as c; print(c.isa(), c.runnable_isas())"
    result = run_python("-c", script, ICAE_FAST_ISA="", ICAE_FAST_TEST_AMX="1")
    assert "avx512" in result.stdout
    assert "amx" not in result.stdout
    result = run_python("-c", "import icae_fast.ops", ICAE_FAST_ISA="amx", ICAE_FAST_TEST_AMX="")
    assert result.returncode != 0
    assert "ICAE_FAST_ISA=amx, but this CPU lacks amx_tile, amx_bf16, amx_in_torch; unset it" in result.stderr


@pytest.mark.skipif(not {"amx"} & {*EMULATED, *_C.runnable_isas()}, reason="not even AVX512-BF16")
def test_amx_gives_way_where_onednn_is_switched_off():
    script = (
        "import torch, icae_fast._C as c\n"
        "print(c.isa())\n"
        "with torch.backends.mkldnn.flags(enabled=False): print(c.isa())\n"
        "print(c.isa())"
    )
    result = run_python("-c", script, **forcing("amx"))
    first, without, last = result.stdout.split()
    assert (first, last) == ("amx", "amx"), result.stderr
    assert without in ("avx512_fp16", "avx512")


def test_unknown_instruction_set_is_refused():
    result = run_python("-c", "import icae_fast.ops", ICAE_FAST_ISA="avx1024")
    assert result.returncode != 0
    assert "BackendError: ICAE_FAST_ISA is 'avx1024'; this build knows scalar" in result.stderr


# ---- machine code ----------------------------------------------------------------------------------------------


# What the units may use beyond the baseline of x86-64.
MAY_USE = {"avx2": {"avx2"}} | {unit: {"avx2", "avx512"} for unit in ("avx512", "amx")}
MAY_USE["avx512_fp16"] = {"avx2", "avx512", "fp16"}


def functions_of(library):
    """Disassemble: (demangled name, [(bytes, text), ...]) of every function."""
    text = subprocess.run(["objdump", "-d", "-C", "-w", library], capture_output=True, text=True, check=True).stdout
    for block in re.split(r"\n(?=[0-9a-f]+ <)", text):
        header = re.match(r"[0-9a-f]+ <(.*)>:\n", block)
        if header:
            yield header[1], re.findall(r"^\s*[0-9a-f]+:\t([0-9a-f ]+?)\s*\t(.*)$", block, re.MULTILINE)


def beyond_the_baseline(code, text):
    """What an instruction needs beyond x86-64's SSE2. Its prefix tells: AVX-512 on low registers looks like AVX2."""
    code = re.sub(r"^((2e|3e|64|65|67) )*", "", code)
    if code.startswith("62 "):  # EVEX
        return "fp16" if int(code[3:5], 16) & 7 in (5, 6) else "avx512"  # these opcode maps have nothing else
    if code.startswith(("c4 ", "c5 ")):  # VEX
        if text.startswith("k"):
            return "avx512"
        if text.startswith(("ldtile", "sttile", "tile", "tdp")):
            return "amx"
        return "avx2" if text.startswith("v") else "bmi"
    if re.match(r"((66|f2|f3) )?(4. )?0f 3[8a] |f3 (4. )?0f b[8d] ", code):  # the latter are popcnt and lzcnt
        return "sse4"
    return None


@pytest.mark.parametrize(
    ("code", "text", "needs"),
    [
        ("62 f3 75 28 25 c2 96", "vpternlogd $0x96,%ymm2,%ymm1,%ymm0", "avx512"),
        ("62 f1 74 38 58 00", "vaddps (%rax){1to8},%ymm1,%ymm0", "avx512"),
        ("67 62 f1 74 38 58 00", "vaddps (%eax){1to8},%ymm1,%ymm0", "avx512"),
        ("62 f6 75 48 b8 c2", "vfmadd231ph %zmm2,%zmm1,%zmm0", "fp16"),
        ("c5 f8 92 c8", "kmovw  %eax,%k1", "avx512"),
        ("c5 f4 58 c2", "vaddps %ymm2,%ymm1,%ymm0", "avx2"),
        ("c4 e2 72 5c c2", "tdpbf16ps %tmm1,%tmm2,%tmm0", "amx"),
        ("c4 e2 f1 f7 c3", "shlx   %rcx,%rbx,%rax", "bmi"),
        ("66 0f 38 40 c1", "pmulld %xmm1,%xmm0", "sse4"),
        ("f3 48 0f b8 c3", "popcnt %rbx,%rax", "sse4"),
        ("0f 58 c1", "addps  %xmm1,%xmm0", None),
        ("0f 00 e0", "verr   %eax", None),
    ],
)
def test_encodings_tell_what_an_instruction_needs(code, text, needs):
    assert beyond_the_baseline(code, text) == needs


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump to disassemble with")
@pytest.mark.skipif("avx512" not in ISAS, reason="not an x86 build")
def test_wide_instructions_stay_in_their_units():
    """A wide instruction in shared code would crash CPUs without it, and only those."""
    seen, strays = set(), []
    for name, instructions in functions_of(_C.__file__):
        unit = next((isa for isa in ISAS if f"::unit_{isa}::" in name), None)
        for code, text in instructions:
            found = beyond_the_baseline(code, text)
            if found in MAY_USE.get(unit, ()):
                seen.add((unit, found))
            elif found is not None:
                strays.append(f"{name}: {text} ({found})")
    assert not strays, strays[:10]
    # The tile instructions are in code that oneDNN generates.
    assert seen >= {("avx2", "avx2"), ("avx512", "avx512"), ("amx", "avx512")}
    if "avx512_fp16" in ISAS:  # GCC 11 cannot build it
        assert seen >= {("avx512_fp16", "avx512"), ("avx512_fp16", "fp16")}


# ---- arguments -------------------------------------------------------------------------------------------------


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("op", ["varlen_attention", "varlen_attention_backward"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": int32(0, 9, 5, 12, 24)}, "cu_seqlens_q falls from 9 to 5 at row 1"),
        ({"cu_seqlens_q": int32(0, 8, 16, 33)}, "cu_seqlens_q ends at 33, past the 32 tokens"),
        ({"cu_seqlens_k": int32(0, 72, 93, 1000)}, "cu_seqlens_k ends at 1000"),
        ({"cu_seqlens_k": int32(1, 72, 93, 109)}, "cu_seqlens_k begins with 0"),
        ({"cu_seqlens_k": int32(0, 72, -3, 109)}, "cu_seqlens_k falls"),
        ({"cu_seqlens_q": int32(0, 8)}, "cu_seqlens_q is for 1 rows and cu_seqlens_k for 3"),
        ({"cu_seqlens_q": int32()}, "cu_seqlens_q begins with 0"),
        ({"cu_seqlens_q": torch.tensor([0, 8, 16, 32])}, "cu_seqlens_q is 1-d int32"),
        ({"seqused_k": int32(73, 1, 1)}, "seqused_k is 73 for row 0, which has 72 keys"),
        ({"seqused_k": int32(1, -1, 1)}, "seqused_k is -1 for row 1"),
        ({"seqused_k": int32(1)}, "seqused_k has 1 values for 3 rows"),
        ({"window": -1}, "window is -1"),
        ({"k": torch.zeros(109, 3, 64), "v": torch.zeros(109, 3, 64)}, "4 query heads are no multiple of 3"),
        ({"v": torch.zeros(109, 2, 32)}, "they must agree"),
        ({"k": torch.zeros(109, 2, 64, dtype=torch.bfloat16)}, "k is BFloat16, not Float"),
    ],
)
def test_attention_refuses_what_it_would_read_out_of_bounds(op, change, message):
    inputs = make_inputs(op, "memory-queries") | change
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(op, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rows": torch.tensor([0, 41])}, "q_rows holds 41, but x has 41 rows"),
        ({"q_rows": torch.tensor([-1])}, "q_rows holds -1"),
        ({"q_rows": int32(1)}, "q_rows is 1-d int64"),
        ({"cos": torch.zeros(40, 8)}, "cos is [40, 8], not (41, 8)"),
        ({"weight": torch.zeros(127, 48)}, "an even head_dim for each of 8 heads"),
        ({"lora_a": None}, "given together or not at all"),
        ({"lora_b": torch.zeros(96, 9)}, "lora_a is [16, 48], not (18, 48)"),
        ({"dropout_p": 1.0}, "dropout_p is 1, not in [0, 1)"),
        ({"x": torch.zeros(41, 48, dtype=torch.float16)}, "x is Half; the C++ kernels take float32"),
    ],
)
def test_projection_refuses_arguments_that_do_not_fit(change, message):
    inputs = make_inputs("lora_qkv_rope", "memory-rows") | change
    with pytest.raises((RuntimeError, IndexError), match=re.escape(message)):
        call("lora_qkv_rope", inputs)


def test_tokens_outside_all_rows_are_left_out():
    """cu_seqlens may end before the tensors do, as with a buffer of fixed size."""
    q, k, v = (torch.randn(20, heads, 16) for heads in (4, 2, 2))
    cu, lse_shape = int32(0, 3, 11), (4, 20)
    settings = {"max_seqlen_q": 8, "max_seqlen_k": 8, "scale": 0.25, "window": 0, "seqused_k": None}
    rows = {"cu_seqlens_q": cu, "cu_seqlens_k": cu} | settings
    out, lse = torch.ops.icae_fast.varlen_attention(q, k, v, **rows)
    assert torch.equal(out[11:], torch.zeros(9, 4, 16))
    assert torch.isneginf(lse[:, 11:]).all()
    grads = torch.ops.icae_fast.varlen_attention_backward(
        torch.randn_like(q), torch.randn(lse_shape), q, k, v, out, lse, **rows
    )
    assert all(torch.equal(g[11:], torch.zeros_like(g[11:])) for g in grads)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.5])
def test_any_scale_is_right(scale):
    spec = REGISTRY["varlen_attention"]
    inputs = make_inputs("varlen_attention", "empty-rows", torch.float64) | {"scale": scale}
    for got, truth in zip(call("varlen_attention", inputs), spec.reference(**inputs), strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(71, 1, 5), (1, 1, 1), (6, 1, 256), (10, 2, 72)])
def test_odd_heads(heads, kv_heads, head_dim, dtype):
    """More query heads than a tile has lanes, and head sizes that fill no vector."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(70, h, head_dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads))
    cu = int32(0, 69, 70)
    rows = (cu, cu, None, 69, 69, head_dim**-0.5, 0)
    attention, backward = (REGISTRY[n] for n in ("varlen_attention", "varlen_attention_backward"))
    out, lse = torch.ops.icae_fast.varlen_attention(q, k, v, *rows)
    truth = attention.reference(q.double(), k.double(), v.double(), *rows)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.double(), truth[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), truth[1], rtol=tolerance, atol=tolerance)
    grads = (torch.randn(out.shape, generator=generator).to(dtype), torch.randn(lse.shape, generator=generator))
    got = torch.ops.icae_fast.varlen_attention_backward(*grads, q, k, v, out, lse, *rows)
    exact = backward.reference(*(t.double() for t in (*grads, q, k, v, out, lse)), *rows)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance * max(1.0, e.abs().max().item()))


# ---- threads ---------------------------------------------------------------------------------------------------

THREADED = [
    ("varlen_attention", "gqa-primes"),
    ("varlen_attention_backward", "span-512"),
    ("lora_qkv_rope", "smollm2"),
    ("lora_qkv_rope_backward", "smollm2"),
    ("swiglu", "smollm2"),
    ("swiglu_backward", "smollm2"),
    ("linear", "smollm2"),
    ("rms_norm", "smollm2"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "sample"), THREADED)
def test_results_are_the_same_every_time(op, sample, dtype):
    inputs = make_inputs(op, sample, dtype)
    first = call(op, inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, call(op, inputs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "sample"), THREADED)
def test_several_python_threads_at_once(op, sample, dtype):
    inputs = make_inputs(op, sample, dtype)
    expected = call(op, inputs)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: call(op, inputs), range(16)):
            for a, b in zip(got, expected, strict=True):  # another thread count may sum up in another order
                torch.testing.assert_close(a, b)


# In bf16 the products are this package's own where it has a kernel for them, else ATen's, which may cut them otherwise.
OWN = [("varlen_attention", "gqa-primes"), ("rms_norm", "smollm2")]
if _C.isa() in ("avx512_fp16", "avx512"):
    OWN += [("lora_qkv_rope", "smollm2"), ("swiglu", "smollm2"), ("linear", "smollm2")]


@pytest.mark.parametrize(("op", "sample"), OWN)
def test_results_do_not_depend_on_the_number_of_threads(op, sample):
    inputs = make_inputs(op, sample, torch.bfloat16)
    expected, threads = call(op, inputs), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        got = call(op, inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_tasks_and_rows_that_are_split_equal_rows_alone(dtype, threads, one_thread):
    """Heads of short rows are a task each, but for the shortest; long rows, and those of few queries, are not."""
    lengths = [300, 2, 2300, 41, 0, 513, 129, 1, 40, 700]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 64, generator=g).to(dtype) for heads in (6, 2, 2))

    def attend(q, k, v, lengths):
        cu = cumulative(lengths)
        return torch.ops.icae_fast.varlen_attention(q, k, v, cu, cu, None, max(lengths), max(lengths), 0.125, 0)

    torch.set_num_threads(threads)
    out, lse = attend(q, k, v, lengths)
    for start, end in itertools.pairwise(cumulative(lengths).tolist()):
        if end > start:
            alone, alone_lse = attend(q[start:end], k[start:end], v[start:end], [end - start])
            assert torch.equal(out[start:end], alone)
            assert torch.equal(lse[:, start:end], alone_lse)


# ---- setup.py --------------------------------------------------------------------------------------------------

needs_setup = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


@needs_setup
def test_missing_compiler_is_told_in_one_sentence():
    result = run_python("setup.py", "--version", CXX="no-such-compiler", ICAE_FAST_BUILD="1")
    assert result.returncode != 0
    assert "there is no C++ compiler ('no-such-compiler' is not found)" in result.stderr
    assert "ICAE_FAST_BUILD=0" in result.stderr
    assert "Traceback" not in result.stderr


@needs_setup
def test_unknown_sanitizer_is_refused_in_one_sentence():
    result = run_python("setup.py", "--version", ICAE_FAST_SANITIZE="memory", ICAE_FAST_BUILD="1")
    assert result.returncode != 0
    assert result.stderr.startswith("icae_fast: ICAE_FAST_SANITIZE is 'memory'; it may be address, ")
    assert "Traceback" not in result.stderr


@needs_setup
def test_pure_python_install_needs_no_torch():
    script = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': '__main__'})"  # noqa: E501
    assert run_python("-c", script, ICAE_FAST_BUILD="0").returncode == 0
    refused = run_python("-c", script, ICAE_FAST_BUILD="1")
    assert "cannot import" in refused.stderr
    assert "Traceback" not in refused.stderr
