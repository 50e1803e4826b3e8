"""`python -m gdnjax.serving.server`: the same as `gdnjax serve`."""

from gdnjax.cli import interrupt

interrupt.expected()

from gdnjax.cli import serve  # noqa: E402
from gdnjax.cli.command import run_as_process  # noqa: E402

run_as_process(lambda: serve.main(command="python -m gdnjax.serving.server"))
