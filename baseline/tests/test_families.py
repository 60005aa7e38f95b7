"""Each of BERT's family trains from a folder of its own tokenizer and weights to its answers."""

import json

import pytest
import torch
import transformers
from small import FAMILIES, ROBERTA_FAMILIES, make_config, make_tokenizer


@pytest.fixture
def folder(request, tmp_path):
    """The folder of a small language model, as hubs have them: the head for answers is missing."""
    family = request.param
    tokenizer = make_tokenizer(family if family in ROBERTA_FAMILIES else "bert")
    config = make_config(family, longest=96, words=len(tokenizer))
    torch.manual_seed(0)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_a_family_trains_from_its_folder(train, start, tmp_path, folder):
    questions = train.SAMPLE / "questions.json"
    words = ["--model", folder, "--train-file", questions, "--validation-file", questions]
    words += ["--limit", 24, "--max-length", 96, "--stride", 24, "--max-steps", 4]
    words += ["--device", "cpu", "--no-profile"]
    answers = {}
    for batching in ("packed", "bucketed"):
        output = tmp_path / batching
        start(*words, "--batching", batching, "--output", output).end()
        answers[batching] = json.loads((output / "predictions.json").read_text())
        timings = json.loads((output / "timings.json").read_text())
        assert len(timings["intervals"]) == 4
    examples = {example["id"]: example for example in train.read_squad(questions, 24)}
    assert list(answers["packed"]) == list(examples)
    for name, answer in answers["packed"].items():
        assert answer in examples[name]["context"]
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "packed/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "packed/model")
    given = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__.lower().startswith(model.config.model_type.replace("-", ""))
    for text in ("The tower of Hercules", "Élan, naïve; <s> [SEP] «quoted»"):
        assert tokenizer(text, text)["input_ids"] == given(text, text)["input_ids"]
