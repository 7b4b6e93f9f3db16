"""Build `icae_fast._C` from csrc/; everything else about the package is in pyproject.toml.

`pip install --no-build-isolation .` installs with the C++ kernels; with ICAE_FAST_BUILD=0 in the environment
it installs pure Python, which runs on the plain-torch reference. ICAE_FAST_SANITIZE=address,undefined (or one of
the two) builds the kernels with those sanitizers; `make sanitize` does, into a folder of its own, and tests them.
ICAE_FAST_COVERAGE=1 builds them to count executed lines for gcov; `make coverage` does, and prints the counts.
"""

import json
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
SLOW = (
    "icae_fast: ninja is not found, so the C++ kernels are compiled one file at a time, which takes nine "
    "minutes or so; stop and run `pip install ninja` first to compile on all cores"
)
WITHOUT = "set ICAE_FAST_BUILD=0 to install without the C++ kernels, on the slow plain-torch reference"

# OpenMP is torch's: at::parallel_for is inlined into the ops and needs the flag to compile, but linking with it
# could bring in a second thread pool beside the one in torch/lib, so on Linux with GCC only the symbols are used.
OPENMP = {"Linux": ["-fopenmp"]}.get(platform.system(), [])
# The kernels rely on contraction to fused multiply-adds. No -march: each kernels/unit_*.cpp selects its own
# instruction set.
COMPILE = ["-O3", "-g0", "-falign-loops=64", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden"]
COMPILE += ["-Wall", "-Wextra"]
# GCC 12 warns about the undefined operands inside its own AVX-512 intrinsics.
COMPILE += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
COMPILE += ["-Wno-unused-parameter", "-Wno-psabi", "-Wno-unknown-pragmas", *OPENMP]
# Threads count atomically.
COVERAGE = ["--coverage", "-O1", "-fprofile-update=atomic"]
# These come after Python's own flags: its -fwrapv would make every integer overflow defined.
SANITIZE = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", "-fno-sanitize-recover=undefined"]


def is_clang(compiler):
    return "clang" in Path(compiler).name


def found(pattern):
    """Return the files of csrc/, at any depth, relative to this one: setuptools refuses absolute paths."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob(pattern))


def sanitizers():
    """Return the sanitizers that ICAE_FAST_SANITIZE requests."""
    requested = os.environ.get("ICAE_FAST_SANITIZE", "")
    if requested not in ("", "address", "undefined", "address,undefined"):
        sys.exit(f"icae_fast: ICAE_FAST_SANITIZE is {requested!r}; it may be address, undefined or address,undefined.")
    return requested


def build_command():
    """Return torch's build_ext, which warns if the build will be slow, and records the version of torch."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    class Build(BuildExtension):
        def run(self):
            # A virtual environment that is not activated has its own ninja, but not on PATH.
            os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
            if not is_ninja_available():
                print(SLOW, file=sys.stderr)
                self.use_ninja = False
            super().run()
            # With another torch the extension may not load, or may crash; `icae_fast.ops` reads this before it loads.
            record = Path(self.get_ext_fullpath("icae_fast._C")).with_name("_C_build.json")
            record.write_text(json.dumps({"torch": torch.__version__}) + "\n")

    return Build.with_options(no_python_abi_suffix=False)


def extension():
    """Return the arguments of `setup` for the extension and the command that builds it."""
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        sys.exit(
            f"icae_fast: the C++ kernels are built against torch, which this Python cannot import ({error}); install "
            f"torch first and build with --no-build-isolation, or {WITHOUT}."
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"icae_fast: there is no C++ compiler ({compiler!r} is not found); install one with C++20 such as "
            f"g++ 11, or {WITHOUT}."
        )
    # Checks embed their file's path, which would make the library differ from folder to folder.
    paths = [f"-ffile-prefix-map={ROOT}=.", f"-ffile-prefix-map={Path(torch.__file__).parent}=torch"]
    sanitized = sanitizers()
    counting = COVERAGE if os.environ.get("ICAE_FAST_COVERAGE") == "1" else []
    sanitize = [f"-fsanitize={sanitized}", f'-DICAE_FAST_SANITIZE="{sanitized}"', *SANITIZE] if sanitized else []
    module = CppExtension(
        "icae_fast._C",
        found("*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=found("*.h"),
        extra_compile_args={"cxx": COMPILE + paths + sanitize + counting},
        extra_link_args=(["-fopenmp"] if OPENMP and is_clang(compiler) else []) + sanitize[:1] + counting[:1],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": build_command()}}


def packages():
    """The one import name of the wheel; the folder `training/` is its subpackage `icae_fast.training`."""
    training = ["icae_fast.training", *(f"icae_fast.training.{name}" for name in find_packages("training"))]
    return [*find_packages(include=["icae_fast", "icae_fast.*"]), *training]


os.chdir(ROOT)
setup(
    packages=packages(),
    package_dir={"icae_fast.training": "training"},
    **({} if os.environ.get("ICAE_FAST_BUILD") == "0" else extension()),
)
