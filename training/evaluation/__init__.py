"""Evaluate adapters as the paper does: restoration, continuation and instructions (`icae-fast eval`).

* `evaluate`: runs measurements and writes their results.
* `subject`, `workbench`, `cache`: adapters, and what all measurements of a run share.
* `texts`: measurements on held-out texts.
* `instructions`: measurements on prompts about texts, and the judge.
* `result`, `report`, `plots`, `differences`, `measures`: results, their files, and metrics.

Source: Ge et al., arXiv 2307.06945, sections 3.2 to 3.4 and appendices.
"""
