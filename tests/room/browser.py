"""Chromium without a screen, driven by its DevTools protocol."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium")


class Browser:
    """One page. `problems` are what the page has written to its console as errors, and what its policy has refused."""

    def __init__(self, width: int = 1280, height: int = 800) -> None:
        self._stack = contextlib.ExitStack()
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
             f"--user-data-dir={self._folder.name}", f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        told = Path(self._folder.name) / "DevToolsActivePort"
        for _ in range(600):
            if told.exists() and len(lines := told.read_text().split("\n")) > 1:
                break
            time.sleep(0.1)
        self._socket = self._stack.enter_context(connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", max_size=None))
        self._numbers = itertools.count(1)
        self.problems: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()
        self._process.terminate()
        self._process.wait(20)
        self._folder.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._send(method, self._session, **parameters)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self._socket.recv(timeout=120))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Input.dragIntercepted":
            self._dragged = event["params"]["data"]
        elif event.get("method") == "Runtime.exceptionThrown":
            details = event["params"]["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            entry = event["params"]["entry"]
            self.problems.append(f"{entry['text']} {entry.get('url', '')}")

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"(async () => Boolean(await ({condition})))()"):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition}; {self.problems}; {self.run('document.body.innerText')}")
            time.sleep(0.05)

    def key(self, key: str, modifiers: int = 0) -> None:
        """Presses a key, named as `KeyboardEvent.key` has it."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        codes = {"Escape": 27, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32}
        extra = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" and not modifiers else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers, **extra, **more)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """`kind`: mousePressed, mouseMoved or mouseReleased."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=int(kind != "mouseReleased"),
                  clickCount=1)

    def drag(self, source: str, target: str) -> None:
        """Holds an element that can be dragged, by the mouse, and lets it go over another."""
        (x, y), (to_x, to_y) = ((left + width / 2, top + height / 2)
                                for left, top, width, height in map(self.box, (source, target)))
        self._dragged = None
        self.send("Input.setInterceptDrags", enabled=True)
        self.mouse("mousePressed", x, y)
        for step in (0.1, 0.2, 0.3):
            self.mouse("mouseMoved", x + (to_x - x) * step, y + (to_y - y) * step)
        self.wait("1")
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=to_x, y=to_y, data=self._dragged)
        self.mouse("mouseReleased", to_x, to_y)
        self.send("Input.setInterceptDrags", enabled=False)

    def choose(self, selector: str, *paths: str | Path) -> None:
        """Gives files to an input element."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(Path(path).resolve()) for path in paths])

    def drop(self, *paths: str | Path) -> None:
        """Lets files and folders go in the middle of the page."""
        data = {"items": [], "files": [str(Path(path).resolve()) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "dragOver", "dragOver", "drop"):
            self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            self.send("Input.dispatchDragEvent", type=kind, x=600, y=400, data=data)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, which is scrolled into sight."""
        return tuple(self.run(f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
                              "one.scrollIntoView({block: 'nearest'}); const b = one.getBoundingClientRect();"
                              "return [b.x, b.y, b.width, b.height]; })()"))

    def click(self, selector: str) -> None:
        x, y, width, height = self.box(selector)
        self.mouse("mousePressed", x + width / 2, y + height / 2)
        self.mouse("mouseReleased", x + width / 2, y + height / 2)

    def picture(self, path: str | Path) -> None:
        """Writes what is in sight as a PNG or, with that suffix, WebP."""
        taken = self.send("Page.captureScreenshot", format=Path(path).suffix.lstrip("."))
        Path(path).write_bytes(base64.b64decode(taken["data"]))
