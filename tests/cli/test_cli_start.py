"""Start of the command line: help without torch, lazy commands, the version, and shell completion."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import icae_fast
from icae_fast.cli import app as cli

HEAVY = ("torch", "transformers", "numpy", "safetensors.torch")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )


def test_help_and_version_do_not_import_torch():
    calls = [["--help"], ["--version"], ["bench", "latency", "--help"], *([name, "--help"] for name in cli.COMMANDS)]
    code = (
        "import sys\nfrom icae_fast.cli import main\n"
        f"for arguments in {calls!r}:\n"
        "    try:\n        main(arguments)\n    except SystemExit as stop:\n        assert not stop.code\n"
        f"    assert not [name for name in {HEAVY!r} if name in sys.modules], arguments"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage:") == len(calls) - 1
    assert not result.stderr


def test_the_package_is_lazy_and_complete():
    code = (
        "import sys, icae_fast\nassert 'torch' not in sys.modules\n"
        "assert set(icae_fast.__all__) <= set(dir(icae_fast))\n"
        "from icae_fast import ICAE, errors\nassert 'torch' in sys.modules and ICAE is icae_fast.ICAE\n"
        "from icae_fast import *\nassert MemoryStore.__name__ == 'MemoryStore'\n"
        "try:\n    icae_fast.absent\nexcept AttributeError as error:\n    print(error)"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "module 'icae_fast' has no attribute 'absent'\n"


def test_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(icae_fast.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == icae_fast._LAZY
    assert set(icae_fast.__all__) == {*seen, "ICAEConfig", "errors", "__version__"}


def test_a_missing_build_warns_when_ops_are_imported():
    code = "import sys; sys.modules['icae_fast._C'] = None; import icae_fast; print('quiet'); icae_fast.backend_of"
    result = run_python(code, ICAE_FAST_REQUIRE="")
    assert result.stdout == "quiet\n"
    assert "RuntimeWarning: icae_fast runs on its slow plain-torch reference" in result.stderr


def test_help_lines_are_first_lines_of_docstrings():
    for name, command in cli.COMMANDS.items():
        loaded = command.load(name)
        assert loaded.name == name
        assert loaded.help.splitlines()[0] == command.summary, name


def test_version(run):
    assert run("--version") == (0, f"icae-fast {icae_fast.__version__}\n", "")


def test_a_misspelt_command_is_corrected(run):
    code, _, err = run("compres", "x")
    assert code == 2
    assert "Did you mean 'compress'" in err


def test_shell_completion():
    code = "import sys; sys.argv = ['icae-fast']; from icae_fast.cli import main; main()"
    for words, expected in (("icae-fast res", ["restore"]), ("icae-fast ask --te", ["--temperature"])):
        completed = run_python(
            code, _ICAE_FAST_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))
        )
        assert completed.stdout.split() == expected, completed.stderr
