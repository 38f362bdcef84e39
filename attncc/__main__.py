"""`python -m attncc` is `attncc`."""

from attncc.cli import main

if __name__ == "__main__":  # worker processes import this file too
    main(prog_name="attncc")
