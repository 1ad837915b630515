"""Chromium without a window, by chromedriver's own protocol (W3C WebDriver), so that tests need no further package."""

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.inference.running_server import free_port, running_program
from tests.processes import until

WITHIN_S = 120
DRIVER = shutil.which("chromedriver")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass
class Browser:
    """A session of a browser."""

    session: str

    def _call(self, method: str, what: str, **values: Any) -> Any:
        data = json.dumps(values).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.session}/{what}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=WITHIN_S) as reply:
            return json.load(reply)["value"]

    def open(self, address: str) -> None:
        """Opens a page, and waits until it is there."""
        self._call("POST", "url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns that runs in the page; `arguments` are its own."""
        return self._call("POST", "execute/sync", script=script, args=list(arguments))

    def wait(self, script: str, *arguments: Any) -> Any:
        """What a script returns as soon as that is something."""
        return until(lambda: self.run(script, *arguments), f"nothing came of: {script}")

    def press(self, *keys: str) -> None:
        """Presses keys one after the other, and lets all of them go."""
        down = [{"type": "keyDown", "value": key} for key in keys]
        up = [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._call("POST", "actions", actions=[{"type": "key", "id": "keyboard", "actions": down + up}])

    def texts(self, selector: str) -> list[str]:
        """The texts of the visible elements that a selector finds."""
        script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility())"
        return list(self.run(f"{script}.map(e => e.textContent)", selector))

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Makes the page as wide and high as a screen."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._command("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._command("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What the browser's console got since it was last asked: errors, and what a policy forbade."""
        return [item["message"] for item in self._call("POST", "se/log", type="browser")]

    def _command(self, name: str, values: dict[str, Any]) -> None:
        self._call("POST", "goog/cdp/execute", cmd=name, params=values)


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser until the block ends; `folder` keeps its log. The test is skipped where there is none."""
    if DRIVER is None or CHROMIUM is None:
        pytest.skip("needs Chromium and chromedriver")
    port = free_port()
    words = [DRIVER, f"--port={port}"]
    address = f"http://127.0.0.1:{port}"
    with running_program(words, f"{address}/status", folder / "driver.log", cwd=folder, env=dict(os.environ)):
        names = "--host-resolver-rules=MAP *.example 127.0.0.1"  # as DNS that an attacker has says
        options = {"binary": CHROMIUM, "args": ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", names]}
        if os.name == "posix" and os.geteuid() == 0:
            options["args"].append("--no-sandbox")  # type: ignore[union-attr]
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        body = json.dumps({"capabilities": {"alwaysMatch": wanted}}).encode()
        request = urllib.request.Request(f"{address}/session", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WITHIN_S) as reply:
            session = f"{address}/session/{json.load(reply)['value']['sessionId']}"
        try:
            yield Browser(session)
        finally:
            urllib.request.urlopen(urllib.request.Request(session, method="DELETE"), timeout=WITHIN_S).close()
