"""`savl upscale`: upscale image files and videos."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from savl.cli import options
from savl.command_line import UsageError, exit_with_error, option_value

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from savl.cli.progress import ProgressReport
    from savl.inference.enlarge import OnTile

EXAMPLES = "\n".join(
    [
        "[bold]Examples[/bold]",
        "savl upscale photo.jpg   [dim]writes photo_x4.jpg in the same folder[/dim]",
        "savl upscale photo.jpg -o large.png",
        "savl upscale holiday/ -r -o large/   [dim]a folder with its subfolders[/dim]",
        "savl upscale '*.png' -o out/ --scale 2",
        "savl upscale - -o - -f png <photo.jpg >large.png   [dim]standard input and output[/dim]",
        "savl upscale old.jpg --strength 0.5   [dim]restore with half the strength[/dim]",
        "savl upscale scan.tif --model Real_HAT_GAN_SRx4.pth --tile 256",
        "savl upscale photos/ -r -o large/ --ray   [dim]on the workers of a Ray cluster[/dim]",
        "savl upscale clip.mp4   [dim]a video: writes clip_x4.mp4, with its sound[/dim]",
        "savl upscale anime.png --model 4x-AnimeSharp.pth   [dim]any model that spandrel loads[/dim]",
    ]
)


def upscale(
    inputs: options.ImagesAndVideos,
    output: options.Output = None,
    recursive: options.Recursive = False,
    exclude: options.Exclude = None,
    include_results: options.IncludeResults = False,
    scale: Annotated[
        float | None,
        typer.Option(
            "--scale",
            "-s",
            metavar="X",
            help="Output size divided by input size, any number above 0. Default: the scale of the network.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    image_format: Annotated[
        Literal["auto", "png", "jpg", "webp", "tiff"],
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="png, jpg, webp, tiff, or auto: that of the input. JPEG has no transparency, which is flattened onto "
            "white; JPEG and WebP store 8 bits.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = "auto",
    quality: Annotated[
        int,
        typer.Option(
            "--quality",
            "-q",
            metavar="Q",
            min=1,
            max=100,
            help="1 to 100, for JPEG and WebP; WebP at 100 is lossless.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = 95,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix",
            metavar="TEXT",
            help="Text added to the names: out gives photo_out.jpg. Default: x4 (the scale) beside the inputs, "
            "nothing in a folder OUT.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    severity_map: Annotated[
        bool,
        typer.Option(
            "--severity-map",
            help="Also write a plot of the estimated severity of each pixel's degradation, as OUTPUT_severity.png.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = False,
    strength_map: Annotated[
        bool,
        typer.Option(
            "--strength-map",
            help="Also write a plot of how strongly each pixel is restored, as OUTPUT_strength.png.",
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = False,
    page: options.Page = None,
    model: options.Model = "savl-tiny",
    strength: options.Strength = "auto",
    tile: options.Tile = None,
    tile_pad: options.TilePad = 32,
    dtype: options.AutomaticDtype = "auto",
    device: options.Device = "auto",
    eager: options.Eager = False,
    video_codec: Annotated[
        Literal["auto", "h264", "hevc", "vp9", "av1"],
        typer.Option(
            "--video-codec",
            metavar="CODEC",
            help="h264, hevc, vp9, av1, or auto: h264, or hevc for more than 8 bits or 4096x2304 pixels; in WebM, vp9 "
            "or av1.",
            rich_help_panel=options.VIDEO_PANEL,
        ),
    ] = "auto",
    crf: Annotated[
        int | None,
        typer.Option(
            "--crf",
            metavar="Q",
            min=0,
            max=63,
            help="Quality of the encoder: 0 is best; up to 51 for h264 and hevc, 63 for vp9 and av1. Default: 18 for "
            "h264, 20 for the others.",
            rich_help_panel=options.VIDEO_PANEL,
        ),
    ] = None,
    threads: options.Threads = None,
    ray: options.Ray = None,
    workers: options.Workers = None,
    debug: options.Debug = False,
) -> None:
    r"""Upscale images, and videos that are named.

    Bit depth, transparency, colour profile and EXIF are kept, and files are written atomically: complete or not at all.

    An image that cannot be read is reported and skipped, and makes the exit code 1.

    A video (MP4, MKV, MOV, WebM and others) keeps sound, subtitles, times and colours; it needs pip install
    'savl\[video]'. The same command continues a video after an interruption.
    """
    started, started_at = time.monotonic(), time.time()
    from savl.cli.loop import Loop, Operation, process_files
    from savl.images.job import Job, Work, in_short
    from savl.images.result_mark import UPSCALED
    from savl.images.write import ProcessedFile
    from savl.inference.device import checked_device, checked_dtype
    from savl.inference.enlarge import check_scale
    from savl.inference.process_settings import use_threads
    from savl.inference.upscale_file import SEVERITY_ENDING, STRENGTH_ENDING, EnlargeWork
    from savl.inference.upscale_image import as_upscaler
    from savl.ops.scopes import fused_by_default
    from savl.video.av_import import VideoUnavailable
    from savl.video.container import codec_named
    from savl.video.upscale import VideoWork, check_crf

    with option_value("--dtype"):
        chosen_dtype = None if dtype == "auto" else checked_dtype(dtype, also=("auto",))
    with option_value("--device"):
        checked_device(device if ray is None or device != "cuda" else "auto")
    with option_value("--scale"):
        if scale is not None:
            check_scale(scale)
    codec = codec_named(video_codec)
    with option_value("--crf"):
        check_crf(crf, codec)
    chosen_strength = options.strength_value(strength)
    use_threads(threads)
    reports: list[ProgressReport] = []
    wanted = {SEVERITY_ENDING: severity_map, STRENGTH_ENDING: strength_map}
    endings = tuple(ending for ending, write in wanted.items() if write)

    def load() -> tuple[str, Work]:
        try:
            upscaler = as_upscaler(
                model,
                strength=chosen_strength,
                tile=tile,
                tile_pad=tile_pad,
                device=device if ray is None else "cpu",
                dtype=chosen_dtype,
            )
        except Exception as error:
            if debug:
                raise
            reason = in_short(error)
            raise UsageError(reason if model in reason else f"model {model}: {reason}") from error
        if severity_map and not getattr(upscaler, "has_field", True):
            raise UsageError(
                f"--severity-map: model {model} has no degradation field, so that it estimates no severity"
            )
        images = EnlargeWork(upscaler, endings, scale=scale, quality=quality, overwrite=overwrite, page=page)
        videos = VideoWork(upscaler, codec=codec, crf=crf, scale=scale, overwrite=overwrite)

        def work(job: Job, target: Path | None, maps: tuple[Path | None, ...], on_tile: OnTile) -> ProcessedFile:
            if job.format is not None:
                return images(job, target, maps, on_tile)
            return videos(job, on_tile, lambda text: reports[-1].note(job.source, text))

        return f"x{upscaler.scale if scale is None else scale:g}", work

    cluster = contextlib.ExitStack()

    def make_loop(jobs: Sequence[Job]) -> Loop:
        """Connect to the cluster, and return the loop over the files there."""
        assert ray is not None
        name, content = model_for_workers(model)
        settings = Settings(
            model=name,
            version=version(),
            started=started_at,
            output_url=None if place is None else place.url,
            strength=chosen_strength,
            tile=tile,
            tile_pad=tile_pad,
            dtype=None if dtype == "auto" else dtype,
            eager=eager,
            map_endings=endings,
            scale=scale,
            quality=quality,
            overwrite=overwrite,
            page=page,
        )
        start = cluster.enter_context(
            cluster_starter(ray, settings=settings, content=content, device=device, workers=workers, threads=threads)
        )
        return ClusterLoop(jobs, start, place, overwrite, debug)

    try:
        if ray is None and workers is not None:
            raise UsageError("--workers needs --ray")
        if ray is None and output is not None and "://" in output:
            raise UsageError(f"-o {output} is a URL, to which only --ray writes")
        if ray is not None:
            from savl.cli.cluster import ClusterLoop, check_arguments, cluster_starter, open_output
            from savl.distributed.cluster import model_for_workers
            from savl.distributed.ray_import import RayUnavailable, import_ray
            from savl.distributed.storage import local_path
            from savl.distributed.worker import Settings
            from savl.version import version

            check_arguments(ray, inputs, output, device)
            try:
                import_ray()
            except RayUnavailable as error:
                exit_with_error(error, 1)
            output = output and (local_path(output) or output)
            place = open_output(output, inputs)
        operation = Operation(
            UPSCALED,
            r"(?:_p\d+)?_x\d+(?:\.\d+)?",
            lossless=False,
            map_endings=endings,
            prepare=load,
            make_loop=None if ray is None else make_loop,
            videos=True,
            on_report=reports.append,
        )
        with cluster, fused_by_default(eager=eager):
            done = process_files(
                operation,
                inputs,
                output,
                recursive=recursive,
                exclude=exclude,
                include_results=include_results,
                suffix=suffix,
                format_name=image_format,
                overwrite=overwrite,
                page=page,
                debug=debug,
                started=started,
            )
    except VideoUnavailable as error:
        exit_with_error(error, 1)
    except UsageError as error:
        exit_with_error(error, 2)
    raise typer.Exit(0 if done else 1)
