"""A kernel's code and descriptor in an AMD code object."""

import dataclasses
import struct
from collections.abc import Iterator

_SYMBOL_TABLES = (2, 11)  # sh_type of SYMTAB and DYNSYM


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """What the hardware is told of a kernel before its first instruction.

    `lds` and `scratch` are bytes, `kernarg` the bytes of its arguments; `group_ids` says for x, y and z whether a
    scalar register holds the workgroup's number, behind the first `user_sgprs`; `preload` is not 0 where arguments may
    come in registers. `properties` are KERNEL_CODE_PROPERTIES and `float_mode` is FLOAT_MODE, as LLVM's "User Guide for
    AMDGPU Backend" has them.
    """

    lds: int
    scratch: int
    kernarg: int
    user_sgprs: int
    group_ids: tuple[bool, bool, bool]
    properties: int
    preload: int
    float_mode: int


def kernel(elf: bytes, name: str) -> tuple[bytes, int, Descriptor]:
    """(code, its address, descriptor) of one kernel. Raises ValueError where there is none of this name."""
    code = descriptor = None
    for symbol, place, address, size in _symbols(elf):
        if symbol == name and size:
            code = elf[place : place + size], address
        elif symbol == f"{name}.kd":
            descriptor = _descriptor(elf, place)
    if code is None or descriptor is None:
        raise ValueError(f"no kernel {name} in this code object")
    return *code, descriptor


def _symbols(elf: bytes) -> Iterator[tuple[str, int, int, int]]:
    """(name, place in the file, address, bytes)."""
    (sections,) = struct.unpack_from("<Q", elf, 40)
    entry, count = struct.unpack_from("<HH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, sections + i * entry) for i in range(count)]
    for _, kind, _, _, offset, size, link, _, _, each in headers:
        if kind not in _SYMBOL_TABLES:
            continue
        strings = headers[link][4]
        for at in range(offset, offset + size, each):
            name, _, _, section, value, length = struct.unpack_from("<IBBHQQ", elf, at)
            if 0 < section < count:
                end = elf.index(b"\0", strings + name)
                place = headers[section][4] + value - headers[section][3]
                yield elf[strings + name : end].decode(), place, value, length


def _descriptor(elf: bytes, at: int) -> Descriptor:
    lds, scratch, kernarg = struct.unpack_from("<III", elf, at)
    modes, resources = struct.unpack_from("<II", elf, at + 48)
    properties, preload = struct.unpack_from("<HH", elf, at + 56)
    return Descriptor(
        lds=lds,
        scratch=scratch,
        kernarg=kernarg,
        user_sgprs=resources >> 1 & 31,
        group_ids=(bool(resources >> 7 & 1), bool(resources >> 8 & 1), bool(resources >> 9 & 1)),
        properties=properties,
        preload=preload,
        float_mode=modes >> 12 & 255,
    )
