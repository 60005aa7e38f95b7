"""The usual preparation and the usual decoding, as transformers' question-answering examples write
them (run_qa.py, utils_qa.py), for cost.py to measure against."""

import collections

import numpy as np

N_BEST = 20
MAX_ANSWER_TOKENS = 30


def prepare_train_features(examples, tokenizer, max_length, stride, padding):
    """The function for Dataset.map: windows, and where the answer lies in each.

    padding: "max_length", as the examples have it by default, or False."""
    questions = [question.lstrip() for question in examples["question"]]
    tokenized = tokenizer(
        questions,
        examples["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=padding,
    )
    sample_mapping = tokenized.pop("overflow_to_sample_mapping")
    offset_mapping = tokenized.pop("offset_mapping")
    tokenized["start_positions"] = []
    tokenized["end_positions"] = []
    for window, offsets in enumerate(offset_mapping):
        input_ids = tokenized["input_ids"][window]
        cls_index = input_ids.index(tokenizer.cls_token_id)
        sequence_ids = tokenized.sequence_ids(window)
        answers = examples["answers"][sample_mapping[window]]
        positions = find_positions(answers, offsets, sequence_ids)
        start, end = positions or (cls_index, cls_index)
        tokenized["start_positions"].append(start)
        tokenized["end_positions"].append(end)
    return tokenized


def find_positions(answers, offsets, sequence_ids):
    """Returns the answer's first and last token, or None where the window lacks part of it."""
    start_char = answers["answer_start"][0]
    end_char = start_char + len(answers["text"][0])
    token_start_index = 0
    while sequence_ids[token_start_index] != 1:
        token_start_index += 1
    token_end_index = len(sequence_ids) - 1
    while sequence_ids[token_end_index] != 1:
        token_end_index -= 1
    if offsets[token_start_index][0] > start_char or offsets[token_end_index][1] < end_char:
        return None
    while token_start_index < len(offsets) and offsets[token_start_index][0] <= start_char:
        token_start_index += 1
    while offsets[token_end_index][1] >= end_char:
        token_end_index -= 1
    return token_start_index - 1, token_end_index + 1


def postprocess_qa_predictions(examples, features, start_logits, end_logits):
    """The n-best loop: returns {question id: answer}.

    examples: id, context; features: example_id, offset_mapping, with None outside the context;
    start_logits, end_logits: one array per feature."""
    features_per_example = collections.defaultdict(list)
    for index, feature in enumerate(features):
        features_per_example[feature["example_id"]].append(index)
    predictions = {}
    for example in examples:
        candidates = []
        for index in features_per_example[example["id"]]:
            offset_mapping = features[index]["offset_mapping"]
            candidates += list_candidates(start_logits[index], end_logits[index], offset_mapping)
        best = sorted(candidates, key=lambda one: one["score"], reverse=True)[:N_BEST]
        for candidate in best:
            start_char, end_char = candidate["offsets"]
            candidate["text"] = example["context"][start_char:end_char]
        if len(best) == 0 or (len(best) == 1 and best[0]["text"] == ""):
            best.insert(0, {"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "score": 0.0})
        scores = np.array([candidate.pop("score") for candidate in best])
        exponentials = np.exp(scores - np.max(scores))
        probabilities = exponentials / exponentials.sum()
        for probability, candidate in zip(probabilities, best):
            candidate["probability"] = probability
        predictions[example["id"]] = best[0]["text"]
    return predictions


def list_candidates(start_logits, end_logits, offset_mapping):
    """Returns a window's possible answers, of its best first and its best last tokens."""
    candidates = []
    start_indexes = np.argsort(start_logits)[-1 : -N_BEST - 1 : -1].tolist()
    end_indexes = np.argsort(end_logits)[-1 : -N_BEST - 1 : -1].tolist()
    for start_index in start_indexes:
        for end_index in end_indexes:
            if (
                start_index >= len(offset_mapping)
                or end_index >= len(offset_mapping)
                or offset_mapping[start_index] is None
                or offset_mapping[end_index] is None
            ):
                continue
            if end_index < start_index or end_index - start_index + 1 > MAX_ANSWER_TOKENS:
                continue
            candidates.append(
                {
                    "offsets": (offset_mapping[start_index][0], offset_mapping[end_index][1]),
                    "score": start_logits[start_index] + end_logits[end_index],
                    "start_logit": start_logits[start_index],
                    "end_logit": end_logits[end_index],
                }
            )
    return candidates
