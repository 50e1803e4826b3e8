"""`python -m gdnjax`: the console script."""

from gdnjax.cli.main import run

run()
