"""What bench.py, cost.py and paired.py share: train.py as a module, and a table as report.py reads
it (python baseline/report.py --table bench FILE)."""

import importlib.util, json, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# minilm/ (BERT's shape, 22.6 M parameters) and squad/train.json and dev.json, which are not ours
SHARED = Path(os.environ.get("SHARED") or ROOT.parent / "shared")
RESULTS = ROOT / "baseline/results"
TRAIN, REPORT = ROOT / "baseline/train.py", ROOT / "baseline/report.py"


def load_train():
    """Returns baseline/train.py as a module, with its log silent."""
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    module = sys.modules["train"] = importlib.util.module_from_spec(spec)  # compiling asks for it
    spec.loader.exec_module(module)
    module.log = lambda *_: None
    return module


def need(*paths):
    """Ends with one line where the data or the model is not there."""
    for path in paths:
        if not Path(path).exists():
            sys.exit(f"error: {path} is not there: set SHARED to a folder with minilm/ and squad/")


def environment(**more):
    """Returns what a reader must know of the machine; load is how many others wanted its cores."""
    found = subprocess.run([sys.executable, REPORT, "--environment"], capture_output=True)
    found = json.loads(found.stdout or "{}")
    names = "date commit dirty devices cores python torch transformers datasets tokenizers numpy"
    kept = {name: found[name] for name in names.split() if found.get(name) is not None}
    return kept | {"load": round(os.getloadavg()[0], 1)} | more


def write_tables(path, tables):
    """Writes tables {title, conditions, columns, rows, environment}, and shows them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".tmp").replace(path)
    subprocess.run([sys.executable, REPORT, "--table", "bench", path], check=False)
