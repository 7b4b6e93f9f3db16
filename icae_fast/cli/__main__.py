"""`python -m icae_fast.cli`, the same as `icae-fast`."""

from icae_fast.cli import main

main()
