"""A headless Chromium for test_tensorboard.py: what a person sees on a page, and pictures of it."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Without WebGL TensorBoard draws its charts as SVG, which is quicker where there is no GPU; a
# container's /dev/shm is small.
FLAGS = """--headless --no-sandbox --disable-gpu --disable-3d-apis --disable-dev-shm-usage
    --disable-quic --no-first-run --disable-sync --disable-background-networking
    --disable-component-update --window-size=1500,1600 --remote-debugging-port=0"""
# Returns {texts, images, paths}. Web components' insides, which shadow roots hide, are seen too.
SEEN = """
(() => {
    const texts = [], images = [], paths = [];
    const hidden = ["SCRIPT", "STYLE", "TEMPLATE", "DOM-MODULE"];
    const walk = node => {
        if (hidden.includes(node.nodeName)) return;
        if (node.nodeType === Node.TEXT_NODE && node.data.trim()) texts.push(node.data.trim());
        if (node.nodeName === "IMG") images.push([node.naturalWidth, node.naturalHeight]);
        if (node.nodeName === "path") paths.push(node.getAttribute("d") || "");
        if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk);
        node.childNodes.forEach(walk);
    };
    walk(document.body);
    return JSON.stringify({texts: texts.join("\\n"), images, paths});
})()
"""


def fetch(address, seconds=30, **query):
    """Returns what an address answers, as JSON where it is; asks until its server is up."""
    if query:
        address += "?" + urllib.parse.urlencode(query)
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=seconds) as answer:
                body = answer.read()
            return json.loads(body) if body[:1] in b'{["' else body
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert time.monotonic() < deadline, f"{address} does not answer"
            time.sleep(0.2)


def curves(seen):
    """The curves of the charts on a page, each as its points, (x, y), in pixels."""
    found = []
    for path in seen["paths"]:
        # Icons have other commands than "move to" and "line to".
        if re.fullmatch(r"M[-\d.,e]+(L[-\d.,e]+)+", path):
            points = [point.split(",") for point in path[1:].split("L")]
            found.append([(float(x), float(y)) for x, y in points])
    return found


class Browser:
    """Keeps its profile and its log in a folder; look() opens a page."""

    def __init__(self, folder):
        self.log = folder / "log"
        words = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}", "about:blank"]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        # It says there on which port it listens.
        said = folder / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (said.exists() and said.read_text().count("\n")):
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, "chromium does not start"
            time.sleep(0.1)
        self.port = said.read_text().split()[0]

    def close(self):
        self.process.terminate()
        self.process.wait(20)

    def look(self, address, words, curve_count=0, image_count=0, picture=None, seconds=60):
        """Opens a page, waits until all the words, so many curves and so many images of more than
        300 pixels are on it, and returns what is seen: texts, images (their sizes), paths.

        picture: a file for a picture of the page."""

        def missing(seen):
            return [word for word in words if word not in seen["texts"]]

        def is_ready(seen):
            images = [width for width, height in seen["images"] if width > 300]
            drawn = len(curves(seen)) >= curve_count and len(images) >= image_count
            return not missing(seen) and drawn

        seen = asyncio.run(self.visit(address, is_ready, picture, seconds))
        assert not missing(seen), f"{address}: {missing(seen)} not in: {seen['texts'][:3000]}"
        assert len(curves(seen)) >= curve_count, f"{address}: {len(curves(seen))} curves"
        return seen

    async def visit(self, address, is_ready, picture, seconds):
        import aiohttp

        assert self.process.poll() is None, f"chromium has ended: {self.log.read_text()[-2000:]}"
        pages = fetch(f"http://127.0.0.1:{self.port}/json/list")
        [page] = [page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page"]
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(page, max_msg_size=2**28) as socket:

                async def ask(method, **parameters):
                    await socket.send_json({"id": 1, "method": method, "params": parameters})
                    while True:
                        answer = await socket.receive_json(timeout=60)
                        if "id" in answer:
                            return answer["result"]

                async def see():
                    answer = await ask("Runtime.evaluate", expression=SEEN)
                    nothing = '{"texts": "", "images": [], "paths": []}'
                    return json.loads(answer["result"].get("value") or nothing)

                # Else only the fragment would change, and nothing be loaded anew.
                await ask("Page.navigate", url="about:blank")
                await ask("Page.navigate", url=address)
                deadline = time.monotonic() + seconds
                seen = await see()
                while not is_ready(seen) and time.monotonic() < deadline:
                    await asyncio.sleep(0.2)
                    seen = await see()
                if picture:
                    # A picture of what has been drawn to its end.
                    await asyncio.sleep(2)
                    answer = await ask("Page.captureScreenshot")
                    picture.write_bytes(base64.b64decode(answer["data"]))
                return seen
