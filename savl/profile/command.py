r"""``savl profile`` shows what the time of a step is spent on. With ``--guide`` it prints this page.

``python -m savl.profile`` is the same command.

torch.profiler, on any device
    python -m savl.profile --model savl-base --size 64x64
    python -m savl.profile --model savl-base --size 64x64 --backend eager --trace step.json.gz

  prints two tables. One lists the operations (on a GPU, the kernels) by their own time, the other the named ranges: the
  stages of the network, its blocks, and the ops with the backend that serves them. Open the trace in https://ui.perfetto.dev.
  If an op shows "eager" where you expected another backend, `savl kernels info` gives the reason.

  Look at the share of an op in the table of ranges first. An op that takes 5 % of a step can make it at most 5 %
  faster.

Roofline of the device
    python -m savl.profile --model savl-base --size 512x512 --dtype bfloat16 --roofline roofline.svg

  Points under the slope are limited by memory: gaussian_posterior, channel_modulation and layer_norm. They should be
  near the slope. If one reaches half of it or less, bytes are moved twice, or the launch takes longer than the kernel.
  Attention is near the ridge or right of it. It does not reach the flat roof, because it is limited by exponentials and
  instructions instead of products. The convolution, the first layer of an MLP, is limited by products on a CPU and
  should be near the flat roof there.
  docs/predicted-floors.md has a floor for each kernel and resource on an H100.

Nsight Systems: is the GPU busy?
    nsys profile -c cudaProfilerApi --capture-range-end=stop -t cuda,nvtx,osrt -o step --force-overwrite=true \
        python -m savl.profile --capture --device cuda --model savl-base --size 512x512 --dtype bfloat16 --steps 5
    nsys stats --report cuda_gpu_kern_sum,nvtx_gpu_proj_sum,nvtx_sum,cuda_api_sum step.nsys-rep

  --capture warms up first, so that compilation is not recorded, and then runs the steps between cudaProfilerStart and
  cudaProfilerStop.

  - cuda_gpu_kern_sum lists the time of the GPU by kernel.
  - nvtx_gpu_proj_sum lists the same time by range, such as "group 0 HAB 1" or "window_attention [triton]". The time of
    a range is that of the kernels launched in it; nvtx_sum lists the time of the CPU in a range.
  - The launch gap: add up the kernels of cuda_gpu_kern_sum and compare the sum with "step" in nvtx_gpu_proj_sum. If the
    sum is far smaller, the GPU waits for the CPU: in cuda_api_sum, cudaLaunchKernel takes as long as the kernels, and
    the timeline shows gaps between kernels of a few microseconds. Faster kernels do not help then. Use larger tiles or
    batches, or CUDA graphs (`savl.Upscaler` uses them by itself for tiles that share a shape).
  - cudaStreamSynchronize, cudaMemcpy or cudaMalloc inside a step indicate a mistake.
  - With --train, the backward pass runs in the thread of the forward pass, so that its kernels are in "backward".

Nsight Compute: what limits one kernel?
    ncu --profile-from-start off --nvtx --nvtx-include "window_attention \[triton\]/" \
        --kernel-name forward --launch-skip 4 --launch-count 2 \
        --section SpeedOfLight --section SpeedOfLight_RooflineChart --section MemoryWorkloadAnalysis \
        --section Occupancy --section LaunchStats --section WarpStateStats --section SchedulerStats \
        -o window_forward python -m savl.profile --capture --device cuda --model savl-base --size 512x512 \
        --dtype bfloat16 --warm-up 3 --steps 1
    ncu --import window_forward.ncu-rep --page details

  `python -m benchmarks.gpu_kernels --ncu FILE` does this for every op with Triton kernels, forward and backward.

  The Triton kernels (kernels/attention*.py) are forward in inference, and with --train also backward_qkv (or
  backward_q and backward_kv) and backward_bias, in the range "backward":

    ncu --profile-from-start off --nvtx --nvtx-include "backward/" --kernel-name "regex:^backward_(qkv|q|kv|bias)$" \
        --launch-count 3 --section SpeedOfLight --section Occupancy --section WarpStateStats -o window_backward \
        python -m savl.profile --capture --device cuda --train --model savl-base --size 64x64 --dtype bfloat16 --steps 1

  CUDA kernels (csrc/cuda) are all one template, `kernel<...>`;
  the demangled name tells them apart: GaussianPosteriorForward, GaussianPosteriorBackward, MergeMoments,
  NormaliseSeverity, ChannelModulationForward, ChannelModulationBackward:

    ncu --profile-from-start off --kernel-name-base demangled --kernel-name "regex:Posterior|Moments|Severity" \
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy -o posterior \
        python -m savl.profile --capture --device cuda --model savl-base --size 512x512 --dtype bfloat16 --steps 1

  In a filter, "/" stands for a range that is pushed and popped, and brackets in a name need a backslash. "group 0 HAB
  1/*/window_attention \[triton\]/" selects the op of one block. ncu runs a kernel several times and flushes the caches,
  so that its time differs from that in a step. ERR_NVGPUCTRPERM means that the administrator must allow profiling
  counters.

  Check the sections in this order:

  - SpeedOfLight lists compute and memory throughput in % of the peak. If either is above 80 %, it is the limit. If both
    are below 60 %, latency is the limit; check stalls and occupancy.
  - SpeedOfLight_RooflineChart shows the position on the roofline. Attention should be right of the ridge, and posterior
    and modulation on the slope or close below it.
  - MemoryWorkloadAnalysis lists the bytes read from and written to DRAM. Compare them with the compulsory bytes of
    --roofline; if they are twice as many, something is read twice. The L2 hit rate should be high for overlapping
    attention, because neighbouring windows share keys. The modulation reads every byte once, so that only its writes
    hit. There should be no bank conflicts in shared memory.
  - Occupancy lists achieved and theoretical occupancy, and what limits the latter (registers or shared memory).
    docs/kernel-resources.md has the figures of the compiler. If the achieved occupancy is far below the theoretical
    one, there are too few blocks, or the last wave is nearly empty. A larger image shows which of the two is the case.
  - WarpStateStats lists the reasons of stalls. Long scoreboard: the warps wait for global memory; use more stages or
    more warps. Short scoreboard or MIO throttle: they wait for shared memory or exponentials. Barrier: the warps of a
    block wait for each other. Math pipe throttle (the units are busy) and not selected (there are enough warps) are
    good signs.

  docs/predicted-floors.md predicts what to expect for savl-base at 512×512 in bfloat16 on an H100: the instructions
  issued are the limit of all attention kernels, then exponentials, and memory takes less than half of their time; the
  posterior and the modulation are limited by memory. A kernel that takes more than twice its floor should be
  examined.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from savl.command_line import exit_with_error
from savl.interrupts import raise_on_interrupt

if TYPE_CHECKING:
    from savl.profile.workload import Workload

EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl profile --model savl-base --size 64x64",
        "savl profile --model savl-base --train --batch 4 --trace step.json.gz",
        "savl profile --backend eager --roofline roofline.svg",
        "savl profile --guide   [dim]How to use Nsight Systems and Nsight Compute[/dim]",
    ]
)


def _print_guide(wanted: bool) -> None:
    if wanted:
        typer.echo((__doc__ or "").rstrip())
        raise typer.Exit


def profile(
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="NAME|FILE", help="savl-tiny, savl-base, hat-s, hat, hat-l, or a file of weights."
        ),
    ] = "savl-tiny",
    size: Annotated[str, typer.Option("--size", metavar="HxW", help="Size of the input in pixels.")] = "64x64",
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Number of images in a step.")] = 1,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16. With --train: dtype of autocast."),
    ] = "float32",
    backend: Annotated[
        str | None,
        typer.Option("--backend", metavar="fused|eager", help="Kernels to use. Default: SAVL_KERNELS, or else fused."),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    train: Annotated[
        bool, typer.Option("--train", help="Profile a training step: forward, backward, optimizer.")
    ] = False,
    warm_up: Annotated[
        int, typer.Option("--warm-up", metavar="N", min=0, help="Number of steps before the measurement.")
    ] = 3,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Number of steps to time, and to profile.")
    ] = 5,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a Chrome trace: .json or .json.gz.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all operations and ranges as JSON.")
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Number of operations in the table.")] = 15,
    capture: Annotated[
        bool, typer.Option("--capture", help="Run the steps for nsys or ncu, without torch.profiler.")
    ] = False,
    roofline: Annotated[
        Path | None,
        typer.Option("--roofline", metavar="FILE", help="Also draw a roofline: .svg, .pdf or .png."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    guide: Annotated[
        bool,
        typer.Option("--guide", help="Print a guide to profiling, and exit.", callback=_print_guide, is_eager=True),
    ] = False,
) -> None:
    """Show how the time of one step of a network is distributed: over operations, stages, blocks and ops.

    The exit code is 1 if a file cannot be written, and 2 if an option is invalid or not supported on this machine.
    """
    try:
        workload = _workload(model, size, batch, dtype, device, train)
        _check_options(backend, capture, trace, roofline, as_json, workload)
    except (ValueError, OSError) as error:
        exit_with_error(error, 2)
    try:
        with raise_on_interrupt(), _kernels(backend):
            if capture:
                _capture(workload, warm_up, steps)
                return
            _check_targets((trace, roofline, as_json), overwrite)
            _print_profile(workload, warm_up, steps, top, trace, as_json, overwrite)
            if roofline is not None:
                height, width = _size(size)
                _print_roofline(workload, height, width, batch, dtype, roofline, overwrite)
    except FileExistsError as error:
        exit_with_error(f"{error.filename} exists already (--overwrite replaces it)", 1)
    except OSError as error:
        exit_with_error(error, 1)


def _size(text: str) -> tuple[int, int]:
    from savl.profile.workload import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def _workload(model: str, size: str, batch: int, dtype: str, device: str, train: bool) -> Workload:
    from savl.inference.device import checked_device
    from savl.profile.workload import DTYPES, find_model, make_workload

    height, width = _size(size)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    where = checked_device(device)
    network = find_model(model)
    name = Path(model).name
    return make_workload(
        network, name, height=height, width=width, batch=batch, dtype=DTYPES[dtype], device=where, train=train
    )


def _check_options(
    backend: str | None,
    capture: bool,
    trace: Path | None,
    roofline: Path | None,
    as_json: Path | None,
    workload: Workload,
) -> None:
    if backend not in (None, "fused", "eager"):
        raise ValueError(f"--backend must be fused or eager, got {backend!r}")
    if trace is not None and not trace.name.endswith((".json", ".json.gz")):
        raise ValueError(f"--trace must end in .json or .json.gz, got {str(trace)!r}")
    if roofline is not None and roofline.suffix.lower() not in (".svg", ".pdf", ".png"):
        raise ValueError(f"--roofline must end in .svg, .pdf or .png, got {str(roofline)!r}")
    if roofline is not None and find_spec("matplotlib") is None:
        raise ValueError("--roofline draws with matplotlib, which is not installed: pip install 'savl[profile]'")
    if capture and (trace or roofline or as_json):
        raise ValueError("--capture is for nsys or ncu: it goes with neither --trace nor --roofline nor --json")
    if capture and workload.device.type != "cuda":
        raise ValueError(f"--capture is for nsys and ncu, which record CUDA: the device is {workload.device}")


def _check_targets(targets: Iterable[Path | None], overwrite: bool) -> None:
    """Refuse files that cannot be written before the work starts."""
    from savl.atomic_write import check_writable

    for path in targets:
        if path is not None:
            check_writable(path, overwrite=overwrite)


def _kernels(backend: str | None) -> AbstractContextManager[Any]:
    from savl.ops.scopes import fused_by_default
    from savl.ops.switch import use_fused_kernels

    return fused_by_default() if backend is None else use_fused_kernels(backend == "fused")


def _capture(workload: Workload, warm_up_steps: int, steps: int) -> None:
    import torch

    from savl.profile.measure import warm_up
    from savl.profile.workload import synchronise

    warm_up(workload, warm_up_steps)
    torch.cuda.profiler.start()
    try:
        with workload.ranges():
            for _ in range(steps):
                workload.step()
            synchronise(workload.device)
    finally:
        torch.cuda.profiler.stop()
    typer.echo(f"{workload.title}: {steps} steps between cudaProfilerStart and cudaProfilerStop", err=True)


def _print_profile(
    workload: Workload,
    warm_up_steps: int,
    steps: int,
    top: int,
    trace: Path | None,
    as_json: Path | None,
    overwrite: bool,
) -> None:
    from rich.console import Console

    from savl.profile.measure import profile as profile_steps
    from savl.profile.measure import write_json, write_trace
    from savl.profile.output import operations_table, ranges_table

    console = Console(highlight=False)
    on_gpu = workload.device.type == "cuda"
    found, profiler = profile_steps(workload, warm_up_steps=warm_up_steps, steps=steps)
    if trace is not None:
        write_trace(profiler, trace, overwrite=overwrite)
    if as_json is not None:
        write_json(found, workload.title, as_json, overwrite=overwrite)
    console.print(operations_table(found, top, on_gpu))
    console.print(ranges_table(found, on_gpu))
    console.print(
        f"{workload.title}: median step {1000 * found.seconds:.3f} ms of {steps}; {1000 * found.profiled_seconds:.3f} "
        "ms with the profiler",
        markup=False,
        soft_wrap=True,
    )
    if trace is not None:
        console.print(f"trace: {trace}", markup=False, soft_wrap=True)


def _print_roofline(
    workload: Workload, height: int, width: int, batch: int, dtype: str, path: Path, overwrite: bool
) -> None:
    from rich.console import Console

    from savl.profile.figure import draw_roofline, save_roofline
    from savl.profile.output import roofline_table
    from savl.profile.roofline import measure_roofline
    from savl.profile.workload import DTYPES

    found = measure_roofline(
        workload.model.config, height=height, width=width, batch=batch, dtype=DTYPES[dtype], device=workload.device
    )
    name = workload.title.partition(",")[0]
    save_roofline(
        draw_roofline(found, f"the ops of {name} at {batch}×{height}×{width} pixels"), path, overwrite=overwrite
    )
    console = Console(highlight=False)
    console.print(roofline_table(found))
    console.print(f"roofline: {path}", markup=False, soft_wrap=True)
