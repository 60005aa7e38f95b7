"""The usual ways, written plainly, which train.py has to equal: the tokenizer's call and the labels
of transformers' course, the n-best decoding of its examples' utils_qa.py, and the official scorer
of SQuAD v1.1."""

import collections
import re
import string

import numpy as np


def usual_features(tokenizer, examples, max_length, stride):
    """Returns one dict per window, as the course has it, but not padded."""
    encoding = tokenizer(
        [example["question"].lstrip() for example in examples],
        [example["context"] for example in examples],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    windows = []
    for i, sample in enumerate(encoding["overflow_to_sample_mapping"]):
        offsets = encoding["offset_mapping"][i]
        sequence_ids = encoding.sequence_ids(i)
        context_start = sequence_ids.index(1)
        context_end = len(sequence_ids) - 1 - sequence_ids[::-1].index(1)
        answers = examples[sample]["answers"]
        start_char = answers["answer_start"][0]
        end_char = start_char + len(answers["text"][0])
        if offsets[context_start][0] > start_char or offsets[context_end][1] < end_char:
            labels = (0, 0)
        else:
            start = context_start
            while start <= context_end and offsets[start][0] <= start_char:
                start += 1
            end = context_end
            while end >= context_start and offsets[end][1] >= end_char:
                end -= 1
            labels = (start - 1, end + 1)
        window = {
            "example": sample,
            "input_ids": encoding["input_ids"][i],
            "context": (context_start, context_end + 1),
            "offsets": [o if s == 1 else None for o, s in zip(offsets, sequence_ids)],
            "labels": labels,
            "token_types": encoding["token_type_ids"][i],
        }
        windows.append(window)
    return windows


def usual_candidates(windows, logits, sample):
    """Returns a question's possible answers, as (score, (first character, end)), best first."""
    candidates = []
    for window, scores in zip(windows, logits):
        if window["example"] != sample:
            continue
        start_logits, end_logits = np.ascontiguousarray(scores.T)
        offset_mapping = window["offsets"]
        start_indexes = np.argsort(start_logits)[-1:-21:-1].tolist()
        end_indexes = np.argsort(end_logits)[-1:-21:-1].tolist()
        for start in start_indexes:
            for end in end_indexes:
                if offset_mapping[start] is None or offset_mapping[end] is None:
                    continue
                if end < start or end - start + 1 > 30:
                    continue
                characters = (offset_mapping[start][0], offset_mapping[end][1])
                candidates.append((start_logits[start] + end_logits[end], characters))
    return sorted(candidates, key=lambda candidate: candidate[0], reverse=True)


def usual_answers(examples, windows, logits):
    """Returns postprocess_qa_predictions' answers; logits: one [tokens, 2] per window."""
    answers = {}
    for sample, example in enumerate(examples):
        candidates = usual_candidates(windows, logits, sample)[:20]
        texts = [example["context"][start:end] for _, (start, end) in candidates]
        if len(texts) == 0 or (len(texts) == 1 and texts[0] == ""):
            texts.insert(0, "empty")
        answers[example["id"]] = texts[0]
    return answers


def normalize_answer(s):
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())


def f1_score(prediction, ground_truth):
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    common = collections.Counter(prediction_tokens) & collections.Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = num_same / len(prediction_tokens)
    recall = num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def official_scores(predictions, gold):
    """predictions: {question id: answer}; gold: {question id: [answers]}."""
    exact = f1 = 0
    for name, truths in gold.items():
        answer = predictions[name]
        exact += max(normalize_answer(answer) == normalize_answer(truth) for truth in truths)
        f1 += max(f1_score(answer, truth) for truth in truths)
    return {"exact_match": 100 * exact / len(gold), "f1": 100 * f1 / len(gold)}
