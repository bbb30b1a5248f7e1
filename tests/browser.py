"""A headless Chromium for tests of pages: what it shows, asks for and complains about.

Driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/), because a
page with a strict content policy runs no script of ours, and the protocol may.
"""

import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--remote-debugging-port=0", "--disable-dev-shm-usage"),
)

# Every text's contrast with what lies behind it: WCAG 2.2, "contrast (minimum)".
CONTRAST = """
(() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const parse = (text) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = text; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const light = (rgb) => rgb.map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return parse("white");
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (["STYLE", "TITLE", "DESC", "title", "desc"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const svg = element.namespaceURI.endsWith("svg");
    const box = svg && element.closest("svg").querySelector("rect.box");
    const text = parse(svg ? style.fill : style.color);
    const back = box ? parse(getComputedStyle(box).fill) : ground(element);
    const [a, b] = [light(text.slice(0, 3)), light(back.slice(0, 3))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()
"""


class Browser:
    """One page in a headless browser; use it in a `with` statement."""

    def __init__(self, folder: Path):
        program = next((found for name in NAMES if (found := shutil.which(name))), None)
        if program is None:
            pytest.skip("no chromium or chrome on this machine: apt-get install chromium")
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr
        for line in self._process.stderr:  # it says where it listens, and nothing more of use
            if "DevTools listening on" in line:
                address = line.split()[-1].strip()
                break
        else:
            raise RuntimeError("the browser ended before it listened")
        self._socket = connect(address, max_size=None)
        self._session = ""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: Any) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(20)
        assert self._process.stderr
        self._process.stderr.close()

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events on the way are kept."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(60))
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def open(
        self, path: Path, *, width: int = 1200, dark: bool = False, fragment: str = ""
    ) -> None:
        """Show a file, as wide as told, in one theme; returns when it is loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self("Page.navigate", url=path.as_uri() + fragment)
        deadline = time.monotonic() + 60
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(json.loads(self._socket.recv(deadline - time.monotonic())))

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Everything that reached the console, the log or failed, since the page was opened."""
        self.value("0")  # what was sent before this answer has arrived with it
        told = []
        for event in self.events:
            name, facts = event.get("method"), event.get("params", {})
            if name in ("Runtime.exceptionThrown", "Network.loadingFailed"):
                told.append(json.dumps(facts))
            elif name == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning"):
                told.append(json.dumps(facts["args"]))
            elif name == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
                told.append(facts["entry"]["text"])
        return told

    def requests(self) -> list[str]:
        """The addresses it asked for since the page was opened, the data in the page left out."""
        asked = [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]
        return [address for address in asked if not address.startswith("data:")]

    def contrasts(self) -> list[tuple[float, str]]:
        """(contrast, text) of every text that can be seen, the faintest first."""
        return sorted((ratio, text) for ratio, text in self.value(CONTRAST))

    def unfold(self, page: Path, *, width: int, dark: bool) -> int:
        """Open a page and all that folds out in it; returns how many texts can be seen.

        The page must complain of nothing, ask for nothing but itself, be no wider than the window,
        and every text must be legible: AssertionError otherwise.
        """
        self.open(page, width=width, dark=dark)
        assert self.complaints() == []
        assert self.requests() == [page.as_uri()]
        assert self.value("document.documentElement.scrollWidth - innerWidth") == 0
        self.value("document.querySelectorAll('details').forEach((d) => d.open = true)")
        contrasts = self.contrasts()
        assert contrasts[0][0] >= 4.5, contrasts[:3]
        return len(contrasts)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it prints."""
        printed = self("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69)
        path.write_bytes(base64.b64decode(printed["data"]))
