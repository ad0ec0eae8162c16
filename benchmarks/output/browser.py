"""A picture of a page, taken by Chromium or Chrome."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from gemma_edge.devices.machine.child import ChildError, run_child
from gemma_edge.devices.script import progress
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.files.whole_file import replacing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_VARIABLE = "GEMMA_EDGE_CHROMIUM"
MOST_PIXELS = 16_000
_TELL_HEIGHT = "document.title = 'height ' + document.documentElement.scrollHeight"
_HEIGHT = re.compile(r"<title>height (\d+)</title>")


def find_browser() -> str | None:
    """GEMMA_EDGE_CHROMIUM, or a Chromium or Chrome on the PATH; None where there is none."""
    given = os.environ.get(BROWSER_VARIABLE)
    return next((found for name in (given, *BROWSERS) if name and (found := shutil.which(name))), None)


def is_whole_png(path: Path) -> bool:
    """Whether a PNG has its last chunk: Chromium ends with 0 on a full disk, too."""
    return path.is_file() and path.read_bytes()[-8:-4] == b"IEND"


def screenshot(page: Path, picture: Path, *, dark: bool = False, width: int = 1000) -> None:
    """A picture of a whole page.

    Raises:
        DeviceError: there is no browser, or it takes no picture.
    """
    browser = find_browser()
    if browser is None:
        raise DeviceError(f"--png needs Chromium or Chrome: install one, or set {BROWSER_VARIABLE}")
    with temporary_folder("browser") as folder:
        argv = [
            browser,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            argv.append("--no-sandbox")  # Chromium refuses to run as root with it
        text = page.read_text(encoding="utf-8")
        if dark:
            text = text.replace("<html ", '<html data-theme="dark" ', 1)
        copy = Path(folder, "page.html")
        # A picture is as large as the window, so the page is asked for its height first.
        copy.write_text(text.replace("</body>", f"<script>{_TELL_HEIGHT}</script></body>"), encoding="utf-8")
        size = f"--window-size={width},600"
        asked = run_child([*argv, size, "--dump-dom", copy.as_uri()], timeout=120, what=browser)
        height = _HEIGHT.search(asked.stdout)
        if asked.exit_code or not height:
            raise ChildError(browser, asked) if asked.exit_code else DeviceError(f"{browser}: no page")
        size = f"--window-size={width},{min(int(height[1]), MOST_PIXELS)}"
        with replacing(picture) as taken:
            argv += [size, f"--screenshot={taken.resolve()}", copy.as_uri()]
            done = run_child(argv, timeout=120, what=browser)
            if done.exit_code:
                raise ChildError(browser, done)
            if not is_whole_png(taken):
                raise DeviceError(f"{browser} took no picture of {page}: {done.last_line()}")
    progress(f"picture: {picture}")
