"""A headless Chromium over its DevTools protocol: open a page as a phone or a desktop shows it, and ask about it."""

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--remote-debugging-port=0", "--remote-allow-origins=*"]


class Browser:
    """One page of one browser; a context manager.

    Attributes:
        complaints: uncaught exceptions, and errors in the console, since the last `open`.
    """

    def __init__(self, profile: Path, timeout_s: float = 180):
        self.complaints: list[str] = []
        self._process = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = profile / "DevToolsActivePort"
        end = time.monotonic() + timeout_s
        while not (port.is_file() and len(port.read_text().split()) == 2):
            if time.monotonic() > end or self._process.poll() is not None:
                self._process.kill()
                raise OSError(f"expected {CHROMIUM} to listen within {timeout_s} s, it does not")
            time.sleep(0.05)
        number, path = port.read_text().split()
        self._socket = websocket.create_connection(f"ws://127.0.0.1:{number}{path}", timeout=timeout_s)
        self._count, self._session, self._loaded = 0, None, False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; events that arrive meanwhile are noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise ValueError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        event = json.loads(self._socket.recv())
        method, parameters = event.get("method"), event.get("params", {})
        self._loaded |= method == "Page.loadEventFired"
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(json.dumps(parameters["entry"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.complaints.append(json.dumps(parameters["args"]))
        return event

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Load a page in a window of so many CSS pixels; below 600 it is a phone's."""
        self.complaints.clear()
        self._loaded = False
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._receive()

    def ask(self, expression: str) -> Any:
        """Value of a JavaScript expression, a promise's when it is there."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise ValueError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 30) -> Any:
        """Value of the expression as soon as it is true.

        Raises:
            TimeoutError: it does not become true.
        """
        end = time.monotonic() + timeout_s
        while not (value := self.ask(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"expected {expression} within {timeout_s} s")
            time.sleep(0.1)
        return value

    def screenshot(self, file: Path) -> None:
        """What the window shows, as PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
