"""Tolerances of fp32 results."""

# For the same rows computed by themselves and among others. The summation order of torch's products may depend on the
# number of rows; with MKL on Intel CPUs, slots and logits of the tiny models differed by 1.8e-5.
CLOSE_FP32 = {"rtol": 1e-5, "atol": 3e-5}
