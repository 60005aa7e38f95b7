"""README.md against the project: its figures, commands, links, names and tables."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *ROOT.glob("*/results/README.md")]
PAGES = {page: page.read_text(encoding="utf-8") for page in PAGES if page.exists()}
BLOCK = re.compile(r"<!-- report: (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)
BLOCKS = [found for text in PAGES.values() for found in BLOCK.findall(text)]
FENCED = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = [line.split("  #")[0].strip() for line in FENCED.splitlines() if line.strip()]
SHORT = ["--limit", "40", "--max-steps", "4", "--no-profile"]


def call(*words, **how):
    how = {"capture_output": True, "text": True, "check": False, "cwd": ROOT} | how
    return subprocess.run(words, **how)


def train_module(folder):
    spec = importlib.util.spec_from_file_location(f"train_{folder}", ROOT / folder / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words, text", BLOCKS, ids=[words for words, _ in BLOCKS])
def test_figures_are_what_the_report_prints(words, text):
    files = [word for word in words.split() if "/" in word]
    assert files and all("results/" in file and (ROOT / file).exists() for file in files)
    done = call(sys.executable, "baseline/report.py", *words.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout == text


def test_figures_name_what_they_were_measured_on():
    marks = [
        sum(t.count(mark) for t in PAGES.values()) for mark in ("<!-- report:", "<!-- end -->")
    ]
    assert BLOCKS and marks == [len(BLOCKS)] * 2
    for words, text in BLOCKS:
        if "--table" in words:
            assert re.search(r"^\*.*\*$", text, re.MULTILINE), f"{words}: no caption"


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_and_names_lead_somewhere():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not link.startswith("http"):
                assert target.exists(), link
                assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"(?:baseline|DISTRIBUTED|\.ci)/[\w./-]*\w", README):
        assert (ROOT / name).exists() or name.startswith(("baseline/2", "baseline/results")), name


def test_options_and_variables_are_the_scripts_own():
    files = [*ROOT.glob("*/*.py"), *ROOT.glob("*/*.sh"), *ROOT.glob("*/*.sbatch")]
    files += ROOT.glob("*/tests/*.py")
    texts = "".join(file.read_text(encoding="utf-8") for file in files if "readme" not in file.name)
    prose = re.sub(r"```diff\n.*?```", "", README, flags=re.DOTALL)
    others = "--gres --gpus --mem --wrap --hint --kill-on-bad-exit --logdir --format --grep"
    others += " --fixed-strings"
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose)) - set(others.split()):
        assert f'"{option}"' in texts or option in ("--no-compile", "--no-profile"), option
    rows = re.findall(r"^\| (`[A-Z][^|]*) \|", prose, re.MULTILINE)
    for name in re.findall(r"`([A-Z][A-Z_]+)", " ".join(rows)):
        assert name in texts or name.startswith("SBATCH_"), name


def test_what_distribution_takes_has_a_row_for_each_mark():
    text = (ROOT / "DISTRIBUTED/train.py").read_text(encoding="utf-8")
    marks = re.findall(r'(?:# |""")DDP: (.*)', text)
    marks = list(dict.fromkeys(mark.removesuffix('"""') for mark in marks))
    table = README.split("### What distribution takes")[1].split("\n#")[0]
    rows = re.findall(r"^\| (.*?) \| .*\w.* \|$", table, re.MULTILINE)[1:]
    assert rows == marks


def test_the_top_holds_what_it_should():
    told = call("git", "ls-files").stdout
    if not told:
        pytest.skip("no git checkout: what belongs to the project is not known")
    top = {line.split("/")[0] for line in told.splitlines()}
    assert top == {"baseline", "DISTRIBUTED", "README.md", "requirements.txt", ".gitignore", ".ci"}
    assert not re.search(r"/(root|home|work)/", README)


def test_tags_name_commits():
    said = dict(re.findall(r"git tag -f (\w+) .*--grep \'(.*?)\'", README))
    assert said.keys() == {"baseline", "DISTRIBUTED"}
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: no commits to look for")
    for name, subject in said.items():
        assert README.count(subject) == 2, name
        find = ["git", "log", "-1", "--format=%s", "--fixed-strings", "--grep", subject]
        found = call(*find).stdout.strip()
        assert found == subject, f"{name}: no commit has the subject {subject!r}"


def test_commands_are_bash():
    assert not call("bash", "-n", input=FENCED).stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("sbatch")])
def test_cluster_commands_name_a_script_and_options_it_takes(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    script, folder = ROOT / words[at], words[at].split("/")[0]
    assert script.exists() and not call("bash", "-n", script).returncode
    train_module(folder).parse_arguments(words[at + 1 :])
    known = {"-N", "-A", "-p", "-t", "-c", "--gres"}
    assert {word.split("=")[0] for word in words[1:at] if word.startswith("-")} <= known


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The project in a folder with a space in its name, and a way to type a command there."""
    root = tmp_path_factory.mktemp("a stranger") / "my folder"
    for name in ("baseline", "DISTRIBUTED", ".ci"):
        hide = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, root / name, ignore=hide)
    for name in ("README.md", "requirements.txt"):
        shutil.copy(ROOT / name, root)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PYTEST"))}
    environment |= {"VENV": sys.prefix, "SQUAD_CACHE": str(root / "my cache")}
    environment |= {"OMP_NUM_THREADS": "1", "LADDER_STEPS": "4", "SCALING_REPEATS": "1"}

    def type_in(command, seconds=300):
        done = call("bash", "-c", command, env=environment, timeout=seconds, cwd=root)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    type_in.root = root
    return type_in


def test_a_stranger_types_the_commands(stranger):
    """In the README's order; the long ones shortened, those for a cluster left to other tests."""
    tried = []
    for command in COMMANDS:
        words = command.split()
        if words[0] == "bash" and "--sample" in words:
            said = stranger(shlex.join([*words, *SHORT, "--output", f"runs/{len(tried)}"]))
            assert "--- results" in said and "exact match, F1" in said
        elif words[0] == "bash":  # prepare.sh, without the hub
            assert "next: " in stranger(f"{command} --sample")
        elif "report.py" in command:
            said = stranger(command.replace("python", shlex.quote(sys.executable)))
            assert said.startswith("# Report") and "## Speed-up" in said
        elif words[0] == "python":
            said = stranger(f"{shlex.quote(sys.executable)} {words[1]} --help")
            assert all(word in said for word in words[2:] if word.startswith("--")), command
        elif words[0] == "tensorboard":
            said = stranger("source baseline/env.sh && tensorboard --version_tb")
            assert re.match(r"\d+\.\d+", said.strip())
        elif command == "source baseline/env.sh":
            stranger(f"{command} && python -c 'import torch'")
        elif "pytest" in command:
            said = stranger(f"{command} --collect-only -q baseline/tests/test_readme.py")
            assert "test_readme.py" in said or "deselected" in said
        else:
            assert words[0] in ("sbatch", "git"), f"no test knows how to try: {command}"
            continue
        tried.append(command)
    assert len(tried) > 8


@pytest.mark.slow
@pytest.mark.parametrize("script", ["baseline/ladder.sbatch", "DISTRIBUTED/scaling.sbatch"])
def test_a_stranger_types_the_long_commands(stranger, script):
    said = stranger(f"bash {script} --sample --limit 60 --epochs 1", 1500)
    assert said.count("--- results") >= 5 and "# Report" in said


def test_the_diff_for_another_model_applies(tmp_path):
    """And the models that it speaks of give packed what they give padded."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    diff = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "baseline").mkdir()
    shutil.copy(ROOT / "baseline/train.py", tmp_path / "baseline")
    done = call("git", "apply", "--unsafe-paths", "-", input=diff, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = train_module("baseline")
    after = (tmp_path / "baseline/train.py").read_text().replace('"packed", packed', '"p2", packed')
    assert after != (ROOT / "baseline/train.py").read_text()
    changed = dict(vars(before))
    exec(compile(after, "changed", "exec"), changed)  # noqa: S102 our own file
    small = {"vocab_size": 2000, "hidden_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "intermediate_size": 64, "dim": 32, "n_layers": 2}
    small |= {"n_heads": 2, "hidden_dim": 64, "embedding_size": 16}
    features = {"begin": torch.tensor([0, 20, 45, 80]), "lengths": torch.tensor([20, 25, 35])}
    features |= {"tokens": torch.randint(5, 2000, (80,)), "first": torch.tensor([8, 9, 10])}
    features |= {"start": torch.tensor([9, 10, 11]), "end": torch.tensor([10, 11, 12])}
    features, chosen = {"table": features, "pad": 0}, torch.arange(3)
    for kind in ("distilbert", "electra"):
        config = transformers.AutoConfig.for_model(kind, **small)
        family = {"distilbert": "DistilBert", "electra": "Electra"}[kind]
        torch.manual_seed(0)
        getattr(transformers, f"{family}ForQuestionAnswering")(config).save_pretrained(
            tmp_path / kind
        )
        logits = {}
        for batching in ("padded", "packed"):
            words = ["--model", str(tmp_path / kind), "--device", "cpu", "--dropout", "0"]
            args = before.parse_arguments([*words, "--batching", batching])
            model = before.load_model(args, transformers.AutoConfig.from_pretrained(args.model))
            shapes = {}
            if batching == "packed":
                shapes |= {"tokens": 128, "strata": [(0, 2, 32), (2, 3, 40)]}
            batch = before.make_batch(features, chosen, shapes, 40)
            logits[batching] = before.span_logits(model.eval(), batch, args)
        real = torch.isfinite(logits["padded"])
        assert real.sum() == 2 * 80
        assert torch.allclose(logits["padded"][real], logits["packed"][real], atol=1e-5)
        model = changed["load_model"](args, transformers.AutoConfig.from_pretrained(args.model))
        names = ("dropout", "attention_dropout", "qa_dropout", "hidden_dropout_prob")
        assert not any(getattr(model.config, name, 0) for name in names)


def refresh():
    """`python baseline/tests/test_readme.py` prints the pages' figures anew, into them."""

    def again(found):
        done = call(sys.executable, "baseline/report.py", *found[1].split(), check=True)
        return f"<!-- report: {found[1]} -->\n{done.stdout}<!-- end -->"

    for page, text in PAGES.items():
        page.write_text(BLOCK.sub(again, text), encoding="utf-8")


if __name__ == "__main__":
    refresh()
