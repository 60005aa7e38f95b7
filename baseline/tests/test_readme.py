"""The READMEs against the project: figures, links, names, options, commands, tags, and the diffs.

python baseline/tests/test_readme.py    prints all tables and charts anew, into the pages
"""

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["baseline", "DISTRIBUTED"]
NAMES = ["README.md", *(f"{folder}/README.md" for folder in FOLDERS)]
NAMES += [f"{folder}/results/README.md" for folder in FOLDERS]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = PAGES["README.md"]

BLOCK = re.compile(r"<!-- report: (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)
BLOCKS = [found for text in PAGES.values() for found in BLOCK.findall(text)]
# A change for an engineer: its title in bold, some prose, the diff.
CHANGE = re.compile(r"^\*\*([^*\n]+)\*\*[^\n]*\n\n```diff\n(.*?)```", re.DOTALL | re.MULTILINE)
CHANGES = dict(CHANGE.findall(PAGES["baseline/README.md"]))

# Options of other programs: sbatch, srun, git, pip, TensorBoard, ssh.
OTHERS_OPTIONS = {"--gres", "--gpus", "--mem", "--wrap", "--hint", "--kill-on-bad-exit"}
OTHERS_OPTIONS |= {"--logdir", "--format", "--grep", "--fixed-strings", "--detach", "--force"}
OTHERS_OPTIONS |= {"--directory", "--help", "--time", "--signal", "--array", "--export"}
OTHERS_OPTIONS |= {"--ntasks-per-node"}
OTHERS_OPTIONS |= {"--gpu", "--count"}  # of .ci/fake-gpu/run
# The other half of an option that can be switched off.
SWITCHED_OFF = {"--no-compile", "--no-profile"}
SBATCH_OPTIONS = {"-N", "-A", "-p", "-t", "-c", "--gres", "--array"}
# What other programs say, in the table of troubles.
OTHERS_WORDS = {"driver too old"}


# 1. What the pages say


def call(*words, **options):
    """Runs a command in the project's root."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, **options}
    return subprocess.run([str(word) for word in words], check=False, **options)


def fenced_commands():
    """The lines of the pages' bash blocks without their comments, each once, in their order."""
    commands = {}
    for text in PAGES.values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                command = line.split("  #")[0].strip()
                if command:
                    commands[command] = None
    return list(commands)


def sbatch_commands():
    """Commands for a cluster, of the bash blocks and within lines; not those with a gap in them."""
    commands = fenced_commands()
    for text in PAGES.values():
        commands += re.findall(r"`([^`\n]*sbatch [^`\n]*)`", text)
    commands = dict.fromkeys(commands)
    return [
        command
        for command in commands
        if re.match(r"([A-Z_]+=\S+ )*sbatch ", command)
        and "--wrap" not in command
        and "..." not in command
    ]


def scripts_text():
    files = [file for end in ("py", "sh", "sbatch") for file in ROOT.glob(f"*/*.{end}")]
    files += ROOT.glob("*/benchmarks/*")
    files += [ROOT / ".ci/slurm-cluster"]
    return "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def load_train(folder):
    path = ROOT / folder / "train.py"
    specification = importlib.util.spec_from_file_location(f"train_{folder}", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parse():
    """parse(folder, words): the arguments that its train.py makes of them."""
    modules = {folder: load_train(folder) for folder in FOLDERS}
    return lambda folder, words: modules[folder].parse_arguments(words)


def section(page, heading):
    """The text below a heading, up to the next one of any level."""
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGES[page], re.MULTILINE | re.DOTALL
    )
    assert found, f"{page} has no heading {heading!r}"
    return found[1]


def table_rows(text):
    """The cells of each row of the tables in a text, without the headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    separators = [place for place, line in enumerate(lines) if line.startswith(("|---", "| ---"))]
    headings = {place - 1 for place in separators}
    return [
        row for place, row in enumerate(rows) if place not in headings and place not in separators
    ]


# 2. Figures


@pytest.mark.parametrize("words, text", BLOCKS, ids=[words for words, _ in BLOCKS])
def test_figures_are_what_the_report_prints(words, text):
    files = [word for word in words.split() if "/" in word]
    assert files and all("results/" in file and (ROOT / file).exists() for file in files)
    done = call(sys.executable, "baseline/report.py", *words.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout == text


def test_figures_name_what_they_were_measured_on():
    begins = sum(text.count("<!-- report:") for text in PAGES.values())
    ends = sum(text.count("<!-- end -->") for text in PAGES.values())
    assert begins == ends == len(BLOCKS) > 0
    for words, text in BLOCKS:
        if "--table" in words:
            assert re.search(r"^\*.*commit [0-9a-f]{10}.*\*$", text, re.MULTILINE), words


def test_the_results_in_short_stand_in_the_tables_they_link():
    rows = table_rows(section("README.md", "Results"))
    assert len(rows) > 3
    for what, result, links in rows:
        page, _, anchor = re.search(r"\[table\]\(([^)]+)\)", links)[1].partition("#")
        file = re.search(r"\[files?\]\(([^)]+)\)", links)[1]
        heading = anchors(page)[anchor]
        tables = [text for words, text in BLOCK.findall(section(page, heading)) if file in words]
        assert tables, f"{what}: no table of {file} below {heading!r} in {page}"
        figures = re.findall(r"\d[\d,]*(?:\.\d+)?", result)
        assert figures, what
        for figure in figures:
            number = rf"(?<![\d.,]){re.escape(figure)}(?![\d,]|\.\d)"
            assert re.search(number, tables[0]), f"{what}: {figure} is not in the table of {file}"


# 3. Links, names, options


def anchors(page):
    """{anchor: heading} of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", PAGES[page], re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-"): h for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            name = os.path.relpath(target.resolve(), ROOT)
            assert anchor in anchors(name), link


@pytest.mark.parametrize("page", PAGES)
def test_names_of_files_lead_somewhere(page):
    text = re.sub(r"```diff\n.*?```", "", PAGES[page], flags=re.DOTALL)
    for name in re.findall(r"(?<![\w/])(?:baseline|DISTRIBUTED|\.ci)/[\w./-]*\w", text):
        assert (ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists(), name


def test_files_beside_the_scripts_are_named():
    text = section("README.md", "The files")
    for folder in FOLDERS:
        own = [
            file.name for end in ("py", "sh", "sbatch") for file in ROOT.glob(f"{folder}/*.{end}")
        ]
        assert own
        missing = [name for name in own if f"`{name}`" not in text]
        assert not missing, f"{folder}: not in The files: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_options_are_the_scripts_own(page):
    scripts = scripts_text()
    prose = re.sub(r"```diff\n.*?```", "", PAGES[page], flags=re.DOTALL)
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose)) - OTHERS_OPTIONS:
        option = option.replace("--no-", "--") if option in SWITCHED_OFF else option
        assert f'"{option}"' in scripts, option


def test_variables_are_the_scripts_own():
    scripts = scripts_text()
    rows = table_rows(section("baseline/README.md", "Another cluster"))
    names = {name for row in rows for name in re.findall(r"`([A-Z][A-Z_]+)(?:=\w+)?`", row[0])}
    assert len(names) > 15
    for name in names:
        assert re.search(rf"\b{name}\b", scripts) or name.startswith("SBATCH_"), name


def test_fields_and_files_of_a_run_are_what_train_writes():
    scripts = scripts_text()
    for file, what in table_rows(section("README.md", "How to read a run")):
        for name in re.findall(r"`([\w.-]+)`", file):
            written = name.replace("-before", "-$1").replace("-after", "-$1")  # job.sh's
            assert written in scripts, name
        for field in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", what):
            assert f'"{field}"' in scripts, field


def test_troubles_are_quoted_as_the_scripts_say_them():
    scripts = scripts_text()
    quoted = [
        words
        for row in table_rows(section("README.md", "Trouble"))
        for words in re.findall(r'"([^"]+)"', row[0])
    ]
    assert len(quoted) > 3
    for words in set(quoted) - OTHERS_WORDS:
        assert words in scripts, words


def test_each_section_of_train_is_told():
    text = (ROOT / "baseline/train.py").read_text(encoding="utf-8")
    titles = re.findall(r"^# (\d+\. .*)$", text, re.MULTILINE)
    told = [row[0] for row in table_rows(section("baseline/README.md", "What train.py does"))]
    assert len(told) == len(titles) > 5
    for words, title in zip(told, titles):
        assert title.startswith(words), f"{words!r} is {title!r}"


def test_each_strategy_is_told():
    text = (ROOT / "DISTRIBUTED/train.py").read_text(encoding="utf-8")
    strategies = set(re.findall(r'args\.strategy (?:==|!=) "(\w+)"', text)) | {"fsdp"}
    text = BLOCK.sub("", section("DISTRIBUTED/README.md", "Strategies"))
    told = {re.match(r"`(\w+)`", row[0])[1] for row in table_rows(text)}
    assert told == strategies


# 4. The repository


def test_the_top_holds_what_it_should():
    listed = call("git", "ls-files").stdout
    if not listed:
        pytest.skip("no git checkout: what belongs to the project is not known")
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert top == {"baseline", "DISTRIBUTED", "README.md", "requirements.txt", ".gitignore", ".ci"}


@pytest.mark.parametrize("page", PAGES)
def test_no_page_names_this_machine(page):
    assert not re.search(r"(?<![\w.])/(root|home|work|tmp)/|localhost:(?!6006)", PAGES[page])


def test_tags_name_commits():
    told = dict(re.findall(r"git tag -f (\w+) .*--grep '(.*?)'", README))
    assert told.keys() == {"baseline", "DISTRIBUTED"}
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: no commits to look for")
    for name, subject in told.items():
        assert README.count(subject) == 2, name
        find = ["git", "log", "-1", "--format=%s", "--fixed-strings", "--grep", subject]
        found = call(*find).stdout.strip()
        assert found == subject, f"{name}: no commit has the subject {subject!r}"


# 5. Commands


def test_commands_are_bash():
    assert not call("bash", "-n", input="\n".join(fenced_commands())).stderr


@pytest.mark.parametrize("command", sbatch_commands())
def test_cluster_commands_name_a_script_and_options_it_takes(command, parse):
    words = shlex.split(command, comments=True)
    words = words[words.index("sbatch") :]
    places = [place for place, word in enumerate(words) if word.endswith(".sbatch")]
    options = words[1 : places[0]]
    script = ROOT / words[places[0]]
    assert script.exists()
    assert call("bash", "-n", script).returncode == 0
    parse(script.parent.name, words[places[0] + 1 :])
    given = {word.split("=")[0] for word in options if word.startswith("-")}
    # Of a table of centres: their own options too.
    assert given <= SBATCH_OPTIONS | {"-C", "-q", "--hint"}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The project in a folder with a space in its name, and a way to type a command there."""
    root = tmp_path_factory.mktemp("a stranger") / "my folder"
    for name in (*FOLDERS, ".ci"):
        leave_out = shutil.ignore_patterns("__pycache__", "results", ".cache")
        shutil.copytree(ROOT / name, root / name, ignore=leave_out)
    for name in ("README.md", "requirements.txt"):
        shutil.copy(ROOT / name, root)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PYTEST"))}
    environment["VENV"] = sys.prefix
    environment["SQUAD_CACHE"] = str(root / "my cache")
    environment["OMP_NUM_THREADS"] = "1"
    environment |= {"LADDER_STEPS": "4", "SCALING_REPEATS": "1", "SCALING_RULES": "strong"}

    def type_in(command, seconds=300):
        done = call("bash", "-c", command, env=environment, timeout=seconds, cwd=root)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    return type_in


def try_command(command, number, stranger, parse):
    """Types a command as a stranger would, a long one shortened; returns whether it did."""
    words = shlex.split(command)
    python = shlex.quote(sys.executable)
    if words[0] in ("sbatch", "git") or "sbatch" in words:
        return False  # other tests'
    if words[0] == "bash" and "--sample" in words:
        short = ["--limit", "40", "--max-steps", "4", "--no-profile", "--output", f"runs/{number}"]
        said = stranger(shlex.join([*words, *short]))
        assert "--- results" in said and "exact match, F1" in said
    elif words[0] == "bash" and "--model" in words:  # it would need the hub
        parse("baseline", ["--prepare", *words[2:]])
    elif words[0] == "bash":  # prepare.sh, without the hub
        assert "next: " in stranger(f"{command} --sample")
    elif "report.py" in command:
        said = stranger(command.replace("python", python, 1))
        assert said.startswith("# Report") and "## Speed-up" in said
    elif words[0] == "python":
        said = stranger(f"{python} {words[1]} --help")
        assert all(word in said for word in words[2:] if word.startswith("--")), command
    elif words[0] == "tensorboard":
        said = stranger("source baseline/env.sh && tensorboard --version_tb")
        assert re.match(r"\d+\.\d+", said.strip())
    elif command == "source baseline/env.sh":
        stranger(f"{command} && python -c 'import torch'")
    elif "pytest" in words:
        no_tests = 5  # pytest's exit code where all are deselected
        collect = "--collect-only -q baseline/tests/test_answers.py"
        said = stranger(f"{command} {collect} || test $? = {no_tests}")
        assert "test_answers.py" in said or "deselected" in said
    elif words[0] == "diff":
        assert "DIST:" in stranger(f"{command} || test $? = 1")
    else:
        pytest.fail(f"no test knows how to try: {command}")
    return True


def test_a_stranger_types_the_commands(stranger, parse):
    """In the pages' order: the root's first."""
    tried = 0
    for number, command in enumerate(fenced_commands()):
        tried += try_command(command, number, stranger, parse)
    assert tried > 8


@pytest.mark.slow
@pytest.mark.parametrize("script", ["baseline/ladder.sbatch", "DISTRIBUTED/scaling.sbatch"])
def test_a_stranger_types_the_long_commands(stranger, script):
    said = stranger(f"bash {script} --sample --limit 60 --epochs 1", 1500)
    assert said.count("--- results") >= 4 and "# Report" in said


# 6. Ten lines an engineer changes


def changed_script(folder, diff, where):
    """A copy of a train.py with a change, applied as the page says, beside the sample."""
    (where / folder).mkdir(parents=True)
    shutil.copy(ROOT / folder / "train.py", where / folder)
    (where / "baseline").mkdir(exist_ok=True)
    (where / "baseline/sample").symlink_to(ROOT / "baseline/sample")
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(where.parent)}
    apply = ["git", "apply", f"--directory={folder}", "-"]
    done = call(*apply, input=diff, cwd=where, env=environment)
    assert done.returncode == 0, done.stderr
    script = where / folder / "train.py"
    assert script.read_text() != (ROOT / folder / "train.py").read_text()
    return script


@pytest.fixture(params=FOLDERS)
def run_changed(request, start, tmp_path):
    """run_changed(title, *words, code=0, patch=""): a few steps of the sample by a changed twin."""

    def run(title, *words, code=0, patch=""):
        where = tmp_path / "changed"
        script = where / request.param / "train.py"
        if not script.exists():
            script = changed_script(request.param, CHANGES[title], where)
        output = tmp_path / "run"
        usual = ["--sample", "--limit", 40, "--max-steps", 6, "--log-every", 2, "--no-profile"]
        usual += ["--device", "cpu", "--output", output]
        start(*usual, *words, script=script, patch=patch).end(code)
        return output

    return run


def test_there_are_three_changes_of_about_ten_lines():
    assert len(CHANGES) == 3
    for diff in CHANGES.values():
        assert len(re.findall(r"^[+-](?![+-])", diff, re.MULTILINE)) <= 22


def test_change_limit_on_answers(run_changed):
    output = run_changed("A limit on the answers' length as an option.", "--max-answer-tokens", 1)
    answers = json.loads((output / "predictions.json").read_text()).values()
    assert len(answers) == 40
    assert not any(" " in answer for answer in answers)


def test_change_metric(run_changed):
    from safetensors.torch import load_file
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = run_changed("A metric of your own in each log interval.")
    intervals = json.loads((output / "timings.json").read_text())["intervals"]
    weights = load_file(output / "model/model.safetensors").values()
    norm = math.sqrt(sum(float(weight.double().square().sum()) for weight in weights))
    assert intervals[-1]["weight_norm"] == pytest.approx(norm, rel=1e-4)
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("training/weight_norm")) == len(intervals)


STOP_AFTER_THREE_STEPS = """
own_step = training_step
def training_step(args, step, *rest):
    own_step(args, step, *rest)
    if step == 2:
        note_signal(signal.SIGUSR1, None)
"""


def test_change_optimiser(run_changed):
    import torch

    title = "Another optimiser for the matrices, with a rate of its own."
    output = run_changed(title, code=75, patch=STOP_AFTER_THREE_STEPS)
    saved = torch.load(output / "checkpoint.pt", weights_only=True)
    for name, weight in saved["model"].items():
        kept = saved["optimizer"]["state"][name]
        assert ("momentum_buffer" in kept) == (weight.ndim >= 2), name
        assert ("exp_avg" in kept) == (weight.ndim < 2), name
    rates = {group["peak_lr"] for group in saved["optimizer"]["param_groups"]}
    assert len(rates) == 2
    run_changed(title)
    results = json.loads((output / "results.json").read_text())
    assert results["resumed_from_steps"] == [3]


# 7. By hand


def refresh():
    """Prints the pages' tables and charts anew, into them."""

    def again(found):
        done = call(sys.executable, "baseline/report.py", *found[1].split())
        if done.returncode:
            sys.exit(done.stderr)
        return f"<!-- report: {found[1]} -->\n{done.stdout}<!-- end -->"

    for page, text in PAGES.items():
        (ROOT / page).write_text(BLOCK.sub(again, text), encoding="utf-8")


if __name__ == "__main__":
    refresh()
