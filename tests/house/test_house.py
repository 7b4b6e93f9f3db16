"""The shape of the code: which room may import which, and how large files, functions and folders may be."""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter

import pytest

from helpers import source

FILE_LINES, FUNCTION_LINES, FOLDER_FILES = 400, 60, 12
NOT_OURS = ("training", "bench", "docs", "examples", "tests", "helpers")  # import names that a user's folder may have


def relative(path):
    return path.relative_to(source.ROOT).as_posix()


def test_every_room_has_a_line_in_the_design_and_every_module_a_room():
    assert len(source.rooms()) == len(set(source.rooms()))
    assert set(source.rooms()) <= set(source.modules()), "docs/design.md lists rooms that do not exist"
    # A package without imports, such as icae_fast.training, only holds its rooms.
    homeless = {name for name, imports in source.import_graph().items() if source.room_of(name) is None and imports}
    assert not homeless, "docs/design.md has no room for these modules"


def test_imports_between_rooms_go_down_only():
    """Rooms are listed in docs/design.md from top to bottom, so this excludes circles between rooms, too."""
    floor = {room: i for i, room in enumerate(reversed(source.rooms()))}
    upward = [
        f"{name} imports {imported}"
        for name, imports in sorted(source.import_graph().items())
        for imported in sorted(imports)
        if floor.get(source.room_of(name), -1) < floor.get(source.room_of(imported), -1)
    ]
    assert not upward, "\n".join(upward)


def test_no_circle_of_imports():
    try:
        TopologicalSorter(source.import_graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_wheel_imports_no_folder_of_the_checkout():
    """`import training` in the wheel would find a user's own folder of that name."""
    strays = [
        f"{name} imports {imported}"
        for name, path in sorted(source.modules().items())
        for imported in source.imported_names(path)
        if imported.split(".")[0] in NOT_OURS
    ]
    assert not strays, "\n".join(strays)


def test_files_are_short():
    lines = {relative(path): path.read_text().count("\n") for path in source.python_files() + source.cpp_files()}
    too_long = {name: n for name, n in lines.items() if n > FILE_LINES}
    assert not too_long, f"files of more than {FILE_LINES} lines"


def test_functions_are_short():
    too_long = {
        f"{relative(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in source.python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    }
    assert not too_long, f"functions of more than {FUNCTION_LINES} lines"


def test_folders_are_small():
    modules = Counter(relative(path.parent) for path in source.python_files() if path.name != "__init__.py")
    too_full = {folder: n for folder, n in modules.items() if n > FOLDER_FILES}
    assert not too_full, f"folders of more than {FOLDER_FILES} modules"
