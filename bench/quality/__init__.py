"""Accuracy of slots against the baseline."""
