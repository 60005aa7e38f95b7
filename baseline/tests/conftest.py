"""What the tests of train.py share: runs that start in a tenth of a second, and real data."""

import signal
from pathlib import Path

import pytest
import transformers
from nursery import Nursery, load_script

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
SHARED = TRAIN.parents[2] / "shared"


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The folder of the features cache that all runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def nursery(cache):
    with Nursery(SQUAD_CACHE=str(cache)) as nursery:
        yield nursery


@pytest.fixture
def start(nursery, tmp_path):
    """start(*words): starts train.py with these words and returns its Life, which may be patched
    and have an environment of its own; see nursery.py."""
    lives = []

    def start_one(*words, script=TRAIN, patch="", **environment):
        log = tmp_path / f"life-{len(lives)}.log"
        lives.append(nursery.start(script, words, log, patch, **environment))
        return lives[-1]

    yield start_one
    for life in lives:
        # Its test failed before its end.
        life.kill(signal.SIGKILL)


@pytest.fixture(scope="session")
def train():
    """train.py as a module."""
    return load_script(TRAIN)


def shared_folder(name):
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"needs ../shared/{name} beside the project, which is not there")
    return path


@pytest.fixture(scope="session")
def squad():
    """The folder of SQuAD v1.1 questions: train.json and dev.json."""
    return shared_folder("squad")


@pytest.fixture(scope="session")
def minilm():
    """The folder of a small pretrained BERT."""
    return shared_folder("minilm")


@pytest.fixture
def own_cache(train, tmp_path, monkeypatch):
    """An empty features cache for this test alone, in the module train."""
    monkeypatch.setattr(train, "CACHE", tmp_path / "features")
    return tmp_path / "features"


@pytest.fixture(scope="session")
def tiny_model(train, tmp_path_factory):
    """A folder with a BERT of two small layers, random weights and the sample's tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = transformers.AutoTokenizer.from_pretrained(train.SAMPLE)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.BertForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
