"""``python -m nucseg`` is the ``nucseg`` command."""

from nucseg.cli import main

main()
