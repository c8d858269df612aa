"""`python -m frontalis` is the command line."""

from frontalis.cli import main

if __name__ == "__main__":
    main()
