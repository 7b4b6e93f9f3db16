"""Faults for tests: work that is cut off, disks that are full or read-only."""
