"""The baseline, the measuring tools and `icae-fast bench`."""
