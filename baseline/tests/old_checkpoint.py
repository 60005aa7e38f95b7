"""A checkpoint that an earlier commit wrote, so that today's train.py can be asked to go on from it.

    python baseline/tests/old_checkpoint.py    in a working tree of that commit, with this file in it

writes old_checkpoint/: checkpoint.pt, after STOP of STEPS steps, and losses.json, of all steps of
the run that was not stopped. What is there is commit f275267's, from torch 2.13 and transformers
5.23. test_checkpoint.py goes on from it.
"""

import json
import shutil
import string
import tempfile
from pathlib import Path

import torch
import transformers

FOLDER = Path(__file__).parent / "old_checkpoint"
STOP = 7
STEPS = 15
# Nothing is left to a default, which may be another one day.
WORDS = ["--max-length", 48, "--stride", 8, "--epochs", 3, "--batch-size", 4, "--accumulate", 2]
WORDS += ["--learning-rate", 0.01, "--warmup", 0.1, "--weight-decay", 0.01, "--dropout", 0]
WORDS += ["--seed", 5, "--batching", "packed", "--precision", "fp32", "--device", "cpu"]
WORDS += ["--log-every", 1, "--save-every", 100, "--evaluate-every", "end", "--no-profile"]


def make_inputs(folder):
    """Makes the model and the questions of the run; returns the options that name them."""
    letters = string.ascii_lowercase + string.digits
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", ".", *letters]
    words += [f"##{letter}" for letter in letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder / "model")
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=48,
    )
    torch.manual_seed(0)
    transformers.BertForQuestionAnswering(config).save_pretrained(folder / "model")
    paragraphs = []
    for number in range(14):
        room = f"room {number * 37 % 100}"
        context = f"node n{number} is in {room}." + " it runs." * (number % 5)
        answer = {"text": room, "answer_start": context.index(room)}
        question = {"id": str(number), "question": f"where is n{number}?", "answers": [answer]}
        paragraphs.append({"context": context, "qas": [question]})
    questions = folder / "questions.json"
    questions.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    files = ["--train-file", questions, "--validation-file", questions]
    return ["--model", folder / "model", *files]


def losses(output):
    """Each step's loss of a run that has finished."""
    intervals = json.loads((output / "timings.json").read_text())["intervals"]
    return [interval["loss"] for interval in intervals]


def write():
    """Writes the folder with the train.py beside the tests."""
    from nursery import Nursery, in_step, send

    script = Path(__file__).parents[1] / "train.py"
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, Nursery(SQUAD_CACHE=f"{name}/cache") as nursery:
        folder = Path(name)
        words = [*make_inputs(folder), *WORDS]
        whole = [*words, "--output", folder / "whole"]
        nursery.start(script, whole, folder / "log").end()
        found = losses(folder / "whole")
        assert len(found) == STEPS
        (FOLDER / "losses.json").write_text(json.dumps(found, indent=1) + "\n")
        stopped = [*words, "--output", folder / "stopped"]
        patch = in_step(STOP, send("SIGTERM"))
        nursery.start(script, stopped, folder / "log-stopped", patch).end(75)
        shutil.copy(folder / "stopped/checkpoint.pt", FOLDER)


if __name__ == "__main__":
    write()
