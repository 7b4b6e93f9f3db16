"""Disks of a test's own: a small one that can be full, and one that is read-only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[2]
_COMMAND = 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"'


def run_on_small_disk(folder, code):
    """Run Python code with `folder`, which it finds in `sys.argv[1]`, as a disk of 4 MB that only it can see.

    The process is root in a namespace of its own, so it may `mount -o remount,ro`. It returns what the code prints.
    """
    if shutil.which("unshare") is None:
        pytest.skip("mounting a disk needs Linux' unshare")
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this machine forbids namespaces of users, which mounting a disk needs")
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join([str(_TESTS.parent), str(_TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*namespace, "sh", "-c", _COMMAND, str(folder), sys.executable, "-c", code, str(folder)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
