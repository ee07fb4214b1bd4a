"""The page: what is on it, and what its buttons do. `savl.web.server` serves it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.parse import quote

import gradio as gr

from savl.images.job import in_short
from savl.inference.enlarge import check_scale
from savl.web.work import Cancelled, Choice, Desk, Failed, Result, Task, distinct_stems

EXAMPLES = Path(__file__).with_name("examples")
"""Folder of the photographs that the page offers to those who have none at hand."""

_POLL = 0.1  # seconds between two looks at the work
_FORMATS = {"Same as the picture": "auto", "PNG": "png", "JPEG": "jpg", "WebP": "webp", "TIFF": "tiff"}

_STEPS = """
<ol class="savl-steps">
<li><b>Drop</b> one or several pictures into the box on the left, or click on an example below it.</li>
<li>Press <b>Upscale</b>.</li>
<li><b>Compare</b> before and after here, and <b>download</b> the result.</li>
</ol>
"""
_LEGEND = """
<div class="savl-legend"><span>less</span><i></i><span>more</span></div>
<p class="savl-hint">The middle is the average of the picture.</p>
"""
_HINT = """
<p class="savl-hint">Move the line to compare. Turn the mouse wheel over the picture to zoom, and drag to move it.
The two buttons at the top right show the whole picture again, or fill the screen.</p>
"""


@dataclass
class _Tab:
    """What belongs to one tab of a browser.

    Attributes:
        folder: Folder for its results, which is deleted when the tab is closed.
        task: The picture that waits or is being upscaled.
        cancelled: Whether the pictures that are left are cancelled.
        results: The pictures that are done, by the names of their results.
    """

    folder: Path
    task: Task | None = None
    cancelled: bool = False
    results: dict[str, Result] = field(default_factory=dict)

    def cancel(self) -> None:
        self.cancelled = True
        if self.task is not None:
            self.task.cancel()


class Page:
    """The page, for any number of tabs."""

    def __init__(self, desk: Desk, models: Sequence[str], scale: int, folder: Path) -> None:
        """Build the page.

        Args:
            desk: Upscales the pictures.
            models: Names or paths of the models to choose from; the first one is chosen at the beginning.
            scale: The scale of the first model.
            folder: Folder for the files of all tabs, which the server may send to browsers.
        """
        self._desk, self._models, self._scale, self._folder = desk, models, scale, folder
        self._tabs: dict[str, _Tab] = {}
        self.blocks = self._build()

    def cancel_all(self) -> None:
        """Stop the work of all tabs after the current tile."""
        for tab in list(self._tabs.values()):
            tab.cancel()

    def _build(self) -> gr.Blocks:
        examples = sorted(EXAMPLES.glob("*.webp"))
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        blocks: gr.Blocks
        with gr.Blocks(title="savl", analytics_enabled=False) as blocks:
            gr.HTML(
                "<h1>savl</h1><p>Makes photographs larger and cleaner. No picture is sent to the internet.</p>",
                elem_classes="savl-title",
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    pictures = gr.File(label="Pictures", file_count="multiple", height=150, elem_id="pictures")
                    thumbnails = gr.Dataset(
                        components=[gr.Image(render=False)],
                        samples=[[str(path)] for path in examples],
                        label="Or an example",
                        type="index",
                        elem_id="examples",
                    )
                    model = gr.Dropdown(
                        [(Path(name).name, name) for name in self._models],
                        value=self._models[0],
                        label="Model",
                        visible=len(self._models) > 1,
                    )
                    scale = gr.Dropdown(
                        list(dict.fromkeys([f"×{self._scale}", "×2", "×3", "×4", "×8"])),
                        value=f"×{self._scale}",
                        allow_custom_value=True,
                        label="Enlarge",
                        info="Choose, or type a number such as 1.5.",
                        elem_id="scale",
                    )
                    with gr.Accordion("More settings", open=False):
                        automatic = gr.Checkbox(True, label="Let the model choose the strength of the restoration")
                        strength = gr.Slider(
                            0,
                            1,
                            1,
                            step=0.05,
                            label="Strength",
                            info="0: only enlarge. 1: remove as much noise and blur as the model can.",
                            visible=False,
                        )
                        image_format = gr.Dropdown(list(_FORMATS), value="Same as the picture", label="Save as")
                    start = gr.Button("Upscale", variant="primary", size="lg", elem_id="start")
                    cancel = gr.Button("Cancel", variant="stop", size="lg", visible=False, elem_id="cancel")
                with gr.Column(scale=5, min_width=400):
                    bar = gr.HTML(visible=False, elem_id="bar")
                    status = gr.HTML(_STEPS, elem_id="status")
                    downloads = gr.HTML(visible=False, elem_id="downloads")
                    shown = gr.Dropdown([], label="Show", visible=False, elem_id="shown")
                    with gr.Row(visible=False, equal_height=True) as severity:
                        overlay = gr.Checkbox(
                            False,
                            label="Show the severity of the degradation",
                            info="Noise, blur and compression, as the model estimates them.",
                            elem_id="overlay",
                        )
                        gr.HTML(_LEGEND)
                    slider = gr.ImageSlider(
                        visible=False,
                        interactive=False,
                        type="filepath",
                        label="Left: before. Right: after",
                        buttons=["fullscreen"],
                        max_height=520,
                        elem_id="slider",
                    )
                    hint = gr.HTML(_HINT, visible=False)
            self._start, self._cancel, self._bar, self._status, self._downloads = start, cancel, bar, status, downloads
            self._shown, self._slider, self._hint, self._severity, self._overlay = (
                shown,
                slider,
                hint,
                severity,
                overlay,
            )

            thumbnails.click(lambda index: [str(examples[index])], thumbnails, pictures, **hidden)
            model.input(self._choose_model, model, [scale, status], **hidden)
            automatic.change(lambda on: gr.update(visible=not on), automatic, strength, **hidden)
            start.click(
                self._upscale,
                [pictures, model, scale, automatic, strength, image_format],
                [start, cancel, bar, status, downloads, shown, slider, hint, severity, overlay],
                concurrency_limit=None,  # the desk lets the tabs take turns
                **hidden,
            )
            cancel.click(self._cancel_tab, None, status, queue=False, **hidden)
            for changed in (shown, overlay):
                changed.input(self._show, [shown, overlay], [slider, severity], queue=False, **hidden)
            blocks.unload(self._close_tab)
        return blocks

    def _choose_model(self, model: str) -> tuple[Any, Any]:
        """Load the model that the user chose, and choose its scale."""
        try:
            return f"×{self._desk.load(model)}", gr.skip()
        except Exception as error:
            return gr.skip(), _error(f"{Path(model).name}: {in_short(error)}")

    def _upscale(
        self,
        pictures: list[str] | None,
        model: str,
        scale: str,
        automatic: bool,
        strength: float,
        format_label: str,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """Upscale the pictures, and yield what changes on the page."""
        if not pictures:
            yield {self._status: _error("Drop a picture into the box first, or click on an example.")}
            return
        try:
            number = _scale_value(scale)
        except ValueError as error:
            yield {self._status: _error(str(error))}
            return
        choice = Choice(model, number, "auto" if automatic else strength, _FORMATS[format_label])
        sources = [Path(each) for each in pictures]
        tab = self._new_run(request)
        lines: list[str] = []
        results = (self._downloads, self._shown, self._slider, self._hint, self._severity)
        changes: dict[Any, Any] = {each: gr.update(visible=False) for each in results}
        changes[self._start] = gr.update(visible=False)
        changes[self._cancel] = gr.update(visible=True)
        yield changes | self._at_work("", 0.0)
        try:
            for index, (source, stem) in enumerate(zip(sources, distinct_stems(sources), strict=True)):
                if tab.cancelled:
                    break
                place = f"picture {index + 1} of {len(sources)}, " if len(sources) > 1 else ""
                began = time.monotonic()
                tab.task = self._desk.submit(source, stem, choice, Path(mkdtemp(dir=tab.folder)))
                yield from self._watch(tab.task, f"{place}{source.name}", lines)
                try:
                    result = tab.task.result()
                except Cancelled:
                    break
                except Failed as failure:
                    lines.append(_error(f"{source.name}: {failure}"))
                else:
                    tab.results[result.file.name] = result
                    lines.append(_done(source.name, result, time.monotonic() - began))
                    yield self._with_results(tab)
            if tab.cancelled:
                count = f"{len(tab.results)} of {len(sources)} pictures" if len(sources) > 1 else "nothing"
                lines.append(f'<p class="savl-line">Cancelled: {count} done.</p>')
        finally:
            tab.cancel()
        yield {
            self._start: gr.update(visible=True),
            self._cancel: gr.update(visible=False),
            self._bar: gr.update(visible=False),
            self._status: "".join(lines),
        }

    def _watch(self, task: Task, name: str, lines: list[str]) -> Iterator[dict[Any, Any]]:
        """Yield the progress of a picture until its end."""
        said = ""
        part: float | None = -1.0
        began = None
        while not task.wait(_POLL):
            before = part
            if task.started:
                began = began or time.monotonic()
                text, part = _progress(task.tiles, time.monotonic() - began)
            else:
                text, part = "waiting for the pictures of another tab", 0.0
            if text != said:
                said = text
                changes = self._at_work(f"{name}: {text}", part, lines)
                if part == before:
                    del changes[self._bar]
                yield changes

    def _at_work(self, text: str, part: float | None, lines: Sequence[str] = ()) -> dict[Any, Any]:
        inner = "<i></i>" if part is None else f'<i style="width: {100 * part:.1f}%"></i>'
        return {
            self._bar: gr.update(
                value=f'<div class="savl-bar{" unknown" if part is None else ""}">{inner}</div>', visible=True
            ),
            self._status: f'{"".join(lines)}<p class="savl-line">{escape(text)}</p>',
        }

    def _with_results(self, tab: _Tab) -> dict[Any, Any]:
        """Return the changes that show the results of a tab; the first result stays in the slider."""
        names = list(tab.results)
        links = "".join(_link(result) for result in tab.results.values())
        if len(names) > 1:
            links += _DOWNLOAD_ALL
        changes: dict[Any, Any] = {
            self._downloads: gr.update(value=f'<div class="savl-downloads">{links}</div>', visible=True),
            self._shown: gr.update(choices=names, value=names[0], visible=len(names) > 1),
        }
        if len(names) == 1:
            first = tab.results[names[0]]
            changes |= {
                self._slider: gr.update(value=(first.before, first.after), visible=True),
                self._hint: gr.update(visible=True),
                self._severity: gr.update(visible=first.severity is not None),
                self._overlay: False,
            }
        return changes

    def _show(self, name: str | None, overlay: bool, request: gr.Request) -> tuple[Any, Any]:
        """Show another result, or the result with or without its severity map."""
        tab = self._tabs.get(str(request.session_hash))
        result = None if tab is None or name is None else tab.results.get(name)
        if result is None:
            return gr.skip(), gr.skip()
        after = result.with_severity() if overlay else result.after
        return (result.before, after), gr.update(visible=result.severity is not None)

    def _cancel_tab(self, request: gr.Request) -> Any:
        tab = self._tabs.get(str(request.session_hash))
        if tab is None:
            return gr.skip()
        tab.cancel()
        return '<p class="savl-line">Stopping after the current part of the picture …</p>'

    def _new_run(self, request: gr.Request) -> _Tab:
        """Return the tab of a request without the results of its last run."""
        self._close_tab(request)
        tab = _Tab(Path(mkdtemp(dir=self._folder)))
        self._tabs[str(request.session_hash)] = tab
        return tab

    def _close_tab(self, request: gr.Request) -> None:
        """Stop the work of a tab, and delete its results."""
        tab = self._tabs.pop(str(request.session_hash), None)
        if tab is None:
            return
        tab.cancel()
        shutil.rmtree(tab.folder, ignore_errors=True)


def _scale_value(text: object) -> float:
    """Return the scale that the user chose or typed, such as "×2" or "1,5".

    Raises:
        ValueError: It is not a number above 0.
    """
    try:
        return check_scale(float(str(text).strip().lstrip("×xX").replace(",", ".")))
    except ValueError:
        raise ValueError(f"Enlarge: {text} is not a number above 0, such as 2 or 1.5.") from None


_DOWNLOAD_ALL = (
    "<button onclick=\"document.querySelectorAll('.savl-downloads a').forEach("
    '(link, index) => setTimeout(() => link.click(), 300 * index))">Download all</button>'
)


def _link(result: Result) -> str:
    url = f"gradio_api/file={quote(str(result.file))}"
    return f'<a href="{escape(url)}" download="{escape(result.file.name)}">⤓ Download {escape(result.file.name)}</a>'


def _error(text: str) -> str:
    return f'<p class="savl-line savl-error" role="alert">{escape(text)}</p>'


def _done(name: str, result: Result, seconds: float) -> str:
    old, new = (f"{width} × {height}" for width, height in (result.old_size, result.new_size))
    notes = "".join(f'<p class="savl-note">{escape(note)}</p>' for note in result.notes)
    return f'<p class="savl-line">{escape(name)}: {old} → {new} pixels, {_seconds(seconds)}</p>{notes}'


def _progress(tiles: tuple[int, int] | None, seconds: float) -> tuple[str, float | None]:
    """Return what is said about a picture in work, and its part that is done; None if that is unknown."""
    if tiles is None:
        return f"upscaling, {_seconds(seconds)} so far", None
    done, total = tiles
    if done == total:
        return "saving …", 1.0
    return f"part {done} of {total}, about {_seconds(seconds / done * (total - done))} left", done / total


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{round(seconds / 60)} min"
