"""The C++ build: instruction sets and their choice, and `setup.py` itself."""

import os
import re

import pytest
import torch

from helpers.build import ROOT, run_python
from icae_fast.ops import EXTENSION_ERROR, REGISTRY, backend_of

if EXTENSION_ERROR is not None:
    pytest.skip(f"there are no C++ kernels: {EXTENSION_ERROR}", allow_module_level=True)

from icae_fast import _C

ISAS = _C.build_info()["isas"]
# CPU features that an instruction set requires.
NEEDS = {"scalar": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx2", "fma", "avx512f", "avx512_vbmi", "avx512_bf16"}}
NEEDS["avx512_fp16"] = NEEDS["avx512"] | {"avx512_fp16"}
NEEDS["amx"] = NEEDS["avx512"] | {"amx_tile", "amx_bf16", "amx_in_torch"}
# Sets that this CPU lacks and the tests can run: torch's brgemm, which `amx` calls, also runs on AVX512-BF16.
EMULATED = {"amx"} & set(ISAS) if set(_C.runnable_isas()) & {"avx512", "amx"} == {"avx512"} else set()
OPS = sorted(REGISTRY)


def test_every_op_has_a_cpp_kernel():
    assert {op: backend_of(op, "cpu") for op in OPS} == dict.fromkeys(OPS, "cpp")


def test_module_tells_what_was_built_and_runs():
    assert _C.isa() in ISAS
    assert _C.isa() == os.environ.get("ICAE_FAST_ISA", _C.isa())
    assert _C.build_info()["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert _C.runnable_isas() == [isa for isa in ISAS if NEEDS[isa] <= set(_C.cpu_features())]


def test_the_best_instruction_set_is_chosen():
    result = run_python("-c", "import torch, icae_fast._C as c; print(c.isa())", ICAE_FAST_ISA="")
    best = _C.runnable_isas()[-1]
    # Of the two units for AVX512-BF16 the faster one is chosen by a measurement.
    assert result.stdout.strip() in (("avx512_fp16", "avx512") if best == "avx512" else (best,)), result.stderr


def forcing(isa):
    return {"ICAE_FAST_ISA": isa, "ICAE_FAST_TEST_AMX": str(int(isa in EMULATED))}


@pytest.mark.parametrize(
    "isa",  # all except the one that this process runs
    [pytest.param(isa, id=isa + "-emulated" * (isa in EMULATED)) for isa in ISAS if isa != _C.isa()],
)
def test_each_other_instruction_set_passes_the_op_tests_and_golden_cases(isa):
    probe = run_python("-c", "import torch, icae_fast._C as c; print(c.isa())", **forcing(isa))
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
    script = "import torch, icae_fast._C as c; print(c.isa(), c.runnable_isas())"
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
