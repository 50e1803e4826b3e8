"""Products of matrices: each wave holds two in the registers of its lanes, and adds their product to a third."""

import re

import ml_dtypes
import numpy as np

from rocm.emulator.groups import LANES
from rocm.emulator.instruction import Instruction
from rocm.emulator.operands import F32, F64, vector, viewed

LANE = np.arange(LANES)
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


def build(p: Instruction):
    """v_mfma_f32_MxMxK_type: D = A B + C, summed in float64 and rounded once.

    There are B = 64 / M blocks of M lanes. With m = K / B: A[i, k] is value k % m of lane i + M (k // m), and B[k, j]
    that of lane j + M (k // m). Register r of lane l has row 4 B (r // 4) + 4 (l // M) + r % 4 of D, and of C, column
    l % M.
    """
    match = re.fullmatch(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_(bf16|f16|f32)", p.name)
    if not match:
        raise NotImplementedError(p.text)
    size, columns, depth, kind = int(match[1]), int(match[2]), int(match[3]), match[4]
    to, left, right, addend = p.operands
    if size != columns or size not in (16, 32) or not to.is_register:
        raise NotImplementedError(p.text)
    blocks, results = LANES // size, size * size // LANES
    each = depth // blocks
    registers = each * np.dtype(DTYPES[kind]).itemsize // 4
    reads = [[vector(x, k) for k in range(registers)] for x in (left, right)]
    addends = [viewed(addend, F32, k if addend.is_register else 0) for k in range(results)]
    # Row of each result, [register, lane].
    rows = np.array([k // 4 * 4 * blocks + LANE // size * 4 + k % 4 for k in range(results)])

    def matrix(g, registers):
        n = g.scc.size
        raw = np.stack([np.broadcast_to(read(g), (n, LANES)) for read in registers], axis=-1)
        values = raw.view(DTYPES[kind]).astype(F32)
        # [wave, block, row, value] -> [wave, row, depth]
        return values.reshape(n, blocks, size, each).transpose(0, 2, 1, 3).reshape(n, size, depth).astype(F64)

    def run(g):
        product = matrix(g, reads[0]) @ matrix(g, reads[1]).transpose(0, 2, 1)
        target = (g.v if to.file == "v" else g.a)[to.index : to.index + results]
        found = product[:, rows, LANE % size].transpose(1, 0, 2)  # [register, wave, lane]
        # All of C is read before any of D is written: they may overlap.
        target[...] = np.stack([found[k] + add(g) for k, add in enumerate(addends)]).astype(F32).view(np.uint32)

    return run
