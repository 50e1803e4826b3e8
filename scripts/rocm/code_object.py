"""What AMD's code objects say of their kernels: registers, spills, scratch, LDS. Pure Python, no tools of LLVM."""

import dataclasses
import struct
from typing import Any

AMDGPU = 224  # e_machine
AMDGPU_METADATA = 32  # the note that holds it, as MessagePack
NOTES = 7  # sh_type

REGISTERS = 512  # of a lane, vector and accumulation together, gfx90a and later
MOST_WAVES = 8  # of a SIMD
SIMDS = 4  # of a compute unit
LDS = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}
"""Bytes of a compute unit, and the most that a workgroup can have."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel's resources. `vgpr` counts accumulation registers too; spills are counted in registers."""

    name: str
    vgpr: int
    sgpr: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int  # bytes a lane
    threads: int
    lds: int  # bytes

    def waves(self, arch: str) -> float:
        """Waves that a SIMD can hold at once, by registers and LDS."""
        per_group = max(1, self.threads // 64)
        by_registers = min(MOST_WAVES, REGISTERS // max(8, -(-self.vgpr // 8) * 8)) * SIMDS // per_group
        by_lds = LDS[arch] // self.lds if self.lds else by_registers
        return min(MOST_WAVES, min(by_registers, by_lds) * per_group / SIMDS)


def kernels(elf: bytes) -> list[Kernel]:
    """Raises ValueError for what is no AMD code object."""
    return [
        Kernel(
            name=kernel[".name"],
            vgpr=kernel[".vgpr_count"],
            sgpr=kernel[".sgpr_count"],
            vgpr_spills=kernel[".vgpr_spill_count"],
            sgpr_spills=kernel[".sgpr_spill_count"],
            scratch=kernel[".private_segment_fixed_size"],
            threads=kernel[".max_flat_workgroup_size"],
            lds=kernel[".group_segment_fixed_size"],
        )
        for kernel in metadata(elf)["amdhsa.kernels"]
    ]


def metadata(elf: bytes) -> dict:
    if elf[:4] != b"\x7fELF" or struct.unpack_from("<H", elf, 18)[0] != AMDGPU:
        raise ValueError("not an AMD code object")
    (sections,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    for i in range(count):
        header = sections + i * size
        if struct.unpack_from("<I", elf, header + 4)[0] != NOTES:
            continue
        at, length = struct.unpack_from("<QQ", elf, header + 24)
        end = at + length
        while at < end:
            name_size, value_size, kind = struct.unpack_from("<III", elf, at)
            name, value = at + 12, at + 12 + (name_size + 3 & ~3)
            if kind == AMDGPU_METADATA and elf[name : name + 6] == b"AMDGPU":
                return unpack(elf[value : value + value_size])
            at = value + (value_size + 3 & ~3)
    raise ValueError("a code object without metadata")


_FIXED = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_FIXED |= {0xCA: ">f", 0xCB: ">d"}
_SIZES = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}


def unpack(data: bytes) -> Any:
    """One MessagePack value: as much of the format as the metadata uses."""
    return _unpack(data, 0)[0]


def _unpack(data: bytes, at: int):
    kind = data[at]
    at += 1
    if kind <= 0x7F:
        return kind, at
    if kind >= 0xE0:
        return kind - 256, at
    if kind == 0xC0:
        return None, at
    if kind in (0xC2, 0xC3):
        return kind == 0xC3, at
    if kind in _FIXED:
        return struct.unpack_from(_FIXED[kind], data, at)[0], at + struct.calcsize(_FIXED[kind])
    if kind <= 0x8F:
        return _map(data, at, kind & 15)
    if kind <= 0x9F:
        return _list(data, at, kind & 15)
    if kind <= 0xBF:
        return _text(data, at, kind & 31)
    if kind not in _SIZES:
        raise ValueError(f"MessagePack type {kind:#x} is none that metadata uses")
    (size,) = struct.unpack_from(_SIZES[kind], data, at)
    at += struct.calcsize(_SIZES[kind])
    read = _text if kind <= 0xDB else _list if kind <= 0xDD else _map
    return read(data, at, size)


def _text(data, at, size):
    return data[at : at + size].decode(), at + size


def _list(data, at, size):
    values = []
    for _ in range(size):
        value, at = _unpack(data, at)
        values.append(value)
    return values, at


def _map(data, at, size):
    values, at = _list(data, at, 2 * size)
    return dict(zip(values[::2], values[1::2], strict=True)), at
