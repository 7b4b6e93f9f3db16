"""`ICAE`, the drop-in module."""
