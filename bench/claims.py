"""Print the claims of bench/results that do not hold; exit code 1 if there is one. The same as `sgsc bench --claims`.

python -m bench.claims [--json] [--results FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sgsc import cli

from .record import RESULTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 where all claims hold, 1 where one does not, 2 where there are no results."""
    given = sys.argv[1:] if arguments is None else arguments
    return cli.main(["bench", "--claims", "--results", str(RESULTS), *given])


if __name__ == "__main__":
    sys.exit(main())
