"""An extension that was built against another torch than the installed one is noticed when the package is imported."""

import importlib.machinery
import json
import shutil
import zipfile

import pytest
import torch

from helpers.build import ROOT, run_python

EMPTY_MODULE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
WHEEL = ("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")
# What the empty extension is told to be when it was loaded.
LOADED = "the extension was built without varlen_attention"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of an installed wheel whose extension is built by setup.py from an empty module."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    sources = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_C_build.json")
    for name in ("icae_fast", "training"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    (sources / "csrc").mkdir()
    (sources / "csrc" / "module.cpp").write_text(EMPTY_MODULE)
    built = run_python(*WHEEL, "-w", str(sources / "wheels"), str(sources), ICAE_FAST_BUILD="1", MAX_JOBS="1")
    assert built.returncode == 0, built.stderr[-3000:]
    (path,) = (sources / "wheels").glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def ops(folder, **environment):
    script = (
        "import sys; sys.path.insert(0, '.'); import icae_fast.ops as ops; print(ops.__file__, ops.EXTENSION_ERROR)"
    )
    return run_python("-W", "always", "-c", script, folder=folder, **environment)


def test_the_wheel_records_the_torch_that_it_was_built_against(installed):
    record = json.loads((installed / "icae_fast" / "_C_build.json").read_text())
    assert record == {"torch": torch.__version__}
    result = ops(installed, ICAE_FAST_REQUIRE="")
    path, reason = result.stdout.split(maxsplit=1)
    assert path == str(installed / "icae_fast/ops/__init__.py"), result.stderr
    assert reason.startswith(LOADED)


@pytest.mark.parametrize("version", ["1.13.1", "2.1.0+cu118", "99.0.0"])
def test_another_torch_is_told_in_a_sentence(installed, tmp_path, version):
    shutil.copytree(installed / "icae_fast", tmp_path / "icae_fast")
    (tmp_path / "icae_fast" / "_C_build.json").write_text(json.dumps({"torch": version}))
    sentence = (
        f"the C++ kernels were built against torch {version} and torch {torch.__version__} is installed; reinstall"
    )
    result = ops(tmp_path, ICAE_FAST_REQUIRE="")
    assert result.returncode == 0, result.stderr
    assert sentence in result.stdout
    assert f"RuntimeWarning: icae_fast runs on its slow plain-torch reference: {sentence}" in result.stderr
    required = ops(tmp_path, ICAE_FAST_REQUIRE="cpp")
    assert required.returncode != 0
    assert f"BackendError: ICAE_FAST_REQUIRE=cpp, but {sentence}" in required.stderr


def test_an_extension_that_would_not_load_is_not_loaded(installed, tmp_path):
    """A file of garbage in the place of the extension, as undefined symbols would be, is never opened."""
    shutil.copytree(installed / "icae_fast", tmp_path / "icae_fast")
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        for path in (tmp_path / "icae_fast").glob(f"_C{suffix}"):
            path.write_text("garbage")
    assert "file too short" in ops(tmp_path, ICAE_FAST_REQUIRE="").stdout
    (tmp_path / "icae_fast" / "_C_build.json").write_text('{"torch": "2.1.0"}')
    assert "built against torch 2.1.0" in ops(tmp_path, ICAE_FAST_REQUIRE="").stdout


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "{}"])
def test_a_damaged_record_changes_nothing(installed, tmp_path, text):
    shutil.copytree(installed / "icae_fast", tmp_path / "icae_fast")
    (tmp_path / "icae_fast" / "_C_build.json").write_text(text)
    assert LOADED in ops(tmp_path, ICAE_FAST_REQUIRE="").stdout


def test_an_extension_that_lacks_ops_is_refused_where_it_is_required(installed):
    required = ops(installed, ICAE_FAST_REQUIRE="cpp")
    assert required.returncode != 0
    assert f"BackendError: ICAE_FAST_REQUIRE=cpp, but {LOADED}" in required.stderr
