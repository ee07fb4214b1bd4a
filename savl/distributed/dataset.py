"""`upscale_dataset`: upscale the files of a Ray Dataset."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from savl.distributed.worker import Settings, Task, Worker

if TYPE_CHECKING:
    from ray.data import Dataset

    from savl.distributed.cluster import Model
    from savl.inference.enlarge import Strength


def upscale_dataset(
    dataset: Dataset,
    output: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    path_column: str = "path",
    bytes_column: str = "bytes",
    model: Model = "savl-tiny",
    format: str | None = None,
    scale: float | None = None,
    strength: Strength | None = None,
    quality: int = 95,
    suffix: str = "",
    overwrite: bool = False,
    page: int | None = None,
    tile: int | None = None,
    tile_pad: int = 32,
    dtype: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
) -> Dataset:
    """Upscale the image files of a Ray Dataset, and write the results to a folder.

    Each row is one file: its path, or its path and content, as `ray.data.read_binary_files` with ``include_paths=True``
    reads them. With paths alone, the workers read the files, and no image passes through the object store of Ray.
    Workers write the results by the code of `savl.upscale_file`: bit depth, transparency, colour profile and metadata
    are kept as far as the format supports them, and a result appears complete or not at all. Results that exist are
    kept, so that an interrupted run can be repeated. A file that cannot be processed becomes a row with an error.

    The files are processed when the returned dataset is consumed, for example by ``result.write_parquet(...)`` or
    ``result.materialize()``; each consumption is a run of its own.

    Args:
        dataset: The files.
        output: Folder of the results, which all nodes see under this path; or a URL of a file system of fsspec, such as
            s3://bucket/folder.
        root: Folder or URL that the paths lie in. Results get the same subfolders below `output`. If None, all results
            are written to `output` itself.
        path_column: Name of the column with the paths, or URLs of file systems of fsspec.
        bytes_column: Name of the column with the contents. If the dataset has no such column, the paths are read.
        model: Name of shipped weights, path of a file on this machine, or a model; all workers get it from here.
        format: "png", "jpg", "webp" or "tiff"; None for the format of the file, or PNG if savl cannot write it.
        scale: Output pixels per input pixel, any number above 0. If None, the scale of the network is used.
        strength: How strongly images are restored, as for `savl.upscale`.
        quality: 1 to 100, for JPEG and WebP; WebP at 100 is lossless.
        suffix: Text between the name of a result and its file extension.
        overwrite: Replace results that existed before this function was called.
        page: Page of files with several pages, counted from 1; None selects the first.
        tile: Side of the tiles in input pixels. None chooses it by the free memory; 0 disables tiling.
        tile_pad: Context around each tile, in input pixels.
        dtype: Dtype in which the network computes, as for `savl.upscale`.
        device: "auto", "cpu" or "cuda".
        workers: Number of workers, each with its own copy of the model. None for one per GPU, or one per few cores.
        threads: Threads of each worker; None chooses it by the nodes.

    Returns:
        The dataset with the columns `path_column`, "output" (path or URL of the result, "" if there is none), "status"
        ("upscaled", "kept" or "failed"), "error" (one line, or ""), "width" and "height" (of the result; 0 unless it
        was upscaled).

    Raises:
        RayUnavailable: Ray is not installed: ``pip install 'savl[cluster]'``.
        TypeError, ValueError: An argument is not accepted; the message names it.
        OSError: `model` is a path that cannot be read.
    """
    from savl.distributed.cluster import model_for_workers, share_cluster, start_coordinator, worker_arguments
    from savl.distributed.ray_import import import_ray
    from savl.distributed.storage import UrlPlace, is_url, local_path
    from savl.images.format import FORMATS
    from savl.images.write import check_quality
    from savl.inference.device import checked_dtype
    from savl.inference.enlarge import check_scale, check_strength
    from savl.version import version

    if format not in (None, *(each.name for each in FORMATS)):
        raise ValueError(f"format must be one of {', '.join(each.name for each in FORMATS)}, or None, got {format!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    check_quality(quality)
    if "/" in suffix or "\\" in suffix:
        raise ValueError(f"suffix must not contain a slash or backslash, got {suffix!r}")
    if scale is not None:
        check_scale(scale)
    if strength is not None:
        check_strength(strength)
    if dtype is not None:
        checked_dtype(dtype)
    folder = os.fspath(output)
    folder = local_path(folder) or folder
    if is_url(folder) and not UrlPlace(folder).shared:
        raise ValueError(f"output: {folder} is the memory of one process, which the others do not see")
    ray = import_ray()
    name, content = model_for_workers(model)
    share = share_cluster(ray, device=device, workers=workers, threads=threads)
    settings = Settings(
        model=name,
        version=version(),
        started=time.time(),
        output_url=folder if is_url(folder) else None,
        strength=strength,
        tile=tile,
        tile_pad=tile_pad,
        device=share.device,
        dtype=dtype,
        threads=share.threads,
        scale=scale,
        quality=quality,
        overwrite=overwrite,
        page=page,
    )
    return dataset.map_batches(
        RowWorker,
        fn_constructor_args=(
            settings,
            start_coordinator(ray, content, keeps_outcomes=False),
            folder if is_url(folder) else os.path.abspath(folder),
            None if root is None else os.fspath(root),
            path_column,
            bytes_column,
            format,
            suffix,
        ),
        # The tasks that read the dataset need processors too, or they would wait for the workers forever.
        **worker_arguments(ray, share, reserved_cpus=share.cpus / 2),
    )


class RowWorker(Worker):
    """Worker for rows with a path, and perhaps a content."""

    def __init__(
        self,
        settings: Settings,
        coordinator: Any,
        folder: str,
        root: str | None,
        path_column: str,
        bytes_column: str,
        format_name: str | None,
        suffix: str,
    ) -> None:
        super().__init__(settings, coordinator)
        self._folder = folder
        self._root = root
        self._path_column = path_column
        self._bytes_column = bytes_column
        self._format_name = format_name
        self._suffix = suffix

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Upscale the files of a batch; return a row for each.

        Raises:
            KeyError: The dataset has no column with paths.
        """
        if self._path_column not in batch:
            columns = ", ".join(batch) or "none"
            raise KeyError(f"the dataset has no column {self._path_column!r} with paths; its columns are: {columns}")
        contents = batch.get(self._bytes_column, [None] * len(batch[self._path_column]))
        rows = [self._row(str(path), content) for path, content in zip(batch[self._path_column], contents, strict=True)]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def _row(self, path: str, content: bytes | None) -> dict[str, Any]:
        from savl.distributed.storage import is_url, read_url
        from savl.images.errors import ImageFileError
        from savl.images.job import Done, Failed, Kept, signatures_of

        row = {self._path_column: path, "output": "", "status": "failed", "error": "", "width": 0, "height": 0}
        try:
            content = read_url(path) if content is None and is_url(path) else content
        except ImageFileError as error:
            return row | {"error": error.reason}
        job = self._job(path, None if content is None else bytes(content))
        # Only outputs that are older than the call are replaced; see `JobProcessor`.
        outcome = self.process(Task(path, job, signatures_of([job], self._place)), waits=True)
        if isinstance(outcome, Done):
            width, height = outcome.result.new_size
            return row | {"output": outcome.written, "status": "upscaled", "width": width, "height": height}
        if isinstance(outcome, Kept):
            return row | {"output": outcome.target, "status": "kept"}
        assert isinstance(outcome, Failed)
        return row | {"error": outcome.reason}

    def _job(self, path: str, content: bytes | None) -> Any:
        from savl.images.format import FORMATS, PNG, format_of_suffix
        from savl.images.job import Job

        source = Path(path)
        own = format_of_suffix(source)
        chosen = next((each for each in FORMATS if each.name == self._format_name), own) or PNG
        ending = source.suffix if chosen is own else chosen.suffixes[0]
        below = Path(".")
        if self._root is not None and source.is_relative_to(self._root):
            below = source.parent.relative_to(self._root)
        folder = (Path(self._folder) if self._place is None else self._place.root) / below
        job = Job(source, folder / f"{source.stem}{self._suffix}{ending}", chosen, (), content)
        if source.suffix == ending:
            return job
        other = Job(source, folder / f"{source.name}{self._suffix}{ending}", chosen, (), content)
        return Job(job.source, job.target, job.format, job.maps, content, alternative=other)
