"""`icae_fast.sampling.GenerationOptions`, the documented name of `icae_fast.generation.sampling.GenerationOptions`."""

from icae_fast.generation.sampling import GenerationOptions

__all__ = ["GenerationOptions"]
