"""A process that is forked after an ICAE has computed computes too, with one thread."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icae_fast.backbone import forks
from icae_fast.errors import BackendError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@pytest.mark.parametrize("use", ["used", "unused"])
def test_a_forked_process_computes(use):
    script = Path(__file__).with_name("fork_worker.py")
    done = subprocess.run([sys.executable, script, use], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal" in done.stdout
    assert "it computes with one thread" in done.stdout


def test_a_gpu_of_the_parent_is_refused(monkeypatch):
    monkeypatch.setattr(forks, "_forked", True)
    with pytest.raises(BackendError, match="'spawn' or 'forkserver'"):
        forks.check_process(torch.device("cuda", 0))
