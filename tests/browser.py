"""A real headless Chromium, driven through its own pipe: opens a page and says what a reader would meet."""

import base64
import json
import os
import shutil
import subprocess
import tempfile

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def find():
    """Chromium's path; installs Debian's where that can be done. None if there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        packages = ["chromium-headless-shell", "fonts-noto-cjk"]
        for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", "-qq", *command], capture_output=True, timeout=600)
        found = next(filter(None, map(shutil.which, NAMES)), None)
    return found


class Browser:
    """One Chromium process with one page; `events` is all that it said since `open`."""

    def __init__(self, path):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        asks, self.asks = os.pipe()  # Chromium reads file 3 and writes file 4
        self.answers, answers = os.pipe()

        def places():
            os.dup2(os.dup(asks), 3)
            os.dup2(os.dup(answers), 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        flags += ["--no-first-run", "--disable-component-update", "--disable-background-networking"]
        self.process = subprocess.Popen(
            [path, *flags, f"--user-data-dir={self.profile.name}", "about:blank"],
            preexec_fn=places,  # noqa: PLW1509
            close_fds=False,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(asks)
        os.close(answers)
        self.file, self.number, self.events, self.session = os.fdopen(self.answers, "rb", 0), 0, [], None
        self.rest = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _read(self):
        while b"\0" not in self.rest:
            more = os.read(self.file.fileno(), 1 << 20)
            assert more, "Chromium has ended"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, **parameters):
        """Ask for something and wait for the answer; what Chromium tells meanwhile is kept."""
        self.number += 1
        ask = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            ask["sessionId"] = self.session
        os.write(self.asks, json.dumps(ask).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self.number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.events.append(message)

    def open(self, file, width, scheme):
        """Show a file at a width in pixels, for readers of "light" or "dark" pages."""
        self.events = []
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=file.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression):
        """What JavaScript says on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self):
        """Errors and warnings of the console, exceptions, failed requests."""
        bad = []
        for event in self.events:
            method, told = event["method"], event["params"]
            if method in ("Runtime.exceptionThrown", "Network.loadingFailed"):
                bad.append(told)
            if method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                bad.append(told)
            if method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
                bad.append(told)
        return bad

    def requests(self):
        """Every address that the page asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, file):
        """The whole page as a PNG."""
        height = self.value("document.documentElement.scrollHeight")
        width = self.value("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self):
        """End the process."""
        os.close(self.asks)
        self.process.kill()
        self.process.wait()
        self.file.close()
        self.profile.cleanup()


@pytest.fixture(scope="session")
def browser():
    """A Browser, or a visible skip."""
    path = find()
    if path is None:
        pytest.skip("no Chromium here, and apt-get can't install chromium-headless-shell")
    found = Browser(path)
    yield found
    found.close()
