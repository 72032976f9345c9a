"""A headless Chromium, controlled over a pipe with the DevTools protocol: JSON messages, each ended by a zero
byte."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
MISSING = "no Chromium on PATH (Debian: apt-get install chromium): pages were not tested in a browser"


class Browser:
    """One page of a headless Chromium. `problems` collects console messages, script errors and failed
    requests."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        (browser_in, to_browser), (from_browser, browser_out) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"]
        options += ["--autoplay-policy=no-user-gesture-required", "--disable-background-networking"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self.profile.name}"]

        def connect_pipes():  # the browser reads from descriptor 3 and writes to 4
            os.dup2(browser_in, 103)
            os.dup2(browser_out, 104)
            os.dup2(103, 3)
            os.dup2(104, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *options, "about:blank"],
            preexec_fn=connect_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_in)
        os.close(browser_out)
        self.to, self.back, self.buffer, self.number = to_browser, from_browser, b"", 0
        self.session, self.problems, self.loaded = None, [], False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        """Send a DevTools command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive(60)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def receive(self, limit_s):
        """The next message, or {} if none comes in time. Events set `problems` and `loaded`."""
        deadline = time.monotonic() + limit_s
        while b"\0" not in self.buffer:
            if not select.select([self.back], [], [], max(deadline - time.monotonic(), 0))[0]:
                return {}
            block = os.read(self.back, 1 << 20)
            assert block, "the browser has ended"
            self.buffer += block
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        event, details = message.get("method"), message.get("params", {})
        if event == "Runtime.consoleAPICalled":
            self.problems.append(" ".join(str(x.get("value")) for x in details["args"]))
        elif event == "Runtime.exceptionThrown":
            self.problems.append(details["exceptionDetails"]["text"])
        elif event == "Log.entryAdded":
            self.problems.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent" and not details["request"]["url"].startswith(
            ("file:", "data:", "blob:")
        ):
            self.problems.append(f"requests {details['request']['url']}")
        elif event == "Page.loadEventFired":
            self.loaded = True
        return message

    def open(self, path, width=1280, height=900, dark=False):
        """Open a file and wait until it is loaded."""
        self.loaded = False
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.ask("Page.navigate", url=Path(path).resolve().as_uri())
        while not self.loaded:
            assert self.receive(60), "the page does not load"

    def evaluate(self, script):
        """The value of a script. If it is a promise, wait for its result."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key):
        """Press a key, such as Tab."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        more = {"text": {"Enter": "\r", " ": " "}.get(key, ""), "windowsVirtualKeyCode": codes[key]}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, **more)

    def accessible_nodes(self):
        """The nodes that a screen reader gets: (role, name) of each that is not ignored."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def close(self):
        with contextlib.suppress(Exception):
            self.session = None
            self.ask("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        self.profile.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
