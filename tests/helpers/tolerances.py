"""How close results in fp32 have to be."""

# Of the same rows computed alone and among others: torch's products may add up in another order for another number of
# rows, as MKL's do on Intel's CPUs, where slots and logits of the tiny models were seen to differ by 1.8e-5.
CLOSE_FP32 = {"rtol": 1e-5, "atol": 3e-5}
