"""The decoder against LLVM's, where one is installed that knows these chips."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

from rocm.emulator import code
from rocm.emulator.decode import decode
from rocm.emulator.instruction import Instruction

OLDEST = 20
"""The first LLVM that knows gfx950."""


def find() -> str | None:
    """An llvm-objdump that is new enough, or None."""
    for name in ("llvm-objdump", *(f"llvm-objdump-{version}" for version in range(30, OLDEST - 1, -1))):
        path = shutil.which(name)
        if path and _version(path) >= OLDEST:
            return path
    return None


def _version(path: str) -> int:
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"LLVM version (\d+)", said)
    return int(match[1]) if match and "amdgcn" in said else 0


def differences(elf: bytes, arch: str, kernel: str, objdump: str) -> list[str]:
    """Where the two disagree on sizes, names or operands of a kernel's instructions."""
    text, address, _ = code.kernel(elf, kernel)
    ours = {p.address: p for p in decode(text, address)}
    # What follows the kernel is padding.
    theirs = {at: said for at, said in _disassembled(elf, arch, kernel, objdump) if at < address + len(text)}
    found = [f"{at:#x}: {name} {operands}: not decoded" for at, (_, name, operands) in theirs.items() if at not in ours]
    for at, p in ours.items():
        if at not in theirs:
            found.append(f"{at:#x}: {p.text}: not in LLVM's output")
        elif not _agree(p, *theirs[at]):
            _, name, operands = theirs[at]
            found.append(f"{at:#x}: {p.text} is {name} {operands}")
    return found


def _disassembled(elf: bytes, arch: str, kernel: str, objdump: str) -> Iterator[tuple[int, tuple[int, str, str]]]:
    """(address, (bytes, name, operands and modifiers))."""
    with tempfile.NamedTemporaryFile(suffix=".hsaco") as file:
        file.write(elf)
        file.flush()
        command = [objdump, "-d", f"--mcpu={arch}", f"--disassemble-symbols={kernel}", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in said.splitlines():
        if match := re.match(r"\s+(\S+)\s*(.*?)\s*//\s*([0-9A-F]+):((?: [0-9A-F]{8})+)", line):
            yield int(match[3], 16), (4 * len(match[4].split()), match[1], match[2])


# Numbers that the two write differently: a mode register, targets of branches, counters that stand among modifiers.
_OTHER_OPERANDS = ("s_setreg", "s_cbranch", "s_branch", "s_waitcnt", "s_movk", "s_cmpk", "s_addk", "s_mulk")


def _agree(p: Instruction, size: int, name: str, operands: str) -> bool:
    if p.size != size or p.name != re.sub(r"_(e32|e64|dpp|sdwa)$", "", name):
        return False
    if p.name.startswith(_OTHER_OPERANDS):
        return True
    plain = operands.replace("0.15915494309189532", "0.15915494")
    return _numbers(plain).startswith(_numbers(", ".join(map(str, p.operands))))


def _numbers(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", lambda match: str(int(match[0], 16)), text)
