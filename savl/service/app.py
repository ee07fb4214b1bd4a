"""The web application of the service: requests, limits, metrics.

======================  ==============================================================================================
``POST /upscale``       The body is an image file, or a form (multipart/form-data) with an image in the field
                        ``image``. The answer is the upscaled image file. Options are query parameters: ``scale``,
                        ``format``, ``strength``, ``quality``, ``page``.
``GET /health``         200 if at least one worker is ready, else 503.
``GET /metrics``        Metrics in the format of Prometheus.
======================  ==============================================================================================

Errors are JSON objects with the field ``error``. Status codes: 400 for options, 401 for the token, 408 if the body
arrives too slowly, 413 for too many bytes or pixels, 422 for a file that is not an image savl can read, 503 with
``Retry-After`` if the queue is full or memory ran out, 504 if the time limit has passed, 500 for everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from savl.images.format import FORMATS, HEAD_BYTES, PNG, format_of_content
from savl.images.read import read_size
from savl.inference.enlarge import Strength, check_strength
from savl.service.pool import PendingImage, QueueFullError, UpscalingError, WorkerPool
from savl.service.worker import Failure, Options, Result, WorkerSettings
from savl.version import version

MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "tiff": "image/tiff"}
_STATUS = {"image": 422, "option": 400, "memory": 503, "cancelled": 503, "internal": 500}
_RETRY_AFTER = {"Retry-After": "1"}
_DISCONNECT_PERIOD = 0.5


@dataclass(frozen=True)
class Limits:
    """Limits of the service."""

    body_bytes: int = 64 * 2**20
    """Largest body of a request in bytes."""
    pixels: int = 16_000_000
    """Largest number of pixels of an image that is posted, as its header states them, before anything is decoded."""
    result_pixels: int = 256_000_000
    """Largest number of pixels of a result."""
    waiting: int = 64
    """Largest number of images that wait or are being upscaled."""
    seconds: float = 300.0
    """Longest time from the arrival of an image to its result."""


class _RefusedError(Exception):
    """A request is answered with an error."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class _Metrics:
    """What ``/metrics`` reports."""

    def __init__(self, pool: WorkerPool) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("savl_requests", "Requests to /upscale by status code.", ["status"], **given)
        self.seconds = Histogram(
            "savl_request_seconds",
            "Time from the beginning of a request to its answer, for upscaled images.",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
            **given,
        )
        self.pixels = Counter("savl_pixels", "Pixels of all results.", **given)
        self.batches = Histogram(
            "savl_batch_tiles", "Tiles in a pass over the network.", buckets=(1, 2, 4, 8, 16), **given
        )
        self.restarts = Counter("savl_worker_restarts", "Workers that died and were replaced.", **given)
        Gauge("savl_images", "Images that wait or are being upscaled.", **given).set_function(lambda: pool.accepted)
        Gauge("savl_workers_ready", "Workers that are ready.", **given).set_function(lambda: pool.ready_workers)


def create_service(
    workers: Sequence[WorkerSettings] = (WorkerSettings(),),
    *,
    limits: Limits | None = None,
    token: str | None = None,
) -> tuple[FastAPI, WorkerPool]:
    """Return the web application and its pool of workers.

    The pool must be started (`WorkerPool.start`) before requests come. The application stops it when it ends.

    Args:
        workers: Settings of each worker process.
        limits: Limits; None for the defaults.
        token: If given, requests need the header ``Authorization: Bearer TOKEN``, except those to ``/health``.
    """
    limits = limits or Limits()
    pool = WorkerPool(
        workers,
        most_waiting=limits.waiting,
        on_computed=lambda tiles: metrics.batches.observe(tiles),
        on_restart=lambda: metrics.restarts.inc(),
    )
    metrics = _Metrics(pool)
    # Bodies that are being received are in memory too, and do not count as images that wait.
    bodies = asyncio.Semaphore(limits.waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(pool.stop)

    # The pages /docs and /redoc load scripts from other hosts.
    app = FastAPI(title="savl", version=version(), lifespan=lifespan, docs_url=None, redoc_url=None)

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise _RefusedError(401, "the header Authorization: Bearer TOKEN is missing or wrong")

    @app.exception_handler(_RefusedError)
    async def refuse(request: Request, error: _RefusedError) -> Response:
        if request.url.path == "/upscale":
            metrics.requests.labels(error.status).inc()
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_option(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name, value = first["loc"][-1], first.get("input")
        return await refuse(request, _RefusedError(400, f"{name}: {first['msg'].lower()}, got {value!r}"))

    @app.exception_handler(HTTPException)
    async def refuse_path_or_method(request: Request, error: HTTPException) -> Response:
        return await refuse(request, _RefusedError(error.status_code, error.detail.lower(), dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def report_failure(request: Request, error: Exception) -> Response:  # Starlette also logs the traceback
        return await refuse(request, _RefusedError(500, f"{type(error).__name__} in the service; its log has details"))

    @app.get("/health")
    async def health() -> Response:
        ready = pool.ready_workers
        content = {"status": "ok" if ready else "no worker is ready", "workers": ready, "images": pool.accepted}
        return JSONResponse(content, 200 if ready else 503)

    @app.get("/metrics")
    async def report_metrics(request: Request) -> Response:
        check_token(request)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/upscale", response_class=Response)
    async def upscale(
        request: Request,
        scale: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
        format: Literal["auto", "png", "jpg", "webp", "tiff"] = "auto",
        strength: str = "auto",
        quality: Annotated[int, Query(ge=1, le=100)] = 95,
        page: Annotated[int | None, Query(ge=1)] = None,
    ) -> Response:
        start = time.monotonic()
        check_token(request)
        chosen = _strength(strength)
        deadline = start + limits.seconds
        if bodies.locked() or pool.accepted >= limits.waiting:
            raise _RefusedError(
                503, "too many images arrive, wait or are being upscaled; try again later", _RETRY_AFTER
            )
        async with bodies:
            image = await _image_of(request, limits.body_bytes, deadline)
        # In a thread: libvips reads all of a GIF file to know its size.
        await asyncio.to_thread(_check_pixels, image, page, pool.scale if scale is None else scale, limits)
        options = Options(_format_name(image, format), scale, chosen, quality, page)
        result = await _upscaled(request, pool, image, options, deadline, limits.seconds)
        metrics.requests.labels(200).inc()
        metrics.seconds.observe(time.monotonic() - start)
        metrics.pixels.inc(result.size[0] * result.size[1])
        headers = {"X-Savl-Notes": _header(result.notes)} if result.notes else None
        return Response(result.image, media_type=MEDIA_TYPES[options.format], headers=headers)

    return app, pool


async def _image_of(request: Request, most_bytes: int, deadline: float) -> bytes:
    try:
        return await asyncio.wait_for(_read_image(request, most_bytes), max(0.0, deadline - time.monotonic()))
    except TimeoutError as error:
        raise _RefusedError(408, "the image did not arrive within the time limit") from error
    except ClientDisconnect as error:
        raise _RefusedError(400, "the client closed the connection") from error


async def _read_image(request: Request, most_bytes: int) -> bytes:
    """Return the image file in a request, which is its body or a part of it."""
    too_large = _RefusedError(413, f"the body has more than {most_bytes} bytes, which is the limit of this service")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise too_large
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        image = bytes(body)
    else:
        image = await _image_of_form(request, bytes(body))
    if not image:
        raise _RefusedError(422, "the request has no image: post the content of an image file as the body")
    return image


async def _image_of_form(request: Request, body: bytes) -> bytes:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=16).parse()  # type: ignore[arg-type]
    except (MultiPartException, KeyError, ValueError) as error:
        raise _RefusedError(400, f"the form cannot be read: {error}") from error
    try:
        part = form.get("image")
        if not isinstance(part, UploadFile):
            raise _RefusedError(400, f"the form must have a file in the field 'image', got the fields {sorted(form)}")
        return await part.read()
    finally:
        await form.close()


def _check_pixels(image: bytes, page: int | None, scale: float, limits: Limits) -> None:
    size = read_size(io.BytesIO(image), page=page)
    if size is None:
        return  # the worker says why
    pixels = size[0] * size[1]
    if pixels > limits.pixels:
        raise _RefusedError(
            413, f"the image has {size[0]}x{size[1]} pixels, more than the {limits.pixels} that this service accepts"
        )
    if pixels * scale * scale > limits.result_pixels:
        raise _RefusedError(
            413,
            f"the result would have {pixels * scale * scale:.0f} pixels, more than the {limits.result_pixels} that "
            "this service returns; ask for a smaller scale",
        )


def _strength(text: str) -> Strength:
    try:
        return check_strength(text if text == "auto" else float(text))
    except ValueError as error:
        raise _RefusedError(400, f"strength must be 'auto' or a number from 0 to 1, got {text!r}") from error


def _format_name(image: bytes, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    found = format_of_content(image[:HEAD_BYTES])
    return found.name if found in FORMATS else PNG.name


async def _upscaled(
    request: Request, pool: WorkerPool, image: bytes, options: Options, deadline: float, seconds: float
) -> Result:
    """Wait for the result; cancel the image if the time limit passes or the client closes the connection."""
    try:
        pending = pool.submit(image, options)
    except QueueFullError as error:
        raise _RefusedError(503, str(error), _RETRY_AFTER) from error
    except RuntimeError as error:  # the service is being stopped
        raise _RefusedError(503, str(error), _RETRY_AFTER) from error
    watch = asyncio.ensure_future(_cancel_if_disconnected(request, pool, pending))
    answer = asyncio.wrap_future(pending)
    # Otherwise asyncio would log the failure of an image that nobody waits for any more.
    answer.add_done_callback(lambda future: future.cancelled() or future.exception())
    try:
        # Not wait_for: a timeout would cancel the future without the pool knowing it.
        await asyncio.wait([answer], timeout=max(0.0, deadline - time.monotonic()))
        if not answer.done():
            raise _RefusedError(504, f"the image was not upscaled in {seconds:g} s")
        return answer.result()
    except UpscalingError as error:
        raise _refused(error.failure) from error
    finally:
        watch.cancel()
        pool.cancel(pending)  # which has no effect on an image that is done


def _refused(failure: Failure) -> _RefusedError:
    status = _STATUS[failure.kind]
    return _RefusedError(status, failure.message, _RETRY_AFTER if status == 503 else None)


async def _cancel_if_disconnected(request: Request, pool: WorkerPool, pending: PendingImage) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_DISCONNECT_PERIOD)
    pool.cancel(pending)


def _header(notes: tuple[str, ...]) -> str:
    """Return notes as the value of a header, which has no control characters and only Latin-1 characters."""
    printable = "".join(each if each.isprintable() else " " for each in "; ".join(notes))
    return " ".join(printable.split()).encode("latin-1", "replace").decode("latin-1")
