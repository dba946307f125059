"""Reads machine code: disassembles a cubin and counts what its loops are made of."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction: its address, its name with modifiers, and its operands."""

    address: int
    opcode: str
    operands: str


def tool(name: str) -> str | None:
    """Path of ``cuobjdump`` or ``nvdisasm``: from PATH, or from NVIDIA's packages on PyPI."""
    found = shutil.which(name)
    if found:
        return found
    roots = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for root in roots:
        for path in sorted(Path(root).glob(f"nvidia/**/bin/{name}*")):
            return str(path)
    return None


def disassemble(cubin: Path) -> list[Instruction]:
    """The instructions of a cubin that holds one kernel."""
    listing = subprocess.run(
        [tool("nvdisasm"), "--print-code", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return parse(listing)


def parse(listing: str) -> list[Instruction]:
    """Instructions of an nvdisasm listing, branch targets resolved to addresses."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    found: list[Instruction] = []
    for line in listing.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            pending.append(label.group(1))
            continue
        match = _INSTRUCTION.match(line)
        if match:
            address = int(match.group(1), 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            found.append(Instruction(address, match.group(2), match.group(3).strip()))
    return [
        Instruction(i.address, i.opcode, re.sub(r"`\((\.L_x_\d+)\)", lambda m: hex(labels[m.group(1)]), i.operands))
        for i in found
    ]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of all backward branches, shortest first."""
    bodies = []
    for instruction in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
        if instruction.opcode.startswith("BRA") and target:
            start = int(target.group(1), 16)
            if start < instruction.address:
                bodies.append([i for i in code if start <= i.address <= instruction.address])
    return sorted(bodies, key=len)


def main_loop(code: list[Instruction], opcode: str) -> list[Instruction]:
    """The innermost loop that holds an instruction whose name starts with ``opcode``."""
    for body in loops(code):
        if any(i.opcode.startswith(opcode) for i in body):
            return body
    raise AssertionError(f"no loop holds {opcode}")


def mix(code: list[Instruction]) -> Counter[str]:
    """How often each instruction occurs, by its name without modifiers."""
    return Counter(i.opcode.split(".")[0] for i in code)
