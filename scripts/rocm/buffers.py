"""Arrays that AMD's buffer instructions do not reach, found in the LLVM IR that XLA writes.

A buffer instruction has an offset of 32 bits, and the resource that Triton makes for it ends 2^31 - 2 bytes behind its
base. Triton takes these instructions where it finds that offsets are small. It errs where an index that was loaded,
unbounded, times a large stride overflows the 64 bits that it reckons with: then the offset is cut, and in a pool of
more than 4 GiB another place is read or written. `launch.bounded` of the package prevents it; this finds where it did
not.
"""

import re
from collections.abc import Collection, Iterator

REACH = (1 << 31) - 1
"""Bytes behind its base that a resource can have."""

_KERNEL = re.compile(r"^define amdgpu_kernel void @([\w.$]+)\((.*?)\) #\d+.*?^}", re.MULTILINE | re.DOTALL)
_ARGUMENT = re.compile(r"dereferenceable\((\d+)\) (%[\w.]+)")
_RESOURCE = re.compile(r"make\.buffer\.rsrc\.p8\.p1(?:\.\w+)?\(ptr addrspace\(1\) (%[\w.]+),")
_MADE = re.compile(r"\bcall\b.*\.make\.buffer\.rsrc\.")
_OTHERWISE = re.compile(r"addrspace\(7\)|@llvm\.amdgcn\.(?:raw\.|struct\.|s\.)buffer\.")
_POINTER = re.compile(r"^ *(%[\w.]+) = (getelementptr|phi ptr|select|addrspacecast|bitcast)\b(.*)$", re.MULTILINE)
_INCOMING = re.compile(r"\[ (%[\w.]+),")
_OPERAND = re.compile(r"ptr(?: addrspace\(\d\))? (%[\w.]+)")


def kernels(ir: str) -> set[str]:
    """The names of those that `reached` looks at."""
    return {kernel[1] for kernel in _KERNEL.finditer(ir)}


def reached(ir: str) -> Iterator[tuple[str, int | None]]:
    """(kernel, bytes) of every array of `ir` that a kernel reaches through a resource; None: its size is not there."""
    for kernel in _KERNEL.finditer(ir):
        sizes = {name: int(size) for size, name in _ARGUMENT.findall(kernel[2])}
        derived = {
            name: (_INCOMING if what.startswith("phi") else _OPERAND).findall(rest)
            for name, what, rest in _POINTER.findall(kernel[0])
        }
        bases = set(_RESOURCE.findall(kernel[0]))
        for origin in sorted(set().union(*(_origins(base, derived) for base in bases))):
            yield kernel[1], sizes.get(origin)


def faults(ir: str, own: Collection[str]) -> Iterator[tuple[str, str]]:
    """(kernel, fault) for each array that is larger than a resource can be, or may be.

    It is strict: a small offset into a large array would do no harm, and is refused, too. Sizes must be known in the
    kernels that are named in `own`. XLA's kernels that sum over ranks are given other devices' buffers, of activations,
    without their sizes. IR of which only a part is understood is a fault, too: what is not read may be anything.
    """
    made, read = len(_MADE.findall(ir)), sum(len(_RESOURCE.findall(kernel[0])) for kernel in _KERNEL.finditer(ir))
    if made != read or _OTHERWISE.search(ir):
        yield ", ".join(sorted(kernels(ir))) or "no kernel", "buffer resources of a form that this audit does not read"
    for kernel, size in reached(ir):
        if size is None and kernel in own:
            yield kernel, "buffer instructions into an array of unknown size"
        elif size is not None and size > REACH:
            yield kernel, f"buffer instructions into an array of {size} bytes; they reach {REACH}"


def _origins(pointer: str, derived: dict[str, list[str]]) -> set[str]:
    """The arguments that a pointer may have come from, and pointers whose origin is not seen."""
    origins, seen, todo = set(), set(), [pointer]
    while todo:
        pointer = todo.pop()
        if pointer in seen:
            continue
        seen.add(pointer)
        todo += derived.get(pointer, [])
        if not derived.get(pointer):
            origins.add(pointer)
    return origins
