"""The ``nucseg`` command: rerun the paper, or find out which patches of your own images to outline."""

from __future__ import annotations

import sys
import warnings

from nucseg import messages
from nucseg.commands import machines, paper, slides  # each registers its commands
from nucseg.commands.options import app
from nucseg.paper import BEYOND, TABLES

__all__ = ["app", "machines", "main", "paper", "slides"]


def _spread(words: list[str]) -> list[str]:
    """Read ``--table 1 2`` as ``--table 1 --table 2``; no other option has a table's number behind its value."""
    tables, spread = (*"123456", *TABLES, *BEYOND), []
    for word in words:
        option = spread[-2] if len(spread) > 1 else ""
        one_more = option in ("--table", "-t") and word.upper() in tables
        spread += [option, word] if one_more else [word]
    return spread


def main() -> None:
    """Run the command; an expected error or a warning of ours is one message, anything else as Python prints it."""
    warnings.formatwarning = messages.one_line(warnings.formatwarning)
    sys.argv[1:] = _spread(sys.argv[1:])
    try:
        app()
    except Exception as error:
        if messages.is_expected(error):
            sys.exit(f"nucseg: {error}")
        raise


if __name__ == "__main__":
    main()
