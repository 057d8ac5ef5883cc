"""``python -m statescan`` is the command ``statescan``."""

from statescan.cli import main

main()
