"""Training ICAE with the package's own kernels."""
