"""From bytes to instructions. All that is known of tinygrad's decoder is known here.

The decoder of tinygrad 0.14.0 is made from AMD's own description of its instructions. It is no public interface, so the
version is fixed in pyproject.toml. It gives a format and the fields of an instruction; what they mean is said here.
"""

import functools
from collections.abc import Callable
from typing import Any

from rocm.emulator.instruction import DWORD, VCC, Instruction, Operand

LONGEST = 16
"""Bytes of an instruction."""

_RENAMED = {"v_accvgpr_read": "v_accvgpr_read_b32", "v_accvgpr_write": "v_accvgpr_write_b32"}
_INLINE_FLOATS = {
    240: 0x3F000000,
    241: 0xBF000000,
    242: 0x3F800000,
    243: 0xBF800000,
    244: 0x40000000,
    245: 0xC0000000,
    246: 0x40800000,
    247: 0xC0800000,
    248: 0x3E22F983,
}
_TO_SCALAR = ("v_readfirstlane_b32", "v_readlane_b32")
_CARRY_OUT = ("v_add_co_u32", "v_sub_co_u32", "v_subrev_co_u32")
_CARRY_BOTH = ("v_addc_co_u32", "v_subb_co_u32", "v_subbrev_co_u32")
_VCC = Operand("s", VCC, 2)
_DEFAULTS = {
    "row_mask": 15,
    "bank_mask": 15,
    "dst_sel": DWORD,
    "src0_sel": DWORD,
    "src1_sel": DWORD,
    "op_sel_hi": -1,
    "vmcnt": 63,
    "expcnt": 7,
    "lgkmcnt": 15,
    "dpp_ctrl": -1,
}
"""Modifiers with these values are left out, and all others that are 0. -1: always there."""

# Filled by `decode_one`. No encoding is the beginning of a longer one, so each is found by its own bytes.
_known: dict[bytes, Instruction] = {}


class UnknownInstruction(NotImplementedError):
    """Bytes that are no instruction of these chips, or one that the decoder does not know."""


def decode(code: bytes, address: int = 0) -> list[Instruction]:
    """All instructions of `code`, which begins at `address`."""
    found, at = [], 0
    while at < len(code):
        one = decode_one(code[at : at + LONGEST])
        found.append(_placed(one, address + at))
        at += one.size
    return found


def decode_one(data: bytes) -> Instruction:
    """The instruction that `data` begins with, at address 0."""
    for size in (4, 8, 12, 16):
        if found := _known.get(data[:size]):
            return found
    found = _decode(data)
    _known[data[: found.size]] = found
    return found


def _placed(one: Instruction, address: int) -> Instruction:
    return Instruction(one.name, one.encoding, one.operands, one.modifiers, address, one.size)


def _decode(data: bytes) -> Instruction:
    inst: Any = _tinygrad()(data + bytes(LONGEST))
    family, _, variant = type(inst).__name__.partition("_")
    name, encoding = str(inst.op.name).lower(), ""
    if name.endswith(("_e32", "_e64")):
        name, encoding = name[:-4], name[-3:]
    elif family == "VOP3SD":
        encoding = "e64"
    if variant == "DPP16":
        encoding = "dpp"
    elif variant.startswith("SDWA"):
        encoding = "sdwa"
    name = _RENAMED.get(name, name)
    read = _FAMILIES.get(family)
    if read is None:
        raise UnknownInstruction(f"{name}: no meaning is known of format {family}")
    operands, modifiers = read(_Fields(inst, name, encoding))
    said = tuple((key, value) for key, value in modifiers.items() if value != _DEFAULTS.get(key, 0))
    return Instruction(name, encoding, tuple(operands), said, size=inst.size())


@functools.cache
def _tinygrad() -> Callable[[bytes], Any]:
    """Imported when first needed: only who emulates needs it."""
    from tinygrad.renderer.amd import decode_inst

    def decode_bytes(data: bytes):
        try:
            return decode_inst(data, "cdna")
        except ValueError as error:
            raise UnknownInstruction(str(error)) from None

    return decode_bytes


class _Fields:
    """The fields of one instruction as numbers, and operands made of them."""

    def __init__(self, inst, name: str, encoding: str):
        self.name, self.encoding, self.family = name, encoding, type(inst).__name__
        self._values = {key: inst._raw >> field.lo & field.mask for key, field in inst._fields}
        self._counts = inst.op_regs

    def __getitem__(self, key: str) -> int:
        return self._values[key]

    def has(self, key: str) -> bool:
        """Whether the instruction has this operand."""
        return key in self._counts

    def get(self, key: str) -> int:
        return self._values.get(key, 0)

    def count(self, key: str) -> int:
        return self._counts.get(key, 1)

    def signed(self, key: str, bits: int) -> int:
        value = self[key]
        return value - (1 << bits) if value >> bits - 1 else value

    def vector(self, key: str, *, accumulation: int = 0, count: int | None = None) -> Operand:
        return Operand("a" if accumulation else "v", self[key] & 255, count or self.count(key))

    def scalar(self, key: str, count: int | None = None, align: int = 1) -> Operand:
        return Operand("s", align * self[key], count or self.count(key))

    def source(self, key: str, count: int | None = None, **modifiers) -> Operand:
        """What any source can be: 9 bits name a register or a constant."""
        code, count = self[key], count or self.count(key)
        if code >= 256:
            return Operand("v", code - 256, count, **modifiers)
        if code < 128:
            return Operand("s", code, count, **modifiers)
        if code <= 208:
            return Operand("integer", value=code - 128 if code <= 192 else 192 - code, **modifiers)
        if code in _INLINE_FLOATS:
            return Operand("float", value=_INLINE_FLOATS[code], **modifiers)
        if code == 253:
            return Operand("scc", **modifiers)
        if code == 255:
            return Operand("literal", value=self["literal"], **modifiers)
        return Operand("special", code, **modifiers)


Read = tuple[list[Operand], dict[str, int]]


def _sop(f: _Fields) -> Read:
    """SOP1, SOP2, SOPC."""
    operands = [f.scalar("sdst")] if f.has("sdst") else []
    return operands + [f.source(key) for key in ("ssrc0", "ssrc1") if f.has(key)], {}


def _sopk(f: _Fields) -> Read:
    operands = [f.scalar("sdst")] if f.has("sdst") else []
    operands.append(Operand("integer", value=f.signed("simm16", 16)))
    if "_LIT" in f.family:
        operands.append(Operand("literal", value=f["literal"]))
    return operands, {}


def _sopp(f: _Fields) -> Read:
    value = f["simm16"]
    if f.name == "s_waitcnt":
        return [], {"vmcnt": value & 15 | value >> 10 & 48, "expcnt": value >> 4 & 7, "lgkmcnt": value >> 8 & 15}
    if f.name in ("s_endpgm", "s_barrier", "s_code_end"):
        return [], {}
    return [Operand("integer", value=f.signed("simm16", 16))], {}


def _smem(f: _Fields) -> Read:
    operands = [f.scalar("sdata"), f.scalar("sbase", align=2)] if f.has("sdata") else []
    if f["soffset_en"]:
        operands.append(f.scalar("soffset"))
    return operands, {"offset": f.signed("offset", 21) if f["imm"] else 0, "glc": f["glc"]}


def _vop1(f: _Fields) -> Read:
    if not f.has("vdst"):
        return [], {}
    to = f.scalar("vdst") if f.name in _TO_SCALAR else f.vector("vdst")
    sources, modifiers = _sources(f, ["src0"])
    if f.name == "v_accvgpr_mov_b32":
        return [Operand("a", to.index), Operand("a", sources[0].index)], modifiers
    return [to, *sources], modifiers


def _vop2(f: _Fields) -> Read:
    sources, modifiers = _sources(f, ["src0", "vsrc1"])
    operands = [f.vector("vdst")]
    if f.name in _CARRY_OUT + _CARRY_BOTH:
        operands.append(_VCC)
    operands += sources
    if f.name == "v_cndmask_b32" or f.name in _CARRY_BOTH:
        operands.append(_VCC)
    if f.name.startswith("v_fmamk"):
        operands.insert(2, Operand("literal", value=f["literal"]))
    elif f.name.startswith("v_fmaak"):
        operands.append(Operand("literal", value=f["literal"]))
    return operands, modifiers


def _vopc(f: _Fields) -> Read:
    sources, modifiers = _sources(f, ["src0", "vsrc1"])
    to = f.scalar("sdst", 2) if f.get("sd") else _VCC
    return [to, *sources], modifiers


def _sources(f: _Fields, keys: list[str]) -> Read:
    """The sources of VOP1, VOP2 and VOPC, plain, with lanes moved (DPP) or by parts (SDWA)."""
    keys = keys if f.has(keys[-1]) else keys[:1]
    if f.encoding not in ("dpp", "sdwa"):
        return [f.source(key) if key == "src0" else f.vector(key) for key in keys], {}
    sources = []
    for k, key in enumerate(keys):
        field = "vsrc0" if key == "src0" else key
        scalar = f.get(f"s{k}")
        sources.append(
            Operand(
                "s" if scalar else "v",
                f[field],
                f.count(key),
                negate=bool(f.get(f"src{k}_neg")),
                absolute=bool(f.get(f"src{k}_abs")),
                sext=bool(f.get(f"src{k}_sext")),
            )
        )
    if f.encoding == "dpp":
        modifiers = {"dpp_ctrl": f["dpp"], "row_mask": f["row_mask"], "bank_mask": f["bank_mask"]}
        return sources, modifiers | {"bound_ctrl": f["bc"]}
    modifiers = {f"src{k}_sel": f[f"src{k}_sel"] for k in range(len(keys))}
    modifiers |= {"clamp": f.get("clmp"), "omod": f.get("omod")}
    if f.family.startswith("VOPC"):
        return sources, modifiers
    return sources, {"dst_sel": f["dst_sel"], "dst_unused": f["dst_unused"], **modifiers}


def _vop3(f: _Fields) -> Read:
    """VOP3 and VOP3SD. v_bitop3_b32 has its table of truth where others have their modifiers."""
    keys = [key for key in ("src0", "src1", "src2") if f.has(key)]
    if f.name.startswith("v_bitop3"):
        sources = [f.source(key) for key in keys]
        table = f["omod"] << 6 | f["abs"] << 3 | f["neg"]
        return [f.vector("vdst"), *sources], {"bitop3": table, "op_sel": f["opsel"]}
    sources = [
        f.source(key, negate=bool(f["neg"] >> k & 1), absolute=bool(f.get("abs") >> k & 1))
        for k, key in enumerate(keys)
    ]
    modifiers = {"clamp": f["clmp"], "omod": f["omod"], "op_sel": f.get("opsel")}
    if f.name.startswith("v_cmp") or f.name in _TO_SCALAR:
        return [f.scalar("vdst"), *sources], modifiers
    return [f.vector("vdst"), *([f.scalar("sdst", 2)] if f.has("sdst") else []), *sources], modifiers


def _vop3p(f: _Fields) -> Read:
    """Packed, and on matrix units."""
    keys = [key for key in ("src0", "src1", "src2") if f.has(key)]
    if "MFMA" in f.family or f.name.startswith("v_accvgpr"):
        return _matrix(f, keys)
    every = (1 << len(keys)) - 1
    modifiers = {
        "op_sel": f["opsel"] & every,
        "op_sel_hi": (f["opsel_hi"] | f["opsel_hi2"] << 2) & every,
        "neg_lo": f["neg"] & every,
        "neg_hi": f["neg_hi"] & every,
        "clamp": f["clmp"],
    }
    return [f.vector("vdst"), *(f.source(key) for key in keys)], modifiers


def _matrix(f: _Fields, keys: list[str]) -> Read:
    if f.name.startswith("v_accvgpr"):
        to = f.vector("vdst", accumulation=f.name == "v_accvgpr_write_b32")
        source = f.source("src0") if f.name == "v_accvgpr_write_b32" else f.vector("src0", accumulation=1)
        return [to, source], {}
    operands = [f.vector("vdst", accumulation=f["acc_cd"])]
    for k, key in enumerate(keys):
        accumulation = f["acc_cd"] if key == "src2" else f["acc"] >> k & 1
        operands.append(f.vector(key, accumulation=1) if accumulation and f[key] >= 256 else f.source(key))
    return operands, {key: f[key] for key in ("cbsz", "abid", "blgp")}


def _ds(f: _Fields) -> Read:
    acc = f["acc"]
    operands = [f.vector("vdst", accumulation=acc)] if f.has("vdst") else []
    operands += [f.vector("addr")] if f.has("addr") else []
    # Permutes have their data in a plain register, whatever their result is in.
    data = 0 if "permute" in f.name else acc
    operands += [f.vector(key, accumulation=data) for key in ("data0", "data1") if f.has(key)]
    if "read2" in f.name or "write2" in f.name:
        return operands, {"offset0": f["offset0"], "offset1": f["offset1"], "gds": f["gds"]}
    return operands, {"offset": f["offset1"] << 8 | f["offset0"], "gds": f["gds"]}


def _global(f: _Fields) -> Read:
    base = Operand("off") if f["saddr"] == 127 else f.scalar("saddr", 2)
    address = f.vector("addr", count=2 if base.file == "off" else 1)
    modifiers = {"offset": f.signed("offset", 13), "sc0": f["sc0"], "nt": f["nt"], "sc1": f["sc1"], "sve": f["sve"]}
    data = [f.vector(key, accumulation=f["acc"]) for key in ("vdst", "data") if f.has(key)]
    if "_load_" in f.name:
        return [data[0], address, base], modifiers
    if "_store_" in f.name:
        return [address, data[0], base], modifiers
    raise UnknownInstruction(f"{f.name}: only loads and stores are known")


def _buffer(f: _Fields) -> Read:
    modifiers = {key: f[key] for key in ("offset", "offen", "idxen", "sc0", "nt", "sc1", "lds")}
    if not f.has("vdata"):
        return [], modifiers
    address = f.vector("vaddr", count=f["offen"] + f["idxen"]) if f["offen"] or f["idxen"] else Operand("off")
    data = f.vector("vdata", accumulation=f["acc"])
    return [data, address, f.scalar("srsrc", 4, align=4), f.source("soffset")], modifiers


_FAMILIES: dict[str, Callable[[_Fields], Read]] = {
    "SOP1": _sop,
    "SOP2": _sop,
    "SOPC": _sop,
    "SOPK": _sopk,
    "SOPP": _sopp,
    "SMEM": _smem,
    "VOP1": _vop1,
    "VOP2": _vop2,
    "VOPC": _vopc,
    "VOP3": _vop3,
    "VOP3SD": _vop3,
    "VOP3P": _vop3p,
    "DS": _ds,
    "GLOBAL": _global,
    "MUBUF": _buffer,
}
