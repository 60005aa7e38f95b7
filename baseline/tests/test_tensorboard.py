"""TensorBoard in a real browser, headless, on a run of each script; needs Debian's chromium.

To look yourself: SHOTS=/some/folder pytest baseline/tests/test_tensorboard.py leaves a picture a tab.
"""

import asyncio
import base64
import gzip
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --window-size=1500,1600"""
RUNS = {"baseline": "baseline/run.sbatch", "DISTRIBUTED": "DISTRIBUTED/run_2x2.sbatch"}
RANKS = {"baseline": 1, "DISTRIBUTED": 4}
# What a person sees: also the text inside web components, whose shadow roots hide it.
SEEN = """(() => {
    const texts = [], images = [], heights = [];
    const walk = node => {
        if (node.nodeType === 3) { if (node.data.trim()) texts.push(node.data.trim()); return; }
        if (["SCRIPT", "STYLE", "TEMPLATE", "DOM-MODULE"].includes(node.nodeName)) return;
        if (node.nodeName === "IMG") images.push([node.naturalWidth, node.naturalHeight]);
        if (node.nodeName === "CANVAS" || node.nodeName === "svg")
            heights.push(node.getBoundingClientRect().height);
        if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk);
        node.childNodes.forEach(walk);
    };
    walk(document.body);
    return JSON.stringify({text: texts.join("\\n"), images, charts: heights.filter(h => h > 80).length});
})()"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def fetch(address, seconds=30, **query):
    """The answer as JSON, or as it is; tried again until the server is up."""
    query = f"?{urllib.parse.urlencode(query)}" if query else ""
    for _ in range(seconds * 2):
        try:
            with urllib.request.urlopen(address + query, timeout=seconds) as answer:
                body = answer.read()
        except ConnectionError:
            time.sleep(0.5)
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError):
                raise
            time.sleep(0.5)
        else:
            return json.loads(body) if body[:1] in b'{["' else body
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A short run of each script, and TensorBoard on them: its address."""
    pytest.importorskip("tensorboard")
    runs = tmp_path_factory.mktemp("board") / "runs"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    clean |= {"VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    words = ["--sample", "--limit", "60", "--max-steps", "12", "--log-every", "2"]
    for name, script in RUNS.items():
        how = {"cwd": ROOT, "env": clean, "capture_output": True, "text": True, "timeout": 400}
        command = ["bash", script, *words, "--output", str(runs / name)]
        done = subprocess.run(command, check=False, **how)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    where = ["--host", "127.0.0.1", "--port", str(free_port()), "--logdir", str(runs)]
    with open(runs.parent / "log", "w") as log:
        how = {"stdout": log, "stderr": log, "start_new_session": True}
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *where], **how)
    address = f"http://127.0.0.1:{where[3]}"
    try:
        for _ in range(120):  # it is up before it has read the runs
            if len(fetch(f"{address}/data/runs", 120)) == 2:
                break
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def look(board, tmp_path_factory):
    """look(tab, *words): opens a tab, and tells what is seen once all the words are."""
    if not CHROMIUM:
        pytest.skip("chromium is missing: apt install chromium, or .ci/run")
    aiohttp = pytest.importorskip("aiohttp")  # comes with datasets
    home = tmp_path_factory.mktemp("chromium")
    words = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={home}", "--remote-debugging-port=0"]
    with open(home / "log", "w") as log:
        how = {"stdout": log, "stderr": log, "start_new_session": True}
        browser = subprocess.Popen([*words, "about:blank"], **how)
    marker = home / "DevToolsActivePort"
    for _ in range(120):
        if marker.exists() and marker.read_text().count("\n"):
            break
        assert browser.poll() is None, (home / "log").read_text()[-2000:]
        time.sleep(0.5)
    port = marker.read_text().split()[0]

    async def visit(tab, wanted):
        pages = fetch(f"http://127.0.0.1:{port}/json/list")
        page = next(one["webSocketDebuggerUrl"] for one in pages if one["type"] == "page")
        async with aiohttp.ClientSession() as session:  # noqa: SIM117 the second needs the first
            async with session.ws_connect(page, max_msg_size=2**28) as socket:

                async def ask(method, **params):
                    await socket.send_json({"id": 1, "method": method, "params": params})
                    while "id" not in (answer := await socket.receive_json(timeout=60)):
                        pass
                    return answer["result"]

                await ask("Page.navigate", url="about:blank")  # else only the fragment changes
                await ask("Page.navigate", url=f"{board}/#{tab}")
                begin, seen = time.monotonic(), {"text": ""}
                while time.monotonic() - begin < 60:
                    await asyncio.sleep(1)
                    told = await ask("Runtime.evaluate", expression=SEEN)
                    seen = json.loads(told["result"].get("value") or "{}") or seen
                    if all(word in seen["text"] for word in wanted):
                        await asyncio.sleep(2)  # the charts draw last
                        told = await ask("Runtime.evaluate", expression=SEEN)
                        seen = json.loads(told["result"]["value"])
                        break
                if os.environ.get("SHOTS"):
                    shot = await ask("Page.captureScreenshot")
                    file = pathlib.Path(os.environ["SHOTS"]) / f"{tab}.png"
                    file.write_bytes(base64.b64decode(shot["data"]))
                return seen

    def look(tab, *wanted):
        seen = asyncio.run(visit(tab, wanted))
        missing = [word for word in wanted if word not in seen["text"]]
        assert not missing, f"{tab}: {missing} not in: {seen['text'][:3000]}"
        return seen

    yield look
    browser.terminate()
    browser.wait(20)


def test_overview(look):
    charts = ["loss", "real tokens a second", "share of the step", "learning rate"]
    charts += ["gradient norm", "memory, GiB", "exposed communication", "forward", "backward"]
    seen = look("custom_scalars", "overview", "shares of the step, each phase", *charts)
    assert seen["charts"] >= len(charts)


def test_curves_are_there_and_never_double(look, board):
    assert look("timeseries", "one profiled step", "backward", *RUNS)[
        "charts"
    ]  # it draws what is in view
    for run, tags in fetch(f"{board}/data/plugin/scalars/tags").items():
        own = {f"phases/{name}" for name in ("data", "forward", "backward", "optimizer")}
        own |= {"phases/exposed_communication"} if run.startswith("DIST") else set()
        assert own | {"training/loss", "speed/peak_memory_gib"} <= tags.keys()
        for tag in own | {"training/loss"}:
            points = fetch(f"{board}/data/plugin/scalars/scalars", run=run, tag=tag)
            steps = [step for _, step, _ in points]
            assert steps == sorted(set(steps)) and steps[-1] == 12


def test_settings_and_scores_side_by_side(look):
    scores = ["result/exact_match", "result/f1", "result/steady_epoch_seconds"]
    look("hparams", "batch_size", "batching", "learning_rate", "packed", *scores, *RUNS)


def test_tables(look):
    tables = ["environment", "times", "throughput", "answers", "phases", "operators"]
    look("text", *tables, "torch", "F1", "scorer", "commit")  # the later ones open at a click


def test_operators_and_gaps_are_among_the_texts(board):
    for run, tags in fetch(f"{board}/data/plugin/text/tags").items():
        texts = {}
        for tag in tags:
            told = fetch(f"{board}/data/plugin/text/text", run=run, tag=tag)
            texts[tag.split("/")[0]] = told[-1]["text"]
        assert "aten::addmm" in texts["operators"] and "Self CPU" in texts["operators"]
        for rank in range(RANKS[run.split("/")[0]]):
            assert f"<td>{rank}</td>" in texts["traces"]


def test_time_line_of_every_rank(look, board):
    seen = look("images", "one profiled step", *RUNS)
    drawn = sorted(height for width, height in seen["images"] if width > 300)
    assert len(drawn) == 2 and drawn[1] > drawn[0] + 150  # four ranks' rows are higher than one's


def test_profiler_plugin_has_the_data(board):
    plugin = f"{board}/data/plugin/pytorch_profiler"
    listing = fetch(f"{board}/data/plugins_listing")
    if "pytorch_profiler" not in listing:
        pytest.skip("torch-tb-profiler is not installed")
    for name in ("scalars", "custom_scalars", "hparams", "text", "images", "pytorch_profiler"):
        assert listing[name]["enabled"], name
    for _ in range(120):  # it reads the traces beside
        if len(runs := fetch(f"{plugin}/runs")["runs"]) == 2:
            break
        time.sleep(0.5)
    for name, count in RANKS.items():
        run = next(one for one in runs if one.startswith(name))
        views = fetch(f"{plugin}/views", run=run)
        assert {"Overview", "Operator", "Trace"} <= set(views)
        assert ("Distributed" in views) == (count > 1)
        workers = fetch(f"{plugin}/workers", run=run, view="Overview")
        assert workers == [f"rank{rank}" for rank in range(count)]
        for worker in workers:
            [span, *_] = fetch(f"{plugin}/spans", run=run, view="Overview", worker=worker)
            which = {"run": run, "worker": worker, "span": span}
            overview = fetch(f"{plugin}/overview", **which, view="Overview")
            assert len(overview["steps"]["rows"]) == 2  # the profiled steps
            table = fetch(
                f"{plugin}/operation/table", **which, view="Operator", group_by="Operation"
            )
            assert any("aten::addmm" in row["name"] for row in table["data"])
            trace = fetch(f"{plugin}/trace", **which, view="Trace")
            trace = json.loads(gzip.decompress(trace))
            names = {event.get("name") for event in trace["traceEvents"]}
            assert {"data", "forward", "backward", "optimizer"} <= names
        if count > 1:
            [span, *_] = fetch(f"{plugin}/spans", run=run, view="Distributed", worker="All")
            which = {"run": run, "worker": "All", "span": span, "view": "Distributed"}
            overlap = fetch(f"{plugin}/distributed/overlap", **which)
            assert len(next(iter(overlap["data"].values()))) == count
            assert fetch(f"{plugin}/distributed/commops", **which)["data"]
