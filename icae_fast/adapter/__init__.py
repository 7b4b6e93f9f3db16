"""The LoRA adapter, applied on the fly or merged into second weights."""
