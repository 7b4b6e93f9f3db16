"""Check that every header of csrc/ parses by itself.

clang-tidy parses each header, those of kernels under several units, and reports what it uses without including it. The
compiler parses the headers without torch under the scalar unit, or all of them if there is no clang-tidy.

`make check-headers` runs it, and so does `make lint`. With --flags it writes csrc/compile_flags.txt instead, from which
clangd and other editors learn how to parse a file.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
FLAGS = ["-std=c++20", f"-I{CSRC}", "-Wall", "-Wextra"]
# A header alone defines functions that only its users call, and parameters that only some units use.
QUIET = ["-Wno-unused-function", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
CLANG_QUIET = ["-Wno-pragma-once-outside-header", "-Wno-unused-const-variable"]
AVX512 = [f"-m{f}" for f in ["avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512bf16"]]
AVX512 += ["-DICAE_VECTOR_BYTES=64", "-DICAE_AVX512"]
# What the unit_*.cpp say with pragmas and macros (kernels/unit.h).
UNITS = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    UNITS |= {
        "avx512": [*AVX512, "-DICAE_ISA=avx512", "-DICAE_BF16_PAIRS"],
        "avx512_fp16": [*AVX512, "-mavx512fp16", "-DICAE_ISA=avx512_fp16", "-DICAE_FP16"],
    }
CLANG_TIDY = Path(sys.executable).with_name("clang-tidy")


def torch_flags():
    """Return the include flags of torch and Python."""
    from torch.utils.cpp_extension import include_paths

    return [flag for path in [*include_paths(), sysconfig.get_paths()["include"]] for flag in ("-isystem", path)]


def headers():
    return sorted(CSRC.rglob("*.h"))


def is_kernel(header):
    return header.is_relative_to(CSRC / "kernels")


def commands():
    """Yield (label, command) for every parse."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    torch = torch_flags()
    for header in headers():
        name = header.relative_to(CSRC).as_posix()
        needs_torch = name.startswith(("ops/", "common/"))
        for unit, flags in UNITS.items() if is_kernel(header) else [("", [])]:
            every = [*FLAGS, *QUIET, *flags, *(torch if needs_torch else [])]
            label = f"{name} ({unit})" if unit else name
            if CLANG_TIDY.exists():
                tidy = [str(CLANG_TIDY), "--quiet", str(header), "--", "-xc++", *every, *CLANG_QUIET]
                yield f"clang-tidy {label}", tidy
            if CLANG_TIDY.exists() and (needs_torch or unit not in ("", "scalar")):
                continue
            # Included into an empty file, since GCC warns about `#pragma once` in a main file.
            # C++20 would accept a function template that nothing declares, until a unit instantiates its caller.
            every += ["-Wno-psabi", "-std=c++17"] if is_kernel(header) else []
            alone = [*compiler, *every, "-fsyntax-only", "-include", str(header), "-xc++", os.devnull]
            yield f"{compiler[0]} {label}", alone


def misplaced_includes():
    """Yield kernel headers that include a standard header, which only kernels/prelude.h may."""
    for header in headers():
        if is_kernel(header) and header.name != "prelude.h" and re.search(r"^#include <", header.read_text(), re.M):
            yield f"{header.relative_to(CSRC)}: include standard headers in kernels/prelude.h, which says why"


def run(labelled):
    """Run one command. Return its output if it failed, else None."""
    label, command = labelled
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if result.returncode == 0 else f"{label}\n{result.stdout}{result.stderr}"


def main():
    if "--flags" in sys.argv[1:]:
        (CSRC / "compile_flags.txt").write_text("\n".join(["-xc++", *FLAGS, *QUIET, *torch_flags()]) + "\n")
        return
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        sys.exit(f"check_headers: there is no C++ compiler ({compiler!r} is not found); set CXX or install one.")
    if not CLANG_TIDY.exists():
        print(f"check_headers: {CLANG_TIDY} is missing, so only {compiler} checks; pip install -r requirements.txt")
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        failures = [*misplaced_includes(), *filter(None, pool.map(run, commands()))]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
