"""Instructions as the emulator sees them: names, operands and modifiers, with nothing of how they are encoded."""

import dataclasses

VCC, M0, EXEC = 106, 124, 126
"""Numbers of scalar registers that have names; VCC and EXEC are pairs."""

DWORD = 6
"""The sel of SDWA that takes a whole register: 0 to 3 are its bytes, 4 and 5 its halves."""

_NAMES = {VCC: "vcc_lo", VCC + 1: "vcc_hi", M0: "m0", EXEC: "exec_lo", EXEC + 1: "exec_hi"}
_PAIRS = {VCC: "vcc", EXEC: "exec"}
_FLOATS = {
    0x3F000000: "0.5",
    0x3F800000: "1.0",
    0x40000000: "2.0",
    0x40800000: "4.0",
    0x3E22F983: "0.15915494",
}
_FLOATS |= {bits | 0x80000000: f"-{name}" for bits, name in _FLOATS.items() if bits != 0x3E22F983}


@dataclasses.dataclass(frozen=True)
class Operand:
    """A register, `count` of them in a row, or a constant.

    `file` is "v" (vector), "a" (accumulation), "s" (scalar, the named ones among them), "scc", "off" (no register),
    "integer" (`value` has its sign), "float" or "literal" (`value` has 32 bits), or "special" for what no kernel here
    uses.
    """

    file: str
    index: int = 0
    count: int = 1
    value: int = 0
    negate: bool = False
    absolute: bool = False
    sext: bool = False

    @property
    def is_register(self) -> bool:
        return self.file in ("v", "a", "s")

    @property
    def registers(self) -> frozenset[tuple[str, int]]:
        if not self.is_register:
            return frozenset()
        return frozenset((self.file, self.index + k) for k in range(self.count))

    def __str__(self) -> str:
        text = self._plain()
        if self.absolute:
            text = f"|{text}|"
        if self.sext:
            text = f"sext({text})"
        return f"-{text}" if self.negate else text

    def _plain(self) -> str:
        match self.file:
            case "integer":
                return str(self.value)
            case "float":
                return _FLOATS[self.value]
            case "literal":
                return hex(self.value)
            case "scc" | "off":
                return self.file
            case "s" if self.count == 2 and self.index in _PAIRS:
                return _PAIRS[self.index]
            case "s" if self.count == 1 and self.index in _NAMES:
                return _NAMES[self.index]
        if self.count == 1:
            return f"{self.file}{self.index}"
        return f"{self.file}[{self.index}:{self.index + self.count - 1}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. Operands stand in the order of AMD's assembly: results first, then sources.

    `name` has no encoding suffix: that is `encoding`, "e32", "e64", "dpp", "sdwa" or "". `modifiers` has what is not
    at its default: offset, op_sel and its like as bits (bit k for operand k), dpp_ctrl, row_mask, bank_mask,
    bound_ctrl, dst_sel, src0_sel, vmcnt, lgkmcnt, ... Instructions are equal where they do the same, wherever they
    stand.
    """

    name: str
    encoding: str = ""
    operands: tuple[Operand, ...] = ()
    modifiers: tuple[tuple[str, int], ...] = ()
    address: int = dataclasses.field(default=0, compare=False)
    size: int = dataclasses.field(default=4, compare=False)

    def get(self, modifier: str, default: int = 0) -> int:
        return next((value for key, value in self.modifiers if key == modifier), default)

    def only(self, *known: str) -> None:
        """Raises NotImplementedError for a modifier that is not among the known."""
        if unknown := [key for key, _ in self.modifiers if key not in known]:
            raise NotImplementedError(f"{', '.join(unknown)} of {self.text}")

    @property
    def text(self) -> str:
        """As it is named in messages; close to AMD's assembly."""
        name = f"{self.name}_{self.encoding}" if self.encoding else self.name
        operands = ", ".join(map(str, self.operands))
        return " ".join([name, *([operands] if operands else []), *(f"{k}:{v:#x}" for k, v in self.modifiers)])
