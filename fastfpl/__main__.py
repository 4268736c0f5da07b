"""`python -m fastfpl`, which is what torchrun starts: the command line."""

from fastfpl.cli.entry import main

if __name__ == "__main__":
    main()
