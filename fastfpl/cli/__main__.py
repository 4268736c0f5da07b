"""`python -m fastfpl.cli`."""

from fastfpl.cli import main

main()
