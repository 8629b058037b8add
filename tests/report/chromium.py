"""A headless Chromium driven through its DevTools pipe: nothing has to be installed for it beside the browser."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
                 if (found := shutil.which(name))), None)


def _pipe():
    """A pipe whose ends are far from 3 and 4."""
    ends = os.pipe()
    far = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 32) for end in ends]
    for end in ends:
        os.close(end)
    return far


class Browser:
    """A headless Chromium on a pair of pipes: one JSON message after another, each ended by a zero byte."""

    def __init__(self, folder):
        there, here = (_pipe() for _ in range(2))
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
             "--disable-dev-shm-usage", f"--user-data-dir={folder}", "--remote-debugging-pipe"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(there[0], 3), os.dup2(here[1], 4)))  # it reads 3 and writes 4
        os.close(there[0]), os.close(here[1])
        self.out, self.into, self.left, self.number, self.said = there[1], here[0], b"", 0, []
        try:
            self.attach()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def attach(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = None
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        body = {"id": self.number, "method": method, "params": params}
        if getattr(self, "session", None):
            body["sessionId"] = self.session
        os.write(self.out, json.dumps(body).encode() + b"\0")
        while True:
            message = self.read()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def read(self):
        while b"\0" not in self.left:
            more = os.read(self.into, 1 << 16)
            assert more, "Chromium ended"
            self.left += more
        line, _, self.left = self.left.partition(b"\0")
        message = json.loads(line)
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(message["params"])
        return message

    def open(self, place, width=1280, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def run(self, script, **more):
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, **more)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def keys(self, *names):
        for name in names:
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name,
                          windowsVirtualKeyCode={"Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27}[name])

    def close(self):
        try:
            self.session = None
            self.call("Browser.close")
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.out), os.close(self.into)
