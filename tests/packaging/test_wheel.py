"""The wheel, built from the sdist: one import name, its data, and no clash with a user's own folders."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from helpers.build import ROOT

SOURCES = ("icae_fast", "training", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILT = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
# The wheel is built without C++, so that it takes seconds.
ENVIRONMENT = os.environ | {"ICAE_FAST_BUILD": "0", "ICAE_FAST_REQUIRE": "reference", "PYTHONPATH": ""}

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


def command(*arguments, folder):
    """Run a command in `folder`; return its stdout and stderr, or fail with them."""
    result = subprocess.run(
        [*map(str, arguments)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout. A copy is built, because setuptools would pack leftovers of `build/`."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name, **({"ignore": BUILT} if copy is shutil.copytree else {}))
    command(sys.executable, "setup.py", "-q", "sdist", folder=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index")
    command(*pip, "-w", folder / "wheels", sdist, folder=folder)
    (path,) = (folder / "wheels").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of a fresh environment with the wheel, where dependencies come from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # A path in a .pth file is searched, but .pth files inside it are not run: an editable install stays out.
    (packages / "dependencies.pth").write_text("\n".join(p for p in sys.path if Path(p).name == "site-packages"))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory):
    """A folder in which a user has packages named like folders of this repository."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("training", "bench", "docs", "examples", "tests"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("OWNER = 'the user'\n")
    return folder


def test_wheel_has_one_import_name_and_its_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"icae_fast"}
    configs = {path.name for path in (ROOT / "training/configs").glob("*.yaml")}
    prefix = "icae_fast/training/configs/"
    assert configs
    assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == configs
    assert {"icae_fast/py.typed", "icae_fast/adapters/smollm2-135m/adapter.safetensors"} <= set(names)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "icae_fast").rglob("*.py")}
    modules |= {"icae_fast/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "training").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_a_users_folders_are_not_shadowed_and_not_imported(python, users_folder):
    script = users_folder / "script.py"
    script.write_text(
        "import sys\n"
        "import icae_fast, icae_fast.training.loop.train, icae_fast.training.evaluation.evaluate, icae_fast.cli\n"
        "assert icae_fast.__file__.startswith(sys.prefix), icae_fast.__file__\n"
        "assert icae_fast.training.__file__.startswith(sys.prefix), icae_fast.training.__file__\n"
        "assert not {'training', 'bench', 'docs', 'examples', 'tests'} & set(sys.modules)\n"
        "import bench, docs, training\n"
        "print(bench.OWNER, docs.OWNER, training.OWNER)\n"
    )
    assert command(python, script, folder=users_folder).endswith("the user the user the user\n")


@pytest.mark.parametrize("launcher", [(), ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")])
def test_training_starts_as_a_module(python, users_folder, launcher):
    told = command(python, *launcher, "-m", "icae_fast.training.pretrain", "--help", folder=users_folder)
    assert "CONFIG" in told.upper()


def test_command_line_and_its_configs(python, users_folder):
    (users_folder / "icae_fast_command.py").write_text(
        "import sys\n"
        "from importlib.metadata import entry_points\n"
        "(command,) = entry_points(group='console_scripts', name='icae-fast')\n"
        "sys.exit(command.load()())\n"
    )
    assert "varlen_attention" in command(python, "icae_fast_command.py", "info", folder=users_folder)
    unknown = subprocess.run(
        [python, "icae_fast_command.py", "pretrain", "no-such-config"],
        cwd=users_folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert unknown.returncode == 2
    assert "smollm2-cpu-pretrain" in unknown.stderr
