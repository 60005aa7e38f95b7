"""What the measuring scripts beside it share: train.py as a module, the small model and data, and
files of tables, as `python baseline/report.py --table bench FILE` prints them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "baseline/train.py"
REPORT = ROOT / "baseline/report.py"
RESULTS = ROOT / "baseline/results"

# Not of the project: a small BERT (22.6 million parameters) and questions in SQuAD's own JSON.
SHARED = Path(os.environ.get("SHARED") or ROOT.parent / "shared")
MODEL = SHARED / "minilm"
TRAIN_FILE = SHARED / "squad/train.json"
VALIDATION_FILE = SHARED / "squad/dev.json"

# What of describe_environment stands in a table's caption.
MACHINE_FACTS = ["date", "commit", "dirty", "devices", "cores", "python"]
MACHINE_FACTS += ["torch", "transformers", "datasets", "tokenizers", "numpy"]


def load_train():
    """Returns baseline/train.py as a module."""
    specification = importlib.util.spec_from_file_location("train", TRAIN)
    module = importlib.util.module_from_spec(specification)
    sys.modules["train"] = module  # compiling looks for it there
    specification.loader.exec_module(module)
    return module


def silence(train):
    """Keeps train.py's log and progress bars off the terminal: the tables are to be read there."""
    train.log = lambda text, file=None: None
    train.progress = lambda items, description: items


def need(*paths):
    """Ends with one line where the model or the data is not there."""
    for path in paths:
        if not Path(path).exists():
            sys.exit(f"error: {path} is not there: set SHARED to a folder with minilm/ and squad/")


def describe_machine(train, device_type="cpu"):
    """Returns what a reader must know of the machine to trust a table's figures."""
    everything = train.describe_environment(torch.device(device_type), train.describe_code())
    machine = {name: everything[name] for name in MACHINE_FACTS if everything.get(name) is not None}
    # How many processes wanted the cores: more than the benchmark's own, and times are too long.
    machine["load"] = round(os.getloadavg()[0], 1)
    return machine


def write_tables(path, tables):
    """Writes tables {title, conditions, columns, rows, environment} to a file.

    They take the place of those of the same title; the file's others stay."""
    path = Path(path)
    titles = [table["title"] for table in tables]
    kept = []
    if path.exists():
        content = json.loads(path.read_text())
        before = content if isinstance(content, list) else [content]
        kept = [table for table in before if table["title"] not in titles]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(kept + tables, indent=1, ensure_ascii=False)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def show_tables(path):
    """Prints a file's tables."""
    command = [sys.executable, REPORT, "--table", "bench", path]
    subprocess.run(command, check=False)
