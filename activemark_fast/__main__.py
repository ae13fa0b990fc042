"""`python -m activemark_fast`: the same as the command `activemark`."""

from activemark_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
