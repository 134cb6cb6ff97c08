"""The server of the page: local, bounded, and without requests to other hosts."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from visbio_diffusers.demo.models import Models
from visbio_diffusers.demo.page import CSS, build_page


MAX_UPLOAD = "20mb"
MAX_WAITING = 32  # requests
# A browser fetches nothing from other hosts, whatever a library would like, and shows the page only within the Hub's.
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self' https://huggingface.co"


def serve(models: Models, votes: Path | None, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until the process is interrupted.

    Args:
        models (`Models`): what draws and looks.
        votes (`Path`, *optional*): folder for preferences; without one the page has no tab for them.
        host (`str`), port (`int`): where to listen; "0.0.0.0" is for all who can reach this machine.
        ready (`Callable`): is told the address.

    Raises:
        ValueError: if Gradio is not installed.
        OSError: if the address cannot be listened at.
    """
    with tempfile.TemporaryDirectory(prefix="visbio-demo-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        page = build_page(models, votes, Path(folder))
        page.queue(max_size=MAX_WAITING)
        try:
            try:
                page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **_settings())
            except OSError as error:
                raise OSError(f"cannot listen at {host}:{port}, which is taken, or not this machine's") from error
            ready(page.local_url)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
        finally:
            page.close(verbose=False)


def _settings() -> dict[str, Any]:
    import gradio as gr
    from starlette.middleware import Middleware

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    off = ("share", "ssr_mode", "mcp_server", "pwa", "run_history", "enable_monitoring", "inbrowser")
    return {
        **dict.fromkeys(off, False),
        "quiet": True,
        "allowed_paths": [],
        "max_file_size": MAX_UPLOAD,
        "footer_links": ["api"],
        "css": CSS,
        "theme": gr.themes.Soft(primary_hue="teal", neutral_hue="slate", **fonts),
        "app_kwargs": {"middleware": [Middleware(_Policy)]},
    }


class _Policy:
    """Adds POLICY to each answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)
