"""Triton kernels without a GPU: compile checks, and a cost model."""
