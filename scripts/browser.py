"""Drives a headless Chromium over the DevTools protocol by a pipe: nothing but the standard library is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time


class Browser:
    """One browser with one page. Use it in a `with`."""

    def __init__(self):
        program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
        if program is None:
            raise SystemExit("no Chromium here; install it, such as by: apt-get install -y chromium")
        self.home = tempfile.mkdtemp(prefix="secateur-browser-")
        down_read, self.down = os.pipe()
        self.up, up_write = os.pipe()

        def place():
            # The browser reads from 3 and writes to 4.
            read, write = os.dup(down_read), os.dup(up_write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             f"--user-data-dir={self.home}", "--remote-debugging-pipe", "about:blank"],
            preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(down_read)
        os.close(up_write)
        self.rest, self.number, self.events, self.complaints = b"", 0, [], []
        target = self.send("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        self.session = None
        self.session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def send(self, method, params=None, session=""):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params or {}}
        if session is not None and getattr(self, "session", None):
            message["sessionId"] = self.session
        os.write(self.down, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for said in self.read(deadline - time.monotonic()):
                if said.get("id") == self.number:
                    if "error" in said:
                        raise RuntimeError(f"{method}: {said['error']}")
                    return said["result"]
        raise TimeoutError(method)

    def read(self, wait):
        ready, _, _ = select.select([self.up], [], [], max(0, wait))
        if ready:
            self.rest += os.read(self.up, 1 << 20)
        *whole, self.rest = self.rest.split(b"\0")
        messages = [json.loads(one) for one in whole]
        for said in messages:
            self.hear(said)
        return messages

    def hear(self, said):
        """Notes what a person would see red in the console: errors, refused scripts, exceptions."""
        params = said.get("params", {})
        if said.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))
        if said.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])

    def run(self, script):
        """The value of an expression in the page; promises are waited for."""
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        result = self.send("Runtime.evaluate", asked)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def open(self, url):
        self.send("Page.navigate", {"url": url})

    def until(self, script, seconds=20):
        """Waits until an expression holds, and gives its value."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # While a page loads there may be no body yet.
            value = self.run(f"document.body && ({script})")
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"after {seconds} s still not: {script}\nthe page says:\n{self.text()}")

    def text(self):
        return self.run("document.body.innerText")

    def place(self, selector):
        """The middle of an element, scrolled into sight."""
        quoted = json.dumps(selector)
        self.until(f"!!document.querySelector({quoted})")
        box = self.run(
            f"(() => {{ const e = document.querySelector({quoted}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return {"x": box[0], "y": box[1]}

    def click(self, selector):
        """With the mouse, as a person does."""
        at = self.place(selector)
        for kind in ["mousePressed", "mouseReleased"]:
            self.send("Input.dispatchMouseEvent", {"type": kind, "button": "left", "clickCount": 1, **at})

    def click_text(self, text, kind="button, a"):
        script = (
            f"(() => {{ const e = [...document.querySelectorAll({json.dumps(kind)})].find(e => e.checkVisibility() &&"
            f" e.textContent.trim() === {json.dumps(text)}); if (!e) return false;"
            " document.querySelectorAll('[data-goal]').forEach(o => delete o.dataset.goal); e.dataset.goal = 1; return true; })()"
        )
        self.until(script)
        self.click("[data-goal]")

    def type(self, selector, text):
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select?.()")
        self.send("Input.insertText", {"text": text})

    def choose(self, selector, value):
        quoted = json.dumps(selector)
        self.until(f"!!document.querySelector({quoted})")
        self.run(
            f"(() => {{ const e = document.querySelector({quoted}); e.value = {json.dumps(value)};"
            " e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def press(self, key, code=None):
        more = {"key": key, "code": code or key, "windowsVirtualKeyCode": {"Tab": 9, "Enter": 13, "Escape": 27}.get(key, 0)}
        if key == "Enter":
            more["text"] = "\r"
        for kind in ["keyDown", "keyUp"]:
            self.send("Input.dispatchKeyEvent", {"type": kind, **more})

    def look(self, width=1280, height=900, dark=False):
        """Sets the window and the theme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", {"features": [scheme]})

    def shoot(self, path, whole=True):
        time.sleep(0.4)
        shot = self.send("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        with open(path, "wb") as file:
            file.write(base64.b64decode(shot["data"]))
