"""`python -m attncc` is `attncc`."""

from attncc.cli import main

main(prog_name="attncc")
