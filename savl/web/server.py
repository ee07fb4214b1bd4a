"""Serve the page on this computer, until Ctrl-C, and delete all its files at the end."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from savl.web.work import Desk

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses of `listen` that other computers cannot reach."""

_STOP_SECONDS = 5.0  # how long the end of the server is awaited, which needs a fraction of a second if all is well


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Args:
        host: Name or address.
        port: Port; 0 for any that is free.

    Raises:
        OSError: The address is in use or does not exist.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # on Windows, it would allow two programs to listen on one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except BaseException:
        listening.close()
        raise
    return listening


def run(
    listening: socket.socket,
    host: str,
    desk: Desk,
    models: Sequence[str],
    scale: int,
    *,
    say: Callable[[str], None],
    browser: bool,
) -> None:
    """Serve the page and upscale its pictures until a signal raises `KeyboardInterrupt` or `SystemExit`.

    The web server has a thread of its own; the pictures are upscaled in the main one (see `Desk.work`).

    All files of the page are in one temporary folder, which is deleted at the end. No file is written elsewhere.

    Args:
        listening: Where to listen. The server closes it.
        host: The name of the address, for the line that is printed.
        desk: Upscales the pictures; it is closed at the end.
        models: The models to choose from.
        scale: The scale of the first model.
        say: Prints a line.
        browser: Open the page in the user's browser.

    Raises:
        ImportError: gradio is not installed.
    """
    with TemporaryDirectory(prefix="savl-web-", ignore_cleanup_errors=True) as temporary:
        # gradio reads these when it is imported: no message to its authors, no folder of its own, and a tab that was
        # closed is noticed within a second.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(temporary) / "uploads")
        os.environ["GRADIO_HEARTBEAT_INTERVAL"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        import gradio
        import uvicorn
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from savl.web.page import EXAMPLES, Page

        folder = Path(temporary) / "results"
        folder.mkdir()
        page = Page(desk, models, scale, folder)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        if host in LOOPBACK:  # a web page elsewhere cannot use this one under a name that leads to this computer
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
        # gradio's own theme has paler hints, and loads fonts.
        theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
            block_info_text_color="*neutral_500",
            body_text_color_subdued="*neutral_500",
        )
        gradio.mount_gradio_app(
            app,
            page.blocks,
            "/",
            allowed_paths=[str(folder), str(EXAMPLES)],
            footer_links=[],
            run_history=False,
            pwa=False,
            ssr_mode=False,
            theme=theme,
            css_paths=[Path(__file__).with_name("page.css")],
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],), name="savl-web", daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.02)
            shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
            url = f"http://{shown}:{listening.getsockname()[1]}/"
            say(f"the page is open at {url}; Ctrl-C stops it")
            if browser:
                webbrowser.open(url)
            desk.work(thread.is_alive)
        finally:
            page.cancel_all()
            # Tabs keep connections open; what uvicorn says about their end is of no interest.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            server.should_exit = server.force_exit = True
            desk.close()
            thread.join(_STOP_SECONDS)
