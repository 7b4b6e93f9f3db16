"""Compile checks of Triton kernels and their cost model."""
