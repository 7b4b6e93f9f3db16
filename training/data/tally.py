"""Counting and logging of rows that could not be used, or only in part."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

log = logging.getLogger(__name__)

LOGGED_PER_CAUSE = 20


class Tally:
    """Counts by cause, with a log line for the first rows of each cause.

    Args:
        counts: initial counts, default none.
        quiet: count without logging; for all processes of a run but one.

    Attributes:
        counts: rows of each cause.
    """

    def __init__(self, counts: Mapping[str, int] | None = None, *, quiet: bool = False) -> None:
        self.counts: Counter[str] = Counter(counts or {})
        self.quiet = quiet
        self._logged: Counter[str] = Counter()

    def add(self, cause: str, origin: str, detail: str = "") -> None:
        """Count one row.

        Args:
            cause: one of a few fixed sentences, such as "skipped: not JSON".
            origin: provenance of the row: "books.jsonl:17".
            detail: details of this row, only for the log.
        """
        self.counts[cause] += 1
        if self.quiet or self._logged[cause] > LOGGED_PER_CAUSE:
            return
        self._logged[cause] += 1
        if self._logged[cause] > LOGGED_PER_CAUSE:
            log.warning("%s: more such rows are counted, not listed", cause)
        else:
            log.warning("%s: %s%s", origin, cause, f" ({detail})" if detail else "")
