"""The checkout's source files as data: modules, the imports between them, rooms and their order, sizes."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Folder -> import name. `training/` is installed as a subpackage of icae_fast (setup.py).
PACKAGES = {"icae_fast": "icae_fast", "training": "icae_fast.training"}
PYTHON_FOLDERS = (*PACKAGES, "bench", "csrc", "docs", "examples", "tests")


def python_files() -> list[Path]:
    """Return every Python file of the checkout."""
    return [*sorted(path for folder in PYTHON_FOLDERS for path in (ROOT / folder).rglob("*.py")), ROOT / "setup.py"]


def cpp_files() -> list[Path]:
    """Return every C++ source and header."""
    return sorted(path for ending in ("*.cpp", "*.h") for path in (ROOT / "csrc").rglob(ending))


@cache
def modules() -> dict[str, Path]:
    """Return import name -> file of every module in the wheel."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imported_names(path: Path) -> Iterator[str]:
    """Yield the full name of every import in a file: at its head, in functions, and under TYPE_CHECKING.

    `from a.b import c` yields `a.b.c` where that is a module of ours, else `a.b`. The extension `icae_fast._C` is
    left out.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            for full in (f"{node.module}.{alias.name}" for alias in node.names):
                if full != "icae_fast._C" and node.module != "icae_fast._C":
                    yield full if full in modules() else node.module


@cache
def import_graph() -> dict[str, set[str]]:
    """Return module -> the modules of the wheel that it imports."""
    return {name: {i for i in imported_names(path) if i in modules()} for name, path in modules().items()}


@cache
def rooms() -> list[str]:
    """Return the rooms in the order of the table in docs/design.md: the highest first, each as an import name."""
    table = (ROOT / "docs/design.md").read_text().split("<!-- rooms -->")[1].split("<!-- end -->")[0]
    return re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE)


def room_of(module: str) -> str | None:
    """Return the innermost room that holds a module, or None."""
    inside = (room for room in rooms() if module == room or (module.startswith(f"{room}.") and room != "icae_fast"))
    return max(inside, key=len, default=None)
