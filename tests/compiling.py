"""How programs are compiled where tests compile much and run little."""

import contextlib
import functools
from unittest import mock

import jax
from jax._src import compiler

IN_ONE_PIECE = ("xla_cpu_parallel_codegen_split_count", 1)
"""Of modules: other test processes have the cores that their parts would take."""

WITHOUT_MLIR = ("xla_cpu_use_fusion_emitters", False)
"""Of fusions, which are written as LLVM's at once. XLA of jax 0.12 has the option no more."""


@functools.cache
def known(option: tuple[str, bool | int]) -> bool:
    """Whether this version of XLA has the option."""
    try:
        jax.jit(lambda x: x, compiler_options=dict([option])).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@contextlib.contextmanager
def compiled_with(*options: tuple[str, bool | int]):
    """LLVM optimises nothing, and XLA has the options that it knows; on a CPU. May stand within itself."""
    if jax.default_backend() != "cpu":
        yield
        return
    options_of, before = compiler.get_compile_options, jax.config.read("jax_disable_most_optimizations")
    chosen = [*filter(known, options)]

    def options_for(*arguments, **keywords):
        found = options_of(*arguments, **keywords)
        names = {name for name, _ in found.env_option_overrides}
        found.env_option_overrides = [*found.env_option_overrides, *(one for one in chosen if one[0] not in names)]
        return found

    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with mock.patch.object(compiler, "get_compile_options", options_for):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
