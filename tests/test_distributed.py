"""How a process joins others: what cannot be is named before anything waits for anybody."""

import pytest

from gdnjax import distributed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host", 2, 0), "the coordinator's address is 'host'; allowed: HOST:PORT"),
        (("host:1", 0, 0), "the number of processes is 0; allowed: 1 and more"),
        (("host:1", None, -1), "the process id is -1; allowed: 0 and more"),
        (("host:1", 2, 2), "the process id is 2, of 2 processes; allowed: 0 to 1"),
    ],
)
def test_numbers_that_cannot_be_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*arguments)


def test_joining_after_jax_has_begun_raises():
    import jax

    jax.devices()
    with pytest.raises(RuntimeError, match="must be called before"):
        distributed.initialize("127.0.0.1:9", 2, 1)
