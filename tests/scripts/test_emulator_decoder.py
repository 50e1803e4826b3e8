"""Bytes to instructions: encodings that XLA's compiler made for gfx942 and gfx950, and a code object around them."""

import itertools
import struct

import pytest
from rocm import emulator
from rocm.emulator import code, decode, objdump
from rocm.emulator.decode import UnknownInstruction, decode_one

from tests.scripts.emulating import asm

# As llvm-objdump 22 names them, but for the way in which modifiers are written.
GOLDEN = [
    ("fa3c3c021e1809ff", "v_add_f32_dpp v30, v30, v30 dpp_ctrl:0x118 bound_ctrl:0x1"),
    ("fa02107e084209af", "v_mov_b32_dpp v8, v8 dpp_ctrl:0x142 row_mask:0xa bound_ctrl:0x1"),
    ("80060238", "v_addc_co_u32_e32 v1, vcc, 0, v3, vcc"),
    ("1f001cd180440200", "v_addc_co_u32_e64 v31, s[0:1], 0, v34, s[0:1]"),
    ("f9360a2604060386", "v_and_b32_sdwa v5, v4, s27 src0_sel:0x3"),
    ("f9363e0017060505", "v_cndmask_b32_sdwa v31, v23, v27, vcc src0_sel:0x5 src1_sel:0x5"),
    ("f90a387e2f060a00", "v_cvt_f32_i32_sdwa v28, sext(v47) src0_sel:0x2"),
    ("270634d2002a46c4", "v_bitop3_b32 v39, s0, v21, v17 bitop3:0x36"),
    ("550869d20ae50100", "v_cvt_scalef32_pk_bf16_fp8 v85, v10, 1.0 op_sel:0x1"),
    ("034035d20000ca03", "v_cvt_scalef32_pk_fp8_f32 v3, s0, v0, 1.0 op_sel:0x8"),
    ("1000e0d118301404", "v_div_scale_f32_e64 v16, s[0:1], s24, s24, v5"),
    ("0100e2d101132e04", "v_div_fmas_f32_e64 v1, v1, v9, v11"),
    ("1a29402e08e302b1", "v_fmamk_f32_e32 v32, v26, 0xb102e308, v20"),
    ("142d2c30daaa2a3f", "v_fmaak_f32_e32 v22, v20, v22, 0x3f2aaada"),
    ("3200e1d34619ca04", "v_mfma_f32_16x16x16_bf16 v[50:53], v[70:71], v[12:13], v[50:53]"),
    ("2200b5d3226daa04", "v_mfma_f32_16x16x32_bf16 v[34:37], v[34:37], v[54:57], v[42:45]"),
    ("4000b7d388250305", "v_mfma_f32_32x32x16_bf16 v[64:79], v[136:139], v[146:149], v[64:79]"),
    ("0200c4d31a910a04", "v_mfma_f32_32x32x2_f32 v[2:17], v26, v72, v[2:17]"),
    ("1271ac7e", "v_mov_b64_e32 v[86:87], v[18:19]"),
    ("09b3107e", "v_permlane16_swap_b32_e32 v8, v9"),
    ("09b5107e", "v_permlane32_swap_b32_e32 v8, v9"),
    ("184ab2d326490250", "v_pk_add_f32 v[24:25], v[38:39], v[36:37] op_sel:0x1 op_sel_hi:0x2 neg_lo:0x2 neg_hi:0x2"),
    ("2c44b0d3285dca9c", "v_pk_fma_f32 v[44:45], v[40:41], v[46:47], v[50:51] op_sel_hi:0x7 neg_lo:0x4 neg_hi:0x4"),
    ("5448b3d32e510218", "v_pk_mov_b32 v[84:85], v[46:47], v[40:41] op_sel:0x1 op_sel_hi:0x3"),
    ("290089d2077f0100", "v_readlane_b32 s41, v7, 63"),
    ("0005067e", "v_readfirstlane_b32_e32 s3, v0"),
    ("86008ad200000100", "v_writelane_b32 v134, s0, 0"),
    ("9240d8d300010018", "v_accvgpr_read_b32 v146, a0"),
    ("0140d9d31d010018", "v_accvgpr_write_b32 a1, v29"),
    ("128035d136030100", "v_sub_u32_e64 v18, v54, 1 clamp:0x1"),
    ("800c827c", "v_cmp_lt_f32_e32 vcc, 0, v6"),
    ("2200c4d04e820200", "v_cmp_gt_i32_e64 s[34:35], s78, v65"),
    ("1a0008d22c008104", "v_lshl_add_u64 v[26:27], s[44:45], 0, v[32:33]"),
    ("09030bd104090200", "v_max_f32_e64 v9, |v4|, |v4|"),
    ("1c0005d11c410300", "v_mul_f32_e64 v28, v28, v160"),
    ("850202c004000000", "s_load_dword s10, s[10:11] offset:0x4"),
    ("00010ac040000000", "s_load_dwordx4 s[4:7], s[0:1] offset:0x40"),
    ("980002b0", "s_movk_i32 s2, 152"),
    ("500021b3", "s_cmpk_lt_i32 s33, 80"),
    ("6a2080be", "s_and_saveexec_b64 s[0:1], vcc"),
    ("c10500ba01000000", "s_setreg_imm32_b32 1473, 0x1"),
    ("71008cbf", "s_waitcnt vmcnt:0x1 lgkmcnt:0x0"),
    ("020088bf", "s_cbranch_execz 2"),
    ("00008abf", "s_barrier"),
    ("80019abe", "s_mov_b64 s[26:27], 0"),
    ("ff0080bee0ffff7f", "s_mov_b32 s0, 0x7fffffe0"),
    ("02ff029300000800", "s_bfe_i32 s2, s2, 0x80000"),
    ("020370d813000010", "ds_read2st64_b32 v[16:17], v19 offset0:0x2 offset1:0x3"),
    ("20309ed828121a00", "ds_write2st64_b64 v40, v[18:19], v[26:27] offset0:0x20 offset1:0x30"),
    ("0010c6d90200002a", "ds_read_b64_tr_b16 v[42:43], v2 offset:0x1000"),
    ("00007ed836340035", "ds_bpermute_b32 v53, v54, v52"),
    ("0002aad80c020000", "ds_write_b16_d16_hi v12, v2 offset:0x200"),
    ("0001fedb06000010", "ds_read_b128 a[16:19], v6 offset:0x100"),
    ("00105ce0313a0680", "buffer_load_dwordx4 v[58:61], v49, s[24:27], 0 offen:0x1"),
    ("001068e004000380", "buffer_store_short v0, v4, s[12:15], 0 offen:0x1"),
    ("00825cdca2007fae", "global_load_dwordx4 v[174:177], v[162:163], off offset:0x200"),
    ("a0806cdc061c7f00", "global_store_short_d16_hi v[6:7], v28, off offset:0xa0"),
    ("008148dc18007f14", "global_load_ushort v20, v[24:25], off offset:0x100"),
    ("f95e365864060605", "v_ashrrev_i16_sdwa v27, v100, v47 src1_sel:0x5"),
    ("f93234286a050606", "v_or_b32_sdwa v26, v106, v25 dst_sel:0x5"),
    ("0b00cbd10e163a84", "v_fma_f32_e64 v11, s14, v11, -v14"),
]
LLVM = objdump.find()


@pytest.mark.parametrize(("encoding", "text"), GOLDEN, ids=[text.split()[0] for _, text in GOLDEN])
def test_golden_encodings(encoding, text):
    data = bytes.fromhex(encoding)
    found = decode_one(data + b"\xff" * 12)
    assert (found.text, found.size) == (text, len(data))


@pytest.mark.parametrize(
    ("encoding", "same"),
    [
        ("80060238", asm("v_addc_co_u32 v1, vcc, 0, v3, vcc", encoding="e32")),
        ("0b00cbd10e163a84", asm("v_fma_f32 v11, s14, v11, -v14", encoding="e64")),
        ("0001fedb06000010", asm("ds_read_b128 a[16:19], v6", offset=256)),
        ("f90a387e2f060a00", asm("v_cvt_f32_i32 v28, sext(v47)", encoding="sdwa", src0_sel=2)),
        ("a0806cdc061c7f00", asm("global_store_short_d16_hi v[6:7], v28, off", offset=160)),
        ("ff0080bee0ffff7f", asm("s_mov_b32 s0, 0x7fffffe0")),
    ],
)
def test_operands_are_structured(encoding, same):
    assert decode_one(bytes.fromhex(encoding)) == same


def test_offsets_have_their_sign():
    assert decode_one(bytes.fromhex("009050dc04040604")).get("offset") == -4096
    assert decode_one(bytes.fromhex("ffff88bf")).operands[0].value == -1


def test_addresses_follow_sizes():
    data = bytes.fromhex("".join(encoding for encoding, _ in GOLDEN))
    found = decode.decode(data, 0x1000)
    assert [p.text for p in found] == [text for _, text in GOLDEN]
    assert found[0].address == 0x1000
    assert all(p.address + p.size == q.address for p, q in itertools.pairwise(found))
    assert sum(p.size for p in found) == len(data)


@pytest.mark.parametrize("data", ["ffffffffffffffff", "000000f000000000", "000050dc00000000"])
def test_unknown_bytes_are_refused(data):
    with pytest.raises(UnknownInstruction):
        decode_one(bytes.fromhex(data))


def test_equal_instructions_are_one_wherever_they_stand():
    first, second = decode.decode(bytes.fromhex("80060238" * 2), 64)
    assert first == second
    assert hash(first) == hash(second)
    assert (first.address, second.address) == (64, 68)


def code_object(text: bytes, name: str = "kernel") -> bytes:
    """The least of an AMD code object: code, a descriptor, and symbols of both."""
    descriptor = bytearray(64)
    struct.pack_into("<III", descriptor, 0, 512, 0, 24)
    struct.pack_into(
        "<II", descriptor, 48, 0xF0 << 12, 2 << 1 | 1 << 7
    )  # two scalar registers, then the workgroup's number
    struct.pack_into("<HH", descriptor, 56, 8, 0)
    strings = b"\0" + name.encode() + b"\0" + name.encode() + b".kd\0"
    names = b"\0.text\0.rodata\0.symtab\0.strtab\0.shstrtab\0"
    address = 0x1000
    symbols = bytes(24)
    symbols += struct.pack("<IBBHQQ", 1, 0x12, 0, 1, address, len(text))
    symbols += struct.pack("<IBBHQQ", 2 + len(name), 0x11, 0, 2, 0x8000, 64)
    parts = [text, bytes(descriptor), symbols, strings, names]
    places, at = [], 64
    for part in parts:
        places.append(at)
        at += -(-len(part) // 8) * 8
    kinds = [(".text", 1, 6, address, 0, 0), (".rodata", 1, 2, 0x8000, 0, 0), (".symtab", 2, 0, 0, 4, 24)]
    kinds += [(".strtab", 3, 0, 0, 0, 0), (".shstrtab", 3, 0, 0, 0, 0)]
    headers = bytes(64)
    for part, place, (section, kind, flags, where, link, each) in zip(parts, places, kinds, strict=True):
        found = names.index(b"\0" + section.encode() + b"\0") + 1
        headers += struct.pack("<IIQQQQIIQQ", found, kind, flags, where, place, len(part), link, 1, 8, each)
    # ELF of 64 bits for AMD's GPUs under HSA, gfx942.
    start = b"\x7fELF\x02\x01\x01\x40\x04" + bytes(7)
    start += struct.pack("<HHIQQQIHHHHHH", 3, 224, 1, 0, 0, at, 0x54C, 64, 56, 0, 64, 6, 5)
    return start + b"".join(part.ljust(-(-len(part) // 8) * 8, b"\0") for part in parts) + headers


CODE = bytes.fromhex("".join(encoding for encoding, text in GOLDEN if "cbranch" not in text) + "000081bf")


def test_a_kernel_of_a_code_object():
    found = emulator.program(code_object(CODE), "gfx950", "kernel")
    assert len(found.instructions) == len(GOLDEN)  # one less, and the end
    assert found.instructions[-1].name == "s_endpgm"
    assert (found.vectors, found.accumulators) == (178, 20)
    about = found.descriptor
    assert (about.lds, about.scratch, about.kernarg, about.user_sgprs) == (512, 0, 24, 2)
    assert (about.group_ids, about.properties, about.preload) == ((True, False, False), 8, 0)
    assert about.float_mode == 0xF0
    assert emulator.missing(found) == {}
    with pytest.raises(ValueError, match="no kernel other"):
        code.kernel(code_object(CODE), "other")
    with pytest.raises(ValueError, match="gfx90a is not emulated"):
        emulator.program(code_object(CODE), "gfx90a", "kernel")


@pytest.mark.skipif(LLVM is None, reason=f"no llvm-objdump of LLVM {objdump.OLDEST} or later, which knows gfx950")
def test_llvm_decodes_the_same():
    assert LLVM is not None
    assert objdump.differences(code_object(CODE), "gfx950", "kernel", LLVM) == []


@pytest.mark.skipif(LLVM is None, reason=f"no llvm-objdump of LLVM {objdump.OLDEST} or later, which knows gfx950")
def test_a_difference_to_llvm_is_told(monkeypatch):
    assert LLVM is not None

    def wrong(text, address):
        return decode.decode(text.replace(bytes.fromhex("80060238"), bytes.fromhex("8006023a")), address)

    monkeypatch.setattr(objdump, "decode", wrong)
    (said,) = objdump.differences(code_object(CODE), "gfx950", "kernel", LLVM)
    assert said.endswith("v_subb_co_u32_e32 v1, vcc, 0, v3, vcc is v_addc_co_u32_e32 v1, vcc, 0, v3, vcc")
