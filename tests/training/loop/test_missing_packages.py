"""Without the packages of `icae-fast[train]`, training is one line that names the command."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HIDE = """
import sys
class Hide:
    def __init__(self, finder, name): self.finder, self.name = finder, name
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == self.name else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path = [Hide(finder, "{package}") for finder in sys.meta_path]
from icae_fast.training.pretrain import main
main(["smollm2-cpu-pretrain"])
"""


@pytest.mark.parametrize("package", ["accelerate", "datasets"])
def test_a_missing_package_is_one_line(package):
    script = HIDE.format(package=package)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    error = ran.stderr[ran.stderr.index("icae-fast: error:") :]
    assert package in error
    assert "pip install 'icae-fast[train]'" in " ".join(error.split())
