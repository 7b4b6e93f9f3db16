"""Fuzzing of every parser of outside bytes: `make fuzz`. `targets.py` lists the parsers."""

from pathlib import Path

CORPORA = Path(__file__).parent / "corpora"
