"""Looks at emberd's page as a person does: in a shape and colours, by keys, and with an eye on its console."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

from browser import WAIT_S, Browser

if TYPE_CHECKING:
    from pathlib import Path

_KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}


class Viewer(Browser):
    """A browser that opens each page in a tab of its own, without cookies and cache of those before."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "--force-color-profile=srgb", "--hide-scrollbars")
        self.events: list[dict[str, Any]] = []
        """What the page has done since `view`: the protocol's events."""

    def view(
        self, url: str, *, width: int = 1280, height: int = 900, is_dark: bool = False, script: str = ""
    ) -> None:
        """Open a page; it need not have loaded yet. `script` runs before its own ones."""
        self._session = ""
        context = self.do("Target.createBrowserContext")["browserContextId"]
        target = self.do("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.do(f"{domain}.enable")
        self.shape(width, height, is_dark=is_dark)
        if script:
            self.do("Page.addScriptToEvaluateOnNewDocument", source=script)
        self.do("Page.navigate", url=url)

    def shape(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """Give the page a size, in pixels of CSS, and colours."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def wait_for(self, condition: str) -> None:
        """Return as soon as an expression is true; it is asked with each frame, also across a reload."""
        look = f"""new Promise((resolve, reject) => {{
            const ends = performance.now() + {WAIT_S * 1000};
            const look = () => {{
                let value = false;
                try {{ value = Boolean({condition}); }} catch {{ }}
                if (value) resolve();
                else if (performance.now() > ends) reject(new Error("it did not come"));
                else setTimeout(look, 16);
            }};
            look();
        }})"""
        ends_s = time.monotonic() + WAIT_S
        while True:
            try:
                told = self.do("Runtime.evaluate", expression=look, awaitPromise=True)
            except AssertionError as error:
                if "navigated" not in str(error) or time.monotonic() > ends_s:
                    raise
                continue  # the page went away while it was asked: the next one is asked
            if "exceptionDetails" not in told:
                return
            raise AssertionError(f"{condition} did not come; the page says: {self.run('document.body.innerText')}")

    def press(self, key: str) -> None:
        """Press and release a key, named as in KeyboardEvent.key."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        facts = {"key": key, "windowsVirtualKeyCode": _KEY_CODES.get(key, 0)}
        self.do("Input.dispatchKeyEvent", type="keyDown", text=text, **facts)
        self.do("Input.dispatchKeyEvent", type="keyUp", **facts)

    def pinch(self, selector: str, before: float, after: float) -> None:
        """Put two fingers on the middle of an element, so many pixels apart, and move them to another distance."""
        x, y = self._middle_of(selector)

        def fingers(apart: float) -> list[dict[str, float]]:
            return [{"x": x + way * apart / 2, "y": y, "id": number} for number, way in enumerate((-1, 1))]

        self.do("Input.dispatchTouchEvent", type="touchStart", touchPoints=fingers(before))
        for step in range(1, 6):
            points = fingers(before + (after - before) * step / 5)
            self.do("Input.dispatchTouchEvent", type="touchMove", touchPoints=points)
        self.do("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def drag(self, selector: str, begin: float, end: float) -> None:
        """Drag the mouse over an element, from and to so many pixels right of its middle."""
        x, y = self._middle_of(selector)
        held = {"button": "left", "buttons": 1, "clickCount": 1, "y": y}
        self.do("Input.dispatchMouseEvent", type="mousePressed", x=x + begin, **held)
        self.do("Input.dispatchMouseEvent", type="mouseMoved", x=x + end, **held)
        self.do("Input.dispatchMouseEvent", type="mouseReleased", x=x + end, **held)

    def _middle_of(self, selector: str) -> tuple[float, float]:
        box = self.run(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def picture(self, path: Path) -> None:
        """Write a screenshot of the whole page as PNG."""
        data = self.do("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def picture_of(self, selector: str, path: Path) -> None:
        """Write a screenshot of a part of the page as PNG."""
        box = self.run(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        clip = {**{name: box[name] for name in ("x", "y", "width", "height")}, "scale": 1}
        told = self.do("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(told["data"]))

    def seen(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of that name so far."""
        self.run("0")  # reads what has come
        return [each["params"] for each in self.events if each["method"] == method]

    def complaints(self) -> list[str]:
        """Return what the page has complained of on its console: errors, warnings and violations of its policy."""
        thrown = [str(each["exceptionDetails"]) for each in self.seen("Runtime.exceptionThrown")]
        called = [str(each["args"]) for each in self.seen("Runtime.consoleAPICalled") if each["type"] != "log"]
        entries = [each["entry"] for each in self.seen("Log.entryAdded")]
        return thrown + called + [f"{each['text']} {each.get('url', '')}" for each in entries]

    def _next(self) -> dict[str, Any]:
        message = super()._next()
        if "method" in message and message.get("sessionId") == self._session:
            self.events.append(message)
        return message
