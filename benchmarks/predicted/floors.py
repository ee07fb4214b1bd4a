"""Predict the minimum time of the kernels on an H100 or H200 from machine code and bytes, without measuring.

    python -m benchmarks.predicted.floors           # print, write results/predicted/floors.json and the page
    python -m benchmarks.predicted.floors --page    # write only the page, from the committed figures

The page is docs/predicted-floors.md. This needs Triton and, for posterior and modulation, the CUDA library
(`savl/_cuda.so`), but no GPU.

Each resource that a kernel uses gives a floor, a least time: memory (each byte once), tensor cores, exponentials, and
issue slots for instructions. The largest floor is the prediction. Instructions are counted in the machine code that
Triton's compiler generates with the block sizes of the rule: those of a path through the program, times how often
programs and loops run. Eager takes at least the time to move the bytes that its operations read and write:
`benchmarks.predicted.traffic` records the operations of the reference in `savl.ops` on tensors without data.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_ratios import MEMORY_RATIO, PARTS
from benchmarks.predicted import traffic
from benchmarks.timing import COPY
from savl.atomic_write import write_atomically
from savl.kernels.configs import Problem, default_config, kernels_hash, stages_of
from savl.kernels.machine_code import Counted, Instruction, count, disassemble, loops, path, share_at_edge

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks/results/predicted/floors.json"
PAGE = ROOT / "docs/predicted-floors.md"
SIDE, WINDOW, HEADS, HEAD_DIM, LATENT = 512, 16, 6, 24, 64
CHANNELS = HEADS * HEAD_DIM
PIXELS, WINDOWS = SIDE**2, (SIDE // WINDOW) ** 2
CAPABILITY = (9, 0)
WIDTH = 2
"""Bytes per bfloat16."""


@dataclass(frozen=True)
class DataSheet:
    """Maximum speeds of a GPU according to its data sheet."""

    name: str
    bytes_per_second: float
    flops: float = 989e12
    """FLOPs per second of dense bfloat16 products."""
    multiprocessors: int = 132
    hertz: float = 1.755e9
    exponentials: int = 16
    """Per clock and multiprocessor."""
    instructions: int = 4
    """Instructions of a warp, per clock and multiprocessor."""

    def floors(self, work: Work) -> dict[str, float]:
        """Return the floors: the minimum time in seconds by resource."""
        clocks = self.multiprocessors * self.hertz
        return {
            "memory": work.bytes / self.bytes_per_second,
            "tensor cores": work.flops / self.flops,
            "exponentials": work.exponentials / self.exponentials / clocks,
            "instructions": work.instructions / self.instructions / clocks,
        }

    def seconds(self, work: Work) -> float:
        """Return the predicted seconds: the largest of the floors."""
        return max(self.floors(work).values())


H100 = DataSheet("H100 SXM", 3.35e12)
H200 = DataSheet("H200", 4.8e12)
GPUS = (H100, H200)


@dataclass(frozen=True)
class Work:
    """Total work of a kernel."""

    bytes: float
    flops: float = 0.0
    exponentials: float = 0.0
    instructions: float = 0.0
    """Instructions of warps."""


# The attention kernels


def attention_work(key_window: int, severity: bool, shifted: bool, stages: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the work of the attention kernels on an image of 512×512 pixels, and the counts it is made of.

    Args:
        key_window: Side of the key windows.
        severity: Whether there is a severity map.
        shifted: Whether windows are shifted.
        stages: Names of the kernels.
    """
    from savl.kernels import compile_ahead_of_time, launch

    problem = Problem("bfloat16", HEAD_DIM, WINDOW, key_window)
    launches = compile_ahead_of_time.launches(problem, CAPABILITY, severity=severity, shifted=shifted, heads=HEADS)
    keys, queries = key_window**2, WINDOW**2
    pairs = WINDOWS * HEADS * queries * keys
    tensor, plane = float(WIDTH * PIXELS * CHANNELS), 4.0 * PIXELS * HEADS
    maps = WIDTH * PIXELS if severity else 0
    share = plane if severity else 0
    found = {}
    for stage in stages:
        config = default_config(stage, problem, CAPABILITY)
        tiles = -(-queries // config.block_m)
        (program,) = disassemble(
            compile_ahead_of_time.compile_launch(launches[stage], CAPABILITY).asm["cubin"]
        ).values()
        counted = count(program)
        body = float(counted.loop)
        per_tile = config.block_m * config.block_n / (32 * config.warps)
        if stage == "backward_qkv":  # the tiles of queries follow one another in the body of the loop over keys
            per_tile *= tiles
            if shifted:
                body = _with_edges(program, per_tile)
                counted = next(each for each in _every_loop(program) if per_tile <= each.exponentials < 2 * per_tile)
        if not per_tile <= counted.exponentials < 2 * per_tile:
            raise ValueError(f"{stage}: {counted.exponentials} exponentials a pass, {per_tile} scores a thread")
        overlapping = key_window > WINDOW
        if stage == "forward" and (shifted or overlapping):  # two loops; the larger is for windows at the edge
            inside = count(program, 1)
            at_edge = share_at_edge(SIDE // WINDOW, overlapping)
            body = at_edge * counted.loop + (1 - at_edge) * inside.loop
            counted = inside
        tile_pairs = tiles * -(-keys // config.block_n) * HEADS
        chunks = launch.bias_chunks(WINDOWS, tile_pairs)
        if stage in ("forward", "backward_q"):
            programs, passes = WINDOWS * HEADS * tiles, float(-(-keys // config.block_n))
        elif stage == "backward_qkv":
            programs, passes = WINDOWS * HEADS, float(-(-keys // config.block_n))
        elif stage == "backward_kv":
            tile = launch.key_tile(config.block_n, (key_window, key_window), (key_window - WINDOW) // 2)
            steps = [_windows_seen(size, key_window) for size in tile]
            counts = [len(each) for each in steps]
            programs = counts[0] * counts[1] * HEADS
            passes = tiles * sum(steps[0]) * sum(steps[1]) / (counts[0] * counts[1])
        else:
            programs, passes = tile_pairs * chunks, WINDOWS / chunks
        products = {"forward": 2, "backward_qkv": 5, "backward_q": 3, "backward_kv": 4, "backward_bias": 2}[stage]
        sums = 4.0 * HEADS * queries * keys
        moved = {
            "forward": 4 * tensor + plane + maps,  # q, k, v, out, log-sum-exp
            "backward_qkv": 8 * tensor
            + 2 * plane
            + 4 * share
            + maps,  # d k and d v too; shares, which are then added up
            "backward_q": 6 * tensor + 2 * plane + share + maps,  # q, k, v, out, d out, d q; log-sum-exp, delta
            "backward_kv": 6 * tensor + 2 * plane + 3 * share + 2 * maps,  # d k, d v; shares, which are then added up
            # Sums of each chunk written and read, their sum written and read.
            "backward_bias": 4 * tensor + 2 * plane + maps + 2 * (chunks + 1) * sums,
        }
        work = Work(
            bytes=moved[stage],
            flops=2.0 * products * problem.block_d * pairs,
            exponentials=programs * passes * counted.exponentials * 32 * config.warps,
            instructions=programs * config.warps * (counted.around + passes * body),
        )
        found[stage] = {
            "work": work,
            "counted": {
                "config": [config.block_m, config.block_n, config.warps, config.stages],
                "instructions_of_a_pass": round(body, 1),
                "instructions_around": counted.around,
                "programs": programs,
                "passes": round(passes, 2),
            },
        }
    return found


def _windows_seen(size: int, key_window: int) -> list[int]:
    """Return how many windows see each tile of keys along an axis."""
    margin, last = (key_window - WINDOW) // 2, SIDE // WINDOW - 1
    return [
        min((first + size - 1 + margin) // WINDOW, last) - max(first - margin, 0) // WINDOW + 1
        for first in range(-(-margin % size), SIDE, size)
    ]


def _every_loop(program: list[Instruction]) -> list[Counted]:
    """Return the counts of all innermost loops."""
    return [count(program, number) for number in range(len(loops(program)))]


def _with_edges(program: list[Instruction], exponentials: float) -> float:
    """Return the mean instructions of as many exponentials, in a program with a loop of its own for windows at an edge.

    The mask of these windows makes their loop longer, and it has fewer keys in a pass.
    """
    costs = sorted(each.loop * exponentials / each.exponentials for each in _every_loop(program))
    at_edge = share_at_edge(SIDE // WINDOW, overlapping=False)
    return (1 - at_edge) * costs[0] + at_edge * costs[-1]


# Posterior and modulation

CUDA_KERNELS = {
    # name: (pattern of the function, tensors read, written, bytes of maps a pixel, channels, loops)
    "posterior, no noise": ("PosteriorForward.*BFloat16.*NoiseSourceE0ELb1", 2, 0, 20, LATENT, True),
    "posterior, given noise": ("PosteriorForward.*BFloat16.*NoiseSourceE1ELb1", 3, 1, 20, LATENT, True),
    "posterior, backward": ("PosteriorBackward.*BFloat16.*NoiseSourceE1ELb1", 4, 2, 8, LATENT, True),
    "modulation": ("ModulationForward.*BFloat16ES3_Lb0", 3, 1, 0, CHANNELS, False),
    "modulation, backward": ("ModulationBackward.*BFloat16ES3_", 3, 2, 0, CHANNELS, False),
}
"""Maps of the posterior forwards: divergence and variance written, then the variance read twice, for its statistics
and for the severity, which is written."""


def cuda_work(library: Path) -> dict[str, dict[str, Any]]:
    """Return the work of the CUDA C++ kernels with bfloat16; instructions are those of the loop over channels.

    Args:
        library: The CUDA library.
    """
    from savl.kernels import compile_ahead_of_time

    programs: dict[str, list[Instruction]] = {}
    if library.is_file():
        with tempfile.TemporaryDirectory() as folder:
            command = [compile_ahead_of_time.cuobjdump(), "-xelf", "sm_90", str(library)]
            subprocess.run(command, cwd=folder, capture_output=True, check=True)
            for each in Path(folder).glob("*.cubin"):
                programs |= disassemble(each.read_bytes())
    found = {}
    for name, (pattern, read, written, maps, channels, loop) in CUDA_KERNELS.items():
        elements = float(PIXELS * channels)
        moved = WIDTH * (read + written) * elements + maps * PIXELS
        counted: dict[str, float] = {}
        instructions = 0.0
        for function, program in programs.items():
            if re.search(pattern, function):
                leave = max(place for place, one in enumerate(program) if one.opcode.startswith("EXIT"))
                way = path(program, *(loops(program)[0] if loop else (0, leave))) or []
                loads = sum(one.opcode.startswith("LDG") and "128" in one.opcode for one in way)
                if loads % read == 0 and loads:
                    counted["instructions_an_element"] = round(len(way) / (8 * loads / read), 2)
                    instructions = elements / 32 * counted["instructions_an_element"]
        found[name] = {"work": Work(bytes=moved, instructions=instructions), "counted": counted}
    return found


# The prediction


def predict() -> dict[str, Any]:
    """Return the prediction as JSON values."""
    kernels: dict[str, dict[str, Any]] = {}
    for title, key_window, severity, shifted in (("window", 16, True, True), ("overlapping", 24, False, False)):
        stages = stages_of(Problem("bfloat16", HEAD_DIM, WINDOW, key_window), CAPABILITY)
        for stage, found in attention_work(key_window, severity, shifted, stages).items():
            kernels[f"{title} {stage}"] = found
    # As the network has them elsewhere.
    others = {
        (16, severity, shifted): attention_work(16, severity, shifted, ("forward",))["forward"]
        for severity, shifted in ((True, False), (False, True), (False, False))
    }
    for (_, severity, shifted), found in others.items():
        words = "with" if severity else "without"
        kernels[f"window forward, {words} severity, {'shifted' if shifted else 'not shifted'}"] = found
    kernels |= cuda_work(ROOT / "savl/_cuda.so")
    works: dict[str, Work] = {name: found["work"] for name, found in kernels.items()}
    eager = {
        "window": traffic.window(SIDE),
        "window, backward": traffic.window(SIDE, backward=True),
        "window, sdpa": traffic.window(SIDE, sdpa_peer=True),
        "overlapping": traffic.overlapping(SIDE),
        "posterior, no noise": traffic.posterior(SIDE),
        "posterior, given noise": traffic.posterior(SIDE, noise=True),
        "modulation": traffic.modulation(SIDE),
    }
    network = {fused: traffic.network(SIDE, fused) for fused in (False, True)}
    from triton import __version__ as triton

    report: dict[str, Any] = {
        "predicted": "not measured",
        "triton": triton,
        "sources": kernels_hash(),
        "side": SIDE,
        "kernels": {},
        "ratios": [],
        "eager": {name: [step.facts() for step in found.steps] for name, found in eager.items()},
    }
    for name, found in kernels.items():
        work = found["work"]
        report["kernels"][name] = {
            "bytes": work.bytes,
            "flops": work.flops,
            "exponentials": work.exponentials,
            "instructions": work.instructions,
            **found["counted"],
            "microseconds": {
                gpu.name: {what: round(1e6 * each, 1) for what, each in gpu.floors(work).items()} for gpu in GPUS
            },
        }

    def total(gpu: DataSheet, *names: str) -> float:
        return sum(gpu.seconds(works[name]) for name in names)

    def add(
        what: str, against: str, wanted: float | None, ratios: Mapping[str, float], fused: Mapping[str, float]
    ) -> None:
        row = {"what": what, "against": against, "wanted": wanted}
        row["fused_ms"] = {name: round(1000 * each, 4) for name, each in fused.items()}
        row["ratio"] = {name: round(each, 2) for name, each in ratios.items()}
        report["ratios"].append(row)

    both = tuple(f"window {stage}" for stage in stages_of(Problem("bfloat16", HEAD_DIM, WINDOW, WINDOW), CAPABILITY))
    for what, against, peer, part, names in (
        ("window attention, forward", "eager", "window", "window", both[:1]),
        ("window attention, forward", "sdpa, its bytes alone", "window, sdpa", "window", both[:1]),
        ("window attention, forward and backward", "eager", "window, backward", "window-backward", both),
        ("overlapping attention, forward", "eager", "overlapping", "overlapping", ("overlapping forward",)),
    ):
        wanted = PARTS[part].wanted[against.partition(",")[0]]
        fused = {gpu.name: total(gpu, *names) for gpu in GPUS}
        slow = {gpu.name: eager[peer].seconds(gpu.bytes_per_second, gpu.flops) for gpu in GPUS}
        add(what, against, wanted, {name: slow[name] / each for name, each in fused.items()}, fused)
    for name in ("posterior, no noise", "posterior, given noise", "modulation"):
        fused = {gpu.name: gpu.seconds(works[name]) for gpu in GPUS}
        share = {gpu.name: gpu.floors(works[name])["memory"] / fused[gpu.name] for gpu in GPUS}
        add(name, "memory bandwidth", PARTS[name.partition(",")[0]].wanted[COPY], share, fused)
        slow = {gpu.name: eager[name].seconds(gpu.bytes_per_second, gpu.flops) for gpu in GPUS}
        add(name, "eager", None, {gpu: slow[gpu] / each for gpu, each in fused.items()}, fused)

    def forward_work(step: traffic.Step) -> Work | None:
        if step.name == "savl.window_attention":
            severity, shifted = step.detail
            known = others.get((16, severity, shifted))
            return known["work"] if known else works["window forward"]
        if step.name == "savl.overlapping_window_attention":
            return works["overlapping forward"]
        if step.name == "savl.gaussian_posterior":
            return works["posterior, no noise"]
        return works["modulation"] if step.name == "savl.channel_modulation" else None

    fused = {}
    slow = {}
    for gpu in GPUS:
        slow[gpu.name] = network[False].seconds(gpu.bytes_per_second, gpu.flops)
        fused[gpu.name] = sum(
            gpu.seconds(work) if (work := forward_work(step)) else step.seconds(gpu.bytes_per_second, gpu.flops)
            for step in network[True].steps
        )
    ratios = {name: slow[name] / each for name, each in fused.items()}
    add("savl-base end to end", "eager", PARTS["network"].wanted["eager"], ratios, fused)
    peaks = {name: network[fused].peak for name, fused in (("eager", False), ("fused", True))}
    report["peak_bytes"] = peaks
    share = peaks["eager"] / peaks["fused"]
    add("savl-base end to end, peak memory", "eager", MEMORY_RATIO, {gpu.name: share for gpu in GPUS}, fused)
    return report


LEFT_OUT = """\
The prediction leaves out the following costs, so that real times are longer: the latency of memory and of dependent
instructions; kernel launches; idle multiprocessors at the end of a wave; traffic and bandwidth of the L2 cache; bank
conflicts in shared memory; the issue limits of single units (integer instructions run at half the rate of float32);
clocks below the boost clock; and the fact that memory reaches about 90 % of its nominal bandwidth. In the posterior and
the modulation, the sums over channels and the second kernel (statistics and severity) are counted only as bytes.

Eager and SDPA are predicted only from bytes and products, which makes them look faster too: the prediction leaves out
the sorting for the gradient of a gathered bias, exponentials, launches, and the workspaces of convolutions.
`flex_attention` and `torch.compile` are not predicted, because their kernels depend on choices that the compiler makes
on the GPU.
"""


def page(report: Mapping[str, Any]) -> str:
    """Return the text of docs/predicted-floors.md."""
    lines = [
        "# Predicted times on a GPU",
        "",
        f"This page predicts the minimum times of the kernels of savl-base on {report['side']}×{report['side']} pixels",
        "in bfloat16, from their machine code for sm_90 and from data sheets.",
        "Nothing on this page was measured. `python -m benchmarks.predicted.floors` generates it and needs no GPU;",
        "`python -m benchmarks.gpu_ratios` measures on a GPU. A floor of a kernel is the time that one resource takes",
        "alone, and the largest floor is the prediction. A measured H200 takes up to four times as long",
        "([performance.md](performance.md#on-a-gpu)).",
        "",
        LEFT_OUT,
        "## Ratios",
        "",
        "| predicted | baseline | fused, H100 SXM | ratio, H100 SXM | ratio, H200 | target | result |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in report["ratios"]:
        ratio, wanted = row["ratio"], row["wanted"]
        reached = [] if wanted is None else [name for name, each in ratio.items() if each >= wanted]
        verdict = (
            "within reach" if len(reached) == len(GPUS) else f"only on an {reached[0]}" if reached else "out of reach"
        )
        verdict = "" if wanted is None else verdict
        cost = f"{row['fused_ms'][H100.name]:.3f} ms"
        if "memory" in row["what"]:
            cost = f"{report['peak_bytes']['fused'] / 2**20:.0f} MiB"
        lines.append(
            f"| {row['what']} | {row['against']} | {cost} | {ratio[H100.name]:.2f} | {ratio[H200.name]:.2f} "
            f"| {'' if wanted is None else f'{wanted:g}'} | {verdict} |"
        )
    lines += [
        "",
        "A ratio is the predicted time of the baseline divided by that of the fused kernels. Against memory bandwidth,",
        "it is the share of the bandwidth that the prediction reaches.",
        "",
        "## Floors",
        "",
        "Times are in microseconds on an H100 SXM. An H200 differs only in memory, which has a column of its own.",
        "Tiles are given as queries × keys / warps. The instructions of attention are those of a thread in one",
        "iteration of the loop over tiles, and then those outside the loop. The instructions of posterior and",
        "modulation are per element.",
        "",
        "| kernel | tiles | instructions | memory | memory, H200 | tensor cores | exponentials | instruction issue |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in report["kernels"].items():
        floors, other = found["microseconds"][H100.name], found["microseconds"][H200.name]
        tiles, instructions = "", str(found.get("instructions_an_element", "not counted"))
        if "config" in found:
            m, n, warps, _ = found["config"]
            tiles = f"{m}×{n}/{warps}"
            instructions = f"{found['instructions_of_a_pass']:g}, {found['instructions_around']}"
        highest = max(floors.values())
        cells = [
            floors["memory"],
            other["memory"],
            floors["tensor cores"],
            floors["exponentials"],
            floors["instructions"],
        ]
        shown = [f"**{each:g}**" if each == highest and place != 1 else f"{each:g}" for place, each in enumerate(cells)]
        lines.append(f"| {name} | {tiles} | {instructions} | {' | '.join(shown)} |")
    lines += ["", "## Bytes that eager moves", ""]
    lines += ["The lists contain the operations that move more than 1 % of all bytes, in the order of execution.", ""]
    for name, steps in report["eager"].items():
        moved = sum(step["bytes"] for step in steps)
        large = [f"{step['op']} {step['bytes'] / 1e6:.0f}" for step in steps if step["bytes"] > moved / 100]
        lines += [f"- **{name}**, {moved / 1e9:.2f} GB; in MB: {', '.join(large)}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Predict, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", default=COMMITTED, help="file to write the figures to")
    parser.add_argument(
        "--page", action="store_true", help="write docs/predicted-floors.md from the committed figures alone"
    )
    arguments = parser.parse_args()
    if not arguments.page:
        report = predict()
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, (json.dumps(report, indent=1) + "\n").encode())
        if arguments.json != COMMITTED:
            print(page(report))
            return 0
    report = json.loads(COMMITTED.read_text(encoding="utf-8"))
    write_atomically(PAGE, page(report).encode())
    print(page(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
