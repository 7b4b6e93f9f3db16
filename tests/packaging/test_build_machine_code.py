"""The machine code of the C++ build: wide instructions stay in the units that are compiled for them."""

import re
import shutil
import subprocess

import pytest

from icae_fast.ops import EXTENSION_ERROR

if EXTENSION_ERROR is not None:
    pytest.skip(f"there are no C++ kernels: {EXTENSION_ERROR}", allow_module_level=True)

from icae_fast import _C

ISAS = _C.build_info()["isas"]
# Instruction set extensions that each unit may use beyond the x86-64 baseline.
MAY_USE = {"avx2": {"avx2"}} | {unit: {"avx2", "avx512"} for unit in ("avx512", "amx")}
MAY_USE["avx512_fp16"] = {"avx2", "avx512", "fp16"}


def functions_of(library):
    """Yield (demangled name, [(bytes, text), ...]) of every function in a library."""
    text = subprocess.run(["objdump", "-d", "-C", "-w", library], capture_output=True, text=True, check=True).stdout
    for block in re.split(r"\n(?=[0-9a-f]+ <)", text):
        header = re.match(r"[0-9a-f]+ <(.*)>:\n", block)
        if header:
            yield header[1], re.findall(r"^\s*[0-9a-f]+:\t([0-9a-f ]+?)\s*\t(.*)$", block, re.MULTILINE)


def beyond_the_baseline(code, text):
    """Return the extension that an instruction needs beyond x86-64's SSE2, or None.

    The encoding's prefix decides, since AVX-512 on low registers reads like AVX2.
    """
    code = re.sub(r"^((2e|3e|64|65|67) )*", "", code)
    if code.startswith("62 "):  # EVEX
        return "fp16" if int(code[3:5], 16) & 7 in (5, 6) else "avx512"  # opcode maps 5 and 6 hold nothing else
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
    """A wide instruction in shared code would crash CPUs that lack it, and no others."""
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
    # Tile instructions are in code that oneDNN generates at run time.
    assert seen >= {("avx2", "avx2"), ("avx512", "avx512"), ("amx", "avx512")}
    if "avx512_fp16" in ISAS:  # GCC 11 cannot build it
        assert seen >= {("avx512_fp16", "avx512"), ("avx512_fp16", "fp16")}
