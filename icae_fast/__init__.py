from icae_fast.ops import backend_of
