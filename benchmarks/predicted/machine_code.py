"""Count the instructions that a program issues, in its machine code.

This works for Triton and CUDA C++. A binary is disassembled, and instructions are counted along the path through the
program that does the arithmetic, which may contain a loop.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction of a program."""

    opcode: str
    target: int | None
    """Index of the instruction that a branch jumps to."""
    conditional: bool


def functions(listing: str) -> dict[str, list[Instruction]]:
    """Return the instructions of every function.

    Args:
        listing: Output of ``nvdisasm -c``.
    """
    found: dict[str, list[tuple[str, str | None, bool]]] = {}
    labels: dict[str, dict[str, int]] = {}
    name = ""
    for line in listing.splitlines():
        if match := re.match(r"\.text\.(\S+):", line):
            name = match[1]
            found[name], labels[name] = [], {}
        elif not name:
            continue
        elif match := re.match(r"\s*(\.L_\w+):", line):
            labels[name][match[1]] = len(found[name])
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)(.*)", line):
            target = re.search(r"\((\.L_\w+)\)", match[3]) if match[2].startswith("BRA") else None
            found[name].append(
                (match[2], target[1] if target else None, bool(match[1]) or "P" in match[3].split("`")[0])
            )
    return {
        name: [Instruction(code, labels[name].get(where) if where else None, maybe) for code, where, maybe in lines]
        for name, lines in found.items()
    }


def loops(program: list[Instruction]) -> list[tuple[int, int]]:
    """Return first and last instruction of each innermost loop with arithmetic, the largest first."""
    spans = [
        (each.target, place)
        for place, each in enumerate(program)
        if each.target is not None and each.target < place and place - each.target > 20
    ]
    inner = [
        one for one in spans if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in spans)
    ]
    return sorted(inner, key=lambda span: span[0] - span[1])


def path(program: list[Instruction], first: int, last: int) -> list[Instruction] | None:
    """Return the shortest path between two instructions among those with the most arithmetic; None without a path.

    Backward branches are not taken. Shorter paths around the arithmetic are for data that does not exist, longer ones
    for data that cannot be read in units of 16 bytes.
    """
    best: dict[int, tuple[int, int, int]] = {first: (-_useful(program[first]), 1, -1)}
    for place in range(first, last):
        if place not in best:
            continue
        each = program[place]
        following = [place + 1] if each.conditional or not each.opcode.startswith(("BRA", "EXIT")) else []
        if each.target is not None and each.target > place:
            following.append(each.target)
        for step in following:
            if step <= last:
                useful, count, _ = best[place]
                found = (useful - _useful(program[step]), count + 1, place)
                best[step] = min(best.get(step, found), found)
    if last not in best:
        return None
    steps, place = [], last
    while place >= 0:
        steps.append(program[place])
        place = best[place][2]
    return steps[::-1]


def _useful(instruction: Instruction) -> int:
    code = instruction.opcode
    return int(code.startswith(("FFMA", "MUFU", "HGMMA", "HMMA")) or (code.startswith("LDG") and "128" in code))


@dataclass(frozen=True)
class Counted:
    """Instructions of a thread: in one pass through a loop, and before and after the loop."""

    loop: int
    around: int
    exponentials: int
    """Exponentials in one pass."""


def count(program: list[Instruction], number: int = 0) -> Counted:
    """Count instructions along the path through one of the innermost loops.

    Args:
        program: The program.
        number: Index of the loop; the largest is 0.

    Raises:
        ValueError: There is no such loop, or no path through it.
    """
    found = loops(program)
    if number >= len(found):
        raise ValueError(f"the program has {len(found)} loops, not {number + 1}")
    start, end = found[number]
    leave = max(place for place, each in enumerate(program) if each.opcode.startswith("EXIT"))
    ways = path(program, 0, start), path(program, start, end), path(program, end + 1, leave)
    if ways[0] is None or ways[1] is None or ways[2] is None:
        raise ValueError("there is no way through the loop")
    exponentials = sum(each.opcode.startswith("MUFU.EX2") for each in ways[1])
    return Counted(len(ways[1]), len(ways[0]) - 1 + len(ways[2]), exponentials)


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """Return the functions of a binary, by the disassembler that Triton includes."""
    from savl.kernels import compile_ahead_of_time

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(compile_ahead_of_time.cuobjdump()).with_name("nvdisasm")
        return functions(subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout)
