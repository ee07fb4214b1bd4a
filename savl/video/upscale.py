"""`savl.video.upscale_video`: upscale one video file to another, as `savl upscale` does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from savl.images.errors import OutputExists, UnsupportedImage, UnwritableImage
from savl.images.locks import lock_output
from savl.images.result_mark import digest_origin
from savl.images.write import ProcessedFile, output_errors, prepare_output
from savl.inference.enlarge import ByBitDepth, ImageUpscaler, OnTile, Strength, check_scale, enlarge, output_size
from savl.inference.upscale_file import IN_BFLOAT16
from savl.inference.upscale_image import as_upscaler
from savl.interrupts import raise_if_interrupted
from savl.version import version
from savl.video.av_import import import_av
from savl.video.container import CONTAINERS, VideoCodec, VideoContainer, codec_named, container_of_suffix
from savl.video.encode import Encoding, SegmentEncoder, choose_encoding
from savl.video.join import choose_copies, join
from savl.video.read import VideoFile
from savl.video.segments import FRAMES_PER_SEGMENT, SegmentFolder

if TYPE_CHECKING:
    from savl.images.job import Job
    from savl.inference.upscale_image import Model

OnNote = Callable[[str], None]


@dataclass(frozen=True)
class UpscaledVideo(ProcessedFile):
    """Record of a video that was upscaled.

    Attributes:
        frames: Number of frames of the output.
        continued: How many of them an earlier, interrupted run had upscaled.
    """

    frames: int = 0
    continued: int = 0


def upscale_video(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: Model = "savl-tiny",
    scale: float | None = None,
    strength: Strength | None = None,
    video_codec: str = "auto",
    crf: int | None = None,
    overwrite: bool = False,
    tile: int | None = None,
    tile_pad: int = 32,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    on_frame: OnTile | None = None,
    on_note: OnNote | None = None,
) -> UpscaledVideo:
    """Upscale a video file to another, as `savl upscale` does.

    Each frame is upscaled by itself, in memory that does not depend on the length of the video. Sound, subtitles,
    chapters and metadata are copied; the time and the duration of each frame, rotation, shape of the pixels, and colour
    range, matrix, primaries and transfer are kept. The output appears complete or not at all.

    Finished frames are kept in a hidden folder beside the output until it is complete. If this function is interrupted
    or the process is killed, call it again with the same arguments to continue.

    Args:
        path: File to read.
        output: File to write; its suffix selects the container: .mp4, .m4v, .mov, .mkv or .webm. Missing folders are
            created.
        model: As for `savl.upscale`.
        scale: Output pixels per input pixel; None is that of the network. If a side of the result would be odd, its
            last row or column is cut off, because the encoders need even sides.
        strength: How strongly the frames are restored, as for `savl.upscale`.
        video_codec: "h264", "hevc", "vp9" or "av1". "auto" is H.264, or HEVC for frames with more than 8 bits or more
            than 4096x2304 pixels; in WebM, it is VP9 or AV1.
        crf: Quality of the encoder, from 0 (best) to 51 for H.264 and HEVC, or 63 for VP9 and AV1. None is 18 for H.264
            and 20 for the others.
        overwrite: Replace an existing file.
        tile: Side of the tiles in input pixels. None chooses it by the free memory; 0 disables tiling.
        tile_pad: Context around each tile, in input pixels.
        device: Where to compute, as for `savl.upscale`.
        dtype: Dtype in which the network computes, as for `savl.upscale`.
        on_frame: Callback, called with (frames done by this call, frames of this call) after every frame.
        on_note: Callback, called at once with every sentence of the `notes` of the result, and where the frames are
            kept if this function fails or is interrupted.

    Returns:
        The sizes in pixels, the number of frames, and notes about what is not kept.

    Raises:
        VideoUnavailable: PyAV is not installed: ``pip install 'savl[video]'``.
        TypeError, ValueError: An argument is not accepted; the message names it.
        OutputExists: The output exists, and `overwrite` is false.
        ImageFileError: The input cannot be read, the output cannot hold one of its streams, or cannot be written.
        RuntimeError: Memory ran out, or the network returned NaN.
    """
    for name, value in (("path", path), ("output", output)):
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    target = Path(output)
    codec = codec_named(video_codec)
    container = container_for(target, codec)
    check_crf(crf, codec)
    if scale is not None:
        check_scale(scale)
    import_av()
    upscaler = as_upscaler(model, strength=strength, tile=tile, tile_pad=tile_pad, device=device, dtype=dtype)
    with lock_output(target) as lock:
        if not lock.acquired:
            raise UnwritableImage(target, "another process is writing it")
        return enlarge_video(
            Path(path),
            target,
            upscaler,
            container=container,
            codec=codec,
            crf=crf,
            scale=scale,
            overwrite=overwrite,
            on_frame=on_frame,
            on_note=on_note,
        )


def container_for(target: Path, codec: VideoCodec | None) -> VideoContainer:
    """Return the container of an output by its suffix.

    Raises:
        ValueError: It is none that savl writes, or does not hold the codec.
    """
    container = container_of_suffix(target)
    if container is None:
        suffixes = " ".join(suffix for each in CONTAINERS for suffix in each.suffixes)
        raise ValueError(f"output must end in one of {suffixes}, got {os.fspath(target)!r}")
    if codec is not None and codec not in container.codecs:
        held = " or ".join(each.name for each in container.codecs)
        raise ValueError(f"{container.title} files hold {held} here, not {codec.name} (video_codec)")
    return container


def check_crf(crf: object, codec: VideoCodec | None) -> None:
    """Check the quality of the encoder.

    Raises:
        ValueError: It is neither None nor an int that the codec accepts.
    """
    highest = 51 if codec is None else codec.max_crf
    if crf is not None and (not isinstance(crf, int) or isinstance(crf, bool) or not 0 <= crf <= highest):
        raise ValueError(f"crf must be an int from 0 to {highest}, got {crf!r}")


@dataclass(frozen=True)
class VideoWork:
    """Work of `savl upscale` on one video.

    Attributes:
        upscaler: The network.
        codec: The codec; None chooses it.
        crf: Quality of the encoder; None for the default of the codec.
        scale: Output pixels per input pixel; None is that of the upscaler.
        overwrite: Replace existing files.
    """

    upscaler: ImageUpscaler
    codec: VideoCodec | None = None
    crf: int | None = None
    scale: float | None = None
    overwrite: bool = False

    def __call__(self, job: Job, on_frame: OnTile, on_note: OnNote) -> UpscaledVideo:
        """Upscale the video of a job; the notes have been passed to `on_note` and are not in the result."""
        done = enlarge_video(
            job.source,
            job.target,
            self.upscaler,
            container=container_for(job.target, self.codec),
            codec=self.codec,
            crf=self.crf,
            scale=self.scale,
            overwrite=self.overwrite,
            on_frame=on_frame,
            on_note=on_note,
        )
        return replace(done, notes=())


def enlarge_video(
    source: Path,
    target: Path,
    upscaler: ImageUpscaler,
    *,
    container: VideoContainer,
    codec: VideoCodec | None = None,
    crf: int | None = None,
    scale: float | None = None,
    overwrite: bool = False,
    on_frame: OnTile | None = None,
    on_note: OnNote | None = None,
) -> UpscaledVideo:
    """Upscale a video file whose output no other process writes.

    Args:
        source: File to read.
        target: File to write. Missing folders are created.
        upscaler: The network.
        container: Container of the output.
        codec: Codec of the output; None chooses it.
        crf: Quality of the encoder; None for the default of the codec.
        scale: Output pixels per input pixel; None is that of the upscaler.
        overwrite: Replace an existing file.
        on_frame: As for `upscale_video`.
        on_note: As for `upscale_video`.

    Raises:
        VideoUnavailable, OutputExists, ImageFileError, RuntimeError: As for `upscale_video`.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if on_note is not None:
            on_note(text)

    with VideoFile(source) as video:
        info = video.info
        factor = upscaler.scale if scale is None else check_scale(scale)
        width, height = (side - side % 2 for side in output_size(info.width, info.height, factor))
        if min(width, height) == 0:
            raise UnsupportedImage(source, "its result has a side of 1 pixel, which the encoders do not accept")
        try:
            encoding, loss = choose_encoding(info, (width, height), container, codec, crf)
        except ValueError as error:
            raise UnwritableImage(target, str(error)) from error
        copies = choose_copies(video, target, container)
        prepare_output(target, overwrite=overwrite)
        for text in (*info.notes, *([] if loss is None else [loss]), *copies.notes):
            note(text)
        network = upscaler
        if isinstance(upscaler, ByBitDepth):
            network = upscaler.for_samples(np.dtype(np.uint8 if encoding.bits == 8 else np.uint16))
        with output_errors(target):
            folder = SegmentFolder(target, _settings(source, video, network, factor, encoding))
        if folder.changed:
            note(f"an earlier run with other settings ({', '.join(folder.changed)}) is not continued")
        continued = folder.frames
        if continued:
            note(f"continues an earlier run: {continued} of {info.frames} frames are finished")
        joined = folder.path / f"joined{target.suffix}"
        try:
            _upscale_frames(video, network, factor, encoding, folder, target, on_frame)
            join(video, copies, folder.segments, encoding, container, joined, target)
            _publish(joined, target, overwrite=overwrite)
        except BaseException:
            joined.unlink(missing_ok=True)  # a disk that is full needs the space
            folder.remove_if_empty()
            if folder.count and on_note is not None:
                on_note(
                    f"{folder.frames} of {info.frames} frames are kept in {folder.path}; "
                    "the same command continues after them"
                )
            raise
        folder.remove()
        in_bfloat16 = isinstance(upscaler, ByBitDepth) and encoding.bits == 8
        return UpscaledVideo(
            (info.width, info.height),
            (width, height),
            tuple(notes),
            (IN_BFLOAT16,) if in_bfloat16 else (),
            folder.frames,
            continued,
        )


def _upscale_frames(
    video: VideoFile,
    upscaler: ImageUpscaler,
    scale: float,
    encoding: Encoding,
    folder: SegmentFolder,
    target: Path,
    on_frame: OnTile | None,
) -> None:
    """Upscale and encode the frames that are not in the folder, one after another."""
    total = max(1, video.info.frames - folder.frames)
    encoder: SegmentEncoder | None = None
    for done, picture in enumerate(video.pictures(skip=folder.frames), start=1):
        if encoder is None:
            encoder = SegmentEncoder(encoding, target)
        pixels: NDArray[np.float32] = picture.rgb.numpy()
        enlarged = enlarge(pixels, upscaler, scale=scale, on_tile=_check_interrupt).pixels
        encoder.add(enlarged, picture.pts, picture.duration)
        if encoder.frames == FRAMES_PER_SEGMENT:
            _store(folder, encoder, target)
            encoder = None
        if on_frame is not None:
            on_frame(done, max(done, total))
    if encoder is not None:
        _store(folder, encoder, target)


def _store(folder: SegmentFolder, encoder: SegmentEncoder, target: Path) -> None:
    segment = encoder.finish()
    with output_errors(target):
        folder.append(segment)


def _check_interrupt(done: int, total: int) -> None:
    raise_if_interrupted()


def _publish(joined: Path, target: Path, *, overwrite: bool) -> None:
    """Rename the complete file to the output."""
    with output_errors(target):
        descriptor = os.open(joined, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # Checked again, because hours of work may lie between the first check and here.
        if os.path.exists(target) and not overwrite:
            raise OutputExists(target, "exists already")
        os.replace(joined, os.path.realpath(target))


def _settings(
    source: Path, video: VideoFile, upscaler: ImageUpscaler, scale: float, encoding: Encoding
) -> dict[str, object]:
    """Return everything on which the encoded frames depend, for `SegmentFolder`."""
    av = import_av()
    return {
        "input": f"{digest_origin(source)} {os.path.getsize(source)}",
        "model": _digest(upscaler),
        "strength": str(getattr(upscaler, "strength", None)),
        "dtype": str(getattr(upscaler, "dtype", None)),
        "tile": f"{getattr(upscaler, 'tile', None)} {getattr(upscaler, 'tile_pad', None)}",
        "scale": scale,
        "video codec": encoding.codec.name,
        "crf": encoding.crf,
        "encoder": repr(encoding),
        "frames per segment": FRAMES_PER_SEGMENT,
        "version": f"savl {version()}, PyAV {av.__version__} {av.library_versions}",
    }


def _digest(upscaler: Any) -> str:
    """Return a digest of the weights of an upscaler, or the name of its type if it has none."""
    inner = getattr(upscaler, "upscaler", upscaler)  # of one that only adds a strength
    model = getattr(inner, "model", None)
    if not isinstance(model, torch.nn.Module):
        return type(inner).__qualname__
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
