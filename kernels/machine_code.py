"""Count the instructions that a program issues, in its machine code, and predict the time of `attention.forward`.

    python -m savl.kernels.machine_code                      # savl-base, block sizes of the rule, sm_90
    python -m savl.kernels.machine_code 64,64,4 128,64,8     # other tiles: queries, keys, warps

This works for Triton and CUDA C++. A binary is disassembled, and instructions are counted along the path through the
program that does the arithmetic, which may contain a loop.

The command prints, for windows of 512×512 pixels in bfloat16 with 6 heads of 24 channels and severity: instructions per
64 scores of a thread, in the loop over keys and around it; registers, resident warps per multiprocessor, bytes of stack
(spilled registers) and of shared memory. The predicted time is the largest of four:

- issue slots: four schedulers of a multiprocessor each issue an instruction of a warp per clock;
- latency: a warp issues an instruction every `CLOCKS_PER_INSTRUCTION`, as it waits for results, loads and barriers;
  the resident warps do so side by side;
- exponentials: 16 per clock and multiprocessor;
- bytes: each tensor is read or written once at the measured bandwidth.

The times of the first three are for an H200 at 1.80 GHz. Latency is the only one that is fitted, to two measurements of
an earlier version of the kernel, and the prediction ranks configurations rather than replacing a measurement.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from savl.kernels.configs import KernelConfig, Problem, default_config

if TYPE_CHECKING:
    from savl.kernels.compile_ahead_of_time import Resources

MULTIPROCESSORS, HERTZ = 132, 1.80e9
SCHEDULERS = 4
EXPONENTIALS = 16
BYTES_PER_SECOND = 4.16e12
CLOCKS_PER_INSTRUCTION = 6.2
"""Rough estimate of the clocks between two instructions of a warp. An H200 took 0.462 ms and 0.934 ms for window and
overlapping attention with 8 and 12 warps per multiprocessor, and about 150 and 400 million instructions of warps:
about 6 clocks. If only 8 warps were resident for the second, it is 4.6 clocks there."""
SIDE, WINDOW, HEADS, HEAD_DIM = 512, 16, 6, 24
SCORES = 64
"""Scores of a thread that instructions are given for: those of a tile of 128×64 with 4 warps."""


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


def share_at_edge(along: int, overlapping: bool) -> float:
    """Return the share of windows that take the loop for the edge of the image, of ``along`` × ``along`` windows.

    Args:
        along: Number of windows along a side.
        overlapping: Whether keys outside the image are checked for, on all four sides; else the windows are shifted,
            and the last row and column of them contain several sides of the image.
    """
    inside = max(along - 2, 0) if overlapping else along - 1
    return 1 - inside**2 / along**2


@dataclass(frozen=True)
class ForwardCount:
    """What a compiled `attention.forward` uses, on the image that this module describes."""

    resources: Resources
    warps: int
    """Resident warps of a multiprocessor."""
    loop: float
    """Instructions per 64 scores of a thread in the loop over keys, of windows inside the image."""
    loop_at_edge: float
    """The same of windows at the edge, which have masks or bounds; equal to ``loop`` where there is no other loop."""
    around: float
    """Instructions outside the loop, per 64 scores."""
    seconds: dict[str, float]
    """Predicted seconds by resource."""

    @property
    def predicted(self) -> float:
        """The largest of the predicted times, in seconds."""
        return max(self.seconds.values())


def count_forward(
    problem: Problem,
    config: KernelConfig | None = None,
    capability: tuple[int, int] = (9, 0),
    *,
    severity: bool = True,
    shifted: bool = False,
) -> ForwardCount:
    """Compile `attention.forward` and count.

    Args:
        problem: The problem; a key window that is larger than the window overlaps its neighbours.
        config: Block sizes; None for those of the rule.
        capability: Compute capability to compile for.
        severity: Whether there is a severity map.
        shifted: Whether windows are shifted.
    """
    from savl.kernels import compile_ahead_of_time

    config = config or default_config("forward", problem, capability)
    launches = compile_ahead_of_time.launches(
        problem, capability, severity=severity, shifted=shifted, heads=HEADS, forward=config
    )
    compiled = compile_ahead_of_time.compile_launch(launches["forward"], capability)
    used = compile_ahead_of_time.read_resources(compiled)
    (program,) = disassemble(compiled.asm["cubin"]).values()
    overlapping = problem.keys > problem.queries
    windows = SIDE**2 / problem.queries
    at_edge, inside = count(program), count(program, 1 if shifted or overlapping else 0)
    share = share_at_edge(round(windows**0.5), overlapping) if shifted or overlapping else 0.0
    scores = config.block_m * config.block_n / (32 * config.warps)
    passes = -(-problem.keys // config.block_n)
    programs = windows * HEADS * -(-problem.queries // config.block_m)
    resident = used.programs(capability) * used.warps
    body = share * at_edge.loop + (1 - share) * inside.loop
    instructions = programs * config.warps * (inside.around + passes * body)
    clocks = MULTIPROCESSORS * HERTZ
    width = 4 if problem.dtype == "float32" else 2
    moved = SIDE**2 * (4 * width * HEADS * problem.head_dim + 4 * HEADS + width * severity)
    seconds = {
        "issue slots": instructions / (SCHEDULERS * clocks),
        "latency": instructions * CLOCKS_PER_INSTRUCTION / (max(resident, 1) * clocks),
        "exponentials": windows * HEADS * problem.queries * problem.keys / (EXPONENTIALS * clocks),
        "bytes": moved / BYTES_PER_SECOND,
    }
    return ForwardCount(
        used,
        resident,
        inside.loop * SCORES / scores,
        at_edge.loop * SCORES / scores,
        inside.around * SCORES / (scores * passes),
        seconds,
    )


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """Return the functions of a binary, by the disassembler that Triton includes."""
    from savl.kernels import compile_ahead_of_time

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(compile_ahead_of_time.cuobjdump()).with_name("nvdisasm")
        return functions(subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print the counts of `attention.forward` for the attentions of savl-base."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tiles", nargs="*", metavar="M,N,WARPS", help="queries, keys and warps of a program (default: the rule)"
    )
    parser.add_argument("--sm", type=int, default=90, help="compute capability, such as 90")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the features")
    arguments = parser.parse_args()
    capability = divmod(arguments.sm, 10)
    print(f"Triton {triton.__version__}, sm_{arguments.sm}, {arguments.dtype}; per 64 scores of a thread:")
    print("| attention | tiles | loop | at the edge | around | registers | warps | stack | shared | ms | limit |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for name, key_window, shifted in (("window", 16, False), ("window, shifted", 16, True), ("overlapping", 24, False)):
        problem = Problem(arguments.dtype, HEAD_DIM, WINDOW, key_window)
        for tile in arguments.tiles or [None]:
            config = default_config("forward", problem, capability)
            if tile is not None:
                m, n, warps = map(int, tile.split(","))
                config = KernelConfig(m, n, warps, 1)
            found = count_forward(problem, config, capability, shifted=shifted)
            used, limit = found.resources, max(found.seconds, key=lambda each: found.seconds[each])
            print(
                f"| {name} | {config.block_m}×{config.block_n}/{config.warps} | {found.loop:.0f} "
                f"| {found.loop_at_edge:.0f} | {found.around:.0f} | {used.registers} | {found.warps} | {used.stack} "
                f"| {used.shared} | {1e3 * found.predicted:.3f} | {limit} |"
            )


if __name__ == "__main__":
    main()
