"""`python -m lfm` is `lfm`."""

from lfm.cli import main

if __name__ == "__main__":
    main()
