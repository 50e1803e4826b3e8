"""The type checks of the test run: each function's is made when it is first called.

beartype takes a millisecond to make one, and each test process decorates thousands of functions to call some hundreds.
"""

import functools
from collections.abc import Callable

from beartype import beartype


def checked(function: Callable) -> Callable:
    """jaxtyping's type checker: beartype's, from the first call on."""
    made = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal made
        if made is None:
            made = beartype(function)
        return made(*args, **kwargs)

    return call
