"""`python -m cake` is `cake-cli`."""

from cake.cli import main

main(prog_name="cake-cli")
