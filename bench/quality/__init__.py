"""Accuracy of slots: in bf16, and quantised."""
