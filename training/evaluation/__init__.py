"""Measures adapters the way the paper does: restoration, continuation and instructions (`icae-fast eval`).

Source: Ge et al., arXiv 2307.06945, sections 3.2 to 3.4 and appendices.
"""
