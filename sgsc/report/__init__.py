"""What a compression or a search tells a person: strict JSON, tables for the terminal, one self-contained page.

All three read one dictionary, the content of `report.json`. Every key is optional: what is absent or null reads "not
recorded", NaN and infinity read "not a number", and neither stops a report from being written. Sizes are bytes;
accuracies, shares, bounds and the tolerance are fractions of 1, shown in percent; times are seconds.

The page asks nothing of the network and runs no script, and its content-security policy forbids both. Everything in
the dictionary, and in the reports of other runs, is untrusted text: escaped in the page, never markup in the terminal,
stripped of control characters.
"""

from __future__ import annotations

from .beside import runs_beside
from .page import write_html
from .search_page import search_summary, write_search_html
from .strategies_page import strategies_summary, write_strategies_html
from .strict import to_json
from .terminal import summary

__all__ = [
    "runs_beside",
    "search_summary",
    "strategies_summary",
    "summary",
    "to_json",
    "write_html",
    "write_search_html",
    "write_strategies_html",
]
