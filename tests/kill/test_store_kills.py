"""Every writer of stores and memory files, killed at lines and at moments: nothing that was there is lost.

`ICAE_FAST_KILLS` is the number of kills of each writer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("store_kills.py")
WRITERS = (
    "put", "delete", "clean", "rebuild", "rebuild-damaged", "compress", "command-store", "command-files",
)  # fmt: skip


@pytest.mark.kill
@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_of_stores_loses_nothing(writer, tmp_path, capsys):
    kills = int(os.environ.get("ICAE_FAST_KILLS", "6"))
    path = os.pathsep.join([*(str(SCRIPT.parents[n]) for n in (2, 1)), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), writer, str(kills), str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{writer}: {counts['kills']} kills, {len(counts['failures'])} failures", end=" ")
    assert counts["failures"] == []
    assert counts["kills"] == kills
