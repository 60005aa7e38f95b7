"""The hub's model and data, from caches that are laid out here as the libraries keep them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import transformers
from conftest import TRAIN
from small import make_config, make_tokenizer, parse


def offline(home):
    """Returns an environment without the internet, whose caches are all in this folder."""
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith(("HF_", "SQUAD_CACHE", "SLURM")):
            environment[name] = value
    return environment | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "SQUAD_CACHE": str(home / "features"),
    }


def run(home, *words):
    """Runs train.py in a process of its own, since the libraries read HF_HOME when imported."""
    return subprocess.run(
        [sys.executable, TRAIN, "--device", "cpu", *map(str, words)],
        env=offline(home),
        capture_output=True,
        text=True,
        timeout=300,
    )


def lay_data(home, examples):
    """Lays out rajpurkar/squad as the datasets library keeps it; both splits have the examples."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    text = datasets.Value("string")
    answers = datasets.Sequence({"text": text, "answer_start": datasets.Value("int32")})
    names = ("id", "title", "context", "question")
    features = datasets.Features({name: text for name in names} | {"answers": answers})
    folder = home / "datasets/rajpurkar___squad/plain_text/0.0.0" / ("7" * 40)
    folder.mkdir(parents=True)
    splits = datasets.SplitDict(dataset_name="squad")
    for split in ("train", "validation"):
        path = str(folder / f"squad-{split}.arrow")
        with ArrowWriter(features=features, path=path) as writer:
            for example in examples:
                writer.write({"title": "", **example})
            count, size = writer.finalize()
        splits.add(datasets.SplitInfo(split, size, count))
    info = datasets.DatasetInfo(features=features, splits=splits, config_name="plain_text")
    info.builder_name = "parquet"
    info.dataset_name = "squad"
    info.version = "0.0.0"
    info.write_to_directory(str(folder))


def lay_model(home):
    """Lays out a small google-bert/bert-base-uncased as the hub's cache keeps it.

    Returns its folder and its tokenizer."""
    tokenizer = make_tokenizer("bert")
    config = make_config("bert", longest=512, words=len(tokenizer))
    folder = home / "hub/models--google-bert--bert-base-uncased"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("8" * 40)
    snapshot = folder / "snapshots" / ("8" * 40)
    # As on the hub: a language model, whose question-answering head will be new.
    transformers.BertForMaskedLM(config).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    return snapshot, tokenizer


def test_the_hubs_model_and_data_come_from_the_cache(train, tmp_path):
    """What prepare.sh has fetched is used, without --model and files, and is as a file would be."""
    examples = train.read_squad(train.SAMPLE / "questions.json", 80)
    lay_data(tmp_path, examples)
    _, tokenizer = lay_model(tmp_path)
    words = ["--no-profile", "--limit", 60, "--max-steps", 2, "--output", tmp_path / "run"]
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no noise of the libraries"
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["steps"] == 2
    assert results["arguments"]["train_file"] is None
    predictions = json.loads((tmp_path / "run/predictions.json").read_text())
    assert list(predictions) == [example["id"] for example in examples[:60]]
    args = parse(train, "--max-length", 384, "--stride", 128)
    features = train.build_features(examples[:60], tokenizer, args, "a file")
    assert results["train_features"] == len(features["begin"]) - 1
    files = list((tmp_path / "features").glob("features-*.npz"))
    assert len(files) == 2, "of training and validation"
    for file in files:
        with np.load(file) as kept:
            for name in features.keys() & kept.keys():
                np.testing.assert_array_equal(kept[name], features[name], name)


@pytest.mark.parametrize("missing", ["google-bert/bert-base-uncased", "rajpurkar/squad"])
def test_an_empty_cache_offline_is_one_clear_line(tmp_path, missing):
    words = ["--limit", 20, "--output", tmp_path / "run"]
    if missing == "rajpurkar/squad":
        model, _ = lay_model(tmp_path / "other")
        words += ["--model", model]
    done = run(tmp_path / "home", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "prepare.sh" in done.stderr
    assert missing in done.stderr
    assert not (tmp_path / "run/results.json").exists()
