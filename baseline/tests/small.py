"""Small features, models, tokenizers and texts that several tests share. Nothing is fetched."""

import random
from types import SimpleNamespace

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

# The vocabulary of the tokens drawn here, and --max-length.
WORDS = 60
LONGEST = 64
BATCHINGS = ["padded", "dynamic", "bucketed", "packed"]
# Packed with the attention of a GPU, which runs on a CPU too, though slowly.
PACKED_ON_GPU = "packed as on a GPU"
FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert"]
# Their position embeddings begin with the padding's, and they have one token type.
ROBERTA_FAMILIES = ["roberta", "xlm-roberta", "camembert"]


# Arguments, features, models


def parse(train, *words, batching="packed"):
    """Returns train.py's arguments for a small training on a CPU; the words come last, and win."""
    usual = ["--sample", "--device", "cpu", "--no-profile", "--max-length", LONGEST, "--stride", 8]
    usual += ["--batch-size", 16, "--epochs", 50]
    usual += ["--batching", "packed" if batching == PACKED_ON_GPU else batching]
    args = train.parse_arguments([str(word) for word in [*usual, *words]])
    if batching == PACKED_ON_GPU:
        args.attention = "packed_jagged"
    return args


def draw_lengths(count, seed=0, least=4):
    """Draws lengths that spread as SQuAD's do: many short, few long, some cut at the longest."""
    lengths = np.random.default_rng(seed).lognormal(np.log(LONGEST * 0.42), 0.4, count)
    return np.clip(lengths.astype(int), least, LONGEST)


def make_features(lengths, seed=0):
    """Returns features of these lengths: random tokens, questions and labels, none of them padding.

    One in five has its answer on the classification token."""
    draw = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    first_of_context = draw.integers(2, lengths - 1)
    has_answer = draw.random(len(lengths)) > 0.2
    start = np.where(has_answer, draw.integers(first_of_context, lengths - 1), 0)
    end = np.where(has_answer, draw.integers(np.maximum(start, 1), lengths - 1), 0)
    types = []
    for length, first in zip(lengths, first_of_context):
        types.append(np.arange(length) >= first)
    return {
        "input_ids": draw.integers(2, WORDS, lengths.sum()).astype(np.int32),
        "token_types": np.concatenate(types).astype(np.int8),
        "begin": np.append(0, np.cumsum(lengths)),
        "lengths": lengths,
        "start": start.astype(np.int32),
        "end": end.astype(np.int32),
    }


def add_table(train, features, model, device="cpu"):
    """Gives features the table on the device that batches are cut from."""
    tokenizer = SimpleNamespace(pad_token_id=model.config.pad_token_id)
    features["table"] = train.feature_table(features, tokenizer, model, torch.device(device))


def make_config(family, longest=LONGEST, words=WORDS, attention_dropout=0.0, hidden_dropout=0.0):
    if family == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=words,
            max_position_embeddings=longest,
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=48,
            attention_dropout=attention_dropout,
            dropout=hidden_dropout,
            qa_dropout=0.0,
            initializer_range=0.3,
        )
    sizes = {
        "vocab_size": words,
        "max_position_embeddings": longest,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "attention_probs_dropout_prob": attention_dropout,
        "hidden_dropout_prob": hidden_dropout,
        "initializer_range": 0.3,
    }
    if family in ROBERTA_FAMILIES:
        sizes |= {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": longest + 2}
    if family in ("electra", "albert"):
        sizes |= {"embedding_size": 16}
    return transformers.CONFIG_MAPPING[family](**sizes)


def make_model(args, family="bert", **sizes):
    """Returns a small model in this batching's attention; a family always has the same weights."""
    config = make_config(family, args.max_length, **sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForQuestionAnswering.from_config(
        config, attn_implementation=args.attention
    )


def make_batch(train, args, model, features, chosen, unused=0):
    """Returns the batch of these features as the arguments have it, packed or padded; a packed row
    has `unused` more tokens than it needs."""
    add_table(train, features, model)
    table = features["table"]
    lengths = features["lengths"][chosen]
    width = int(lengths.max())
    chosen = torch.tensor(chosen)
    if args.batching != "packed":
        return train.make_batch(table, chosen, width)
    cu_seqlens = train.pack_rows(lengths[None, None, :])[0, 0]
    if unused:
        more = cu_seqlens[-1] + np.arange(0, unused, width)[1:]
        cu_seqlens = np.concatenate([cu_seqlens, more, [cu_seqlens[-1] + unused]])
    row_tokens = int(cu_seqlens[-1])
    cu_seqlens = torch.tensor(cu_seqlens.astype(np.int32))
    return train.make_batch(table, chosen, width, row_tokens, cu_seqlens)


def run_training(train, args, output, features=None, model=None, optimizer=None, device="cpu"):
    """Trains on these features, by default on drawn ones, and returns the training's state."""
    if features is None:
        features = make_features(draw_lengths(100))
    if model is None:
        model = make_model(args)
    device = torch.device(device)
    model.to(device)
    if args.compile:
        train.compile_layers(model)
    add_table(train, features, model, device)
    plan = train.plan_training(features["lengths"], args)
    train.plan_to_device(plan, device)
    if optimizer is None:
        optimizer = train.make_optimizer(model, args)
    state = train.new_state()
    output.mkdir(exist_ok=True)
    with train.open_writer(output, state) as writer:
        train.train(
            args,
            output,
            train.SpanModel(model, args),
            optimizer,
            features,
            plan,
            train.Clock(device),
            state,
            writer,
            save=lambda: None,
            evaluate=lambda: {},
        )
    return state


# Texts

AWKWARD = [
    # ordinary, and long enough for several windows
    "The tower of Hercules is a Roman lighthouse near A Coruña; it has stood since the year 100. "
    * 6,
    # letters that lower-casing and stripping accents make longer or shorter
    "Élan, naïve, Ångström, İstanbul, STRASSE, Straße, ǅ, e\u0301te\u0301, o\u0308, Ⅻ and ½ again.",
    "The ﬁrst ﬂuﬀy oﬃce: ﬃ, ﬄ, ﬅ; \u2126 ohm, \u212b, \u00b5m, x\u00b2, \uff21\uff22\uff23.",
    "東京は日本の首都です。北京は中国的首都。한국어 각각 텍스트도 있다, 한글.",
    "القاهرة هِيَ عَاصِمَة مِصر، וְעִבְרִית עִם נִקּוּד, हिन्दी में क्षेत्र, ภาษาไทย.",
    # no-break and zero-width spaces, control characters, a combining mark alone, emoji
    "\u00a0 tabs\tand\u200bzero\u200dwidth \ufeffmarks\u0000\ufffd \u0301 lonely, "
    "👩\u200d🔬 work 🇪🇸.  ",
    "!!! ... --- (a) [the] {an} «quoted» “so” don't U.S.A. 1,234.5 % $7 €8 a/b c_d #tag @x",
    "one",
    # a word too long for WordPiece: [UNK] over all of it
    "before " + "x" * 120 + " after " + "donaudampfschiffahrt" * 3 + " end",
    # what tokenizers use for marks of their own
    "Between [SEP] and [CLS], <s>, </s> and <mask>: [MASK] is [UNK], or <unk>; ▁ and Ġ and ##s.",
]
QUESTIONS = ["What is it?", "   Which?", "Ⅻ ﬁve é?", "\tWhy\u00a0so", ""]


def make_example(name, question, context, start, end):
    """Returns a question in the form of the datasets library, answered by context[start:end]."""
    answers = {"text": [context[start:end]], "answer_start": [start]}
    return {"id": name, "question": question, "context": context, "answers": answers}


def awkward_examples(texts=AWKWARD, count=120, seed=0, questions=QUESTIONS):
    """Returns questions whose answers lie anywhere: at the edges, across words, within a token."""
    draw = random.Random(seed)
    examples = []
    for number in range(count):
        context = texts[number % len(texts)]
        turn = number // len(texts)
        if turn == 0:
            start, end = 0, len(context)
        elif turn == 1:
            start, end = 0, 1
        elif turn == 2:
            start, end = len(context) - 1, len(context)
        else:
            start = draw.randrange(len(context))
            end = min(start + draw.randint(1, draw.choice([1, 3, 40])), len(context))
        question = draw.choice(questions)
        examples.append(make_example(f"q{number}", question, context, start, end))
    return examples


# Tokenizers


def make_tokenizer(family):
    """Returns a tokenizer such as the family's, with few words, made here."""
    makers = {
        "bert": make_wordpiece,
        "roberta": make_byte_level_bpe,
        "xlm-roberta": make_xlm_roberta_unigram,
        "camembert": make_camembert_unigram,
    }
    return makers[family]()


def make_wordpiece():
    """BERT's: it knows every character of the awkward texts."""
    bare = transformers.BertTokenizerFast(vocab={"[UNK]": 0}).backend_tokenizer
    texts = [bare.normalizer.normalize_str(text) for text in AWKWARD + QUESTIONS]
    characters = sorted(set("".join(texts)) - {" "})
    words = ["the", "tower", "year", "##ing", "##gst", "##er", "of", "is"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    vocabulary += [f"##{character}" for character in characters]
    vocabulary += words
    numbers = {word: number for number, word in enumerate(dict.fromkeys(vocabulary))}
    return transformers.BertTokenizerFast(vocab=numbers)


def as_roberta(tokenizer, trim_offsets):
    """Returns transformers' tokenizer with RoBERTa's marks: <s> A </s></s> B </s>, and no types."""
    separator = ("</s>", tokenizer.token_to_id("</s>"))
    first = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.RobertaProcessing(
        separator, first, trim_offsets=trim_offsets, add_prefix_space=False
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_byte_level_bpe():
    """RoBERTa's: pieces of bytes, so that one character may be several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(AWKWARD[:3], trainer)
    return as_roberta(tokenizer, trim_offsets=True)


def make_unigram(marks):
    """Pieces with scores, as SentencePiece has them; half of the awkward characters are unknown."""
    characters = sorted(set("".join(AWKWARD[::2])) - {" "})
    words = ["▁the", "▁tower", "▁of", "▁Her", "cules", "▁light", "house", "ing", "er"]
    pieces = [(mark, 0.0) for mark in marks]
    pieces += [("▁", -5.0)]
    pieces += [(word, -6.0) for word in words]
    pieces += [(character, -10.0) for character in characters if character != "▁"]
    return tokenizers.Tokenizer(models.Unigram(pieces, unk_id=marks.index("<unk>")))


def make_xlm_roberta_unigram():
    """XLM-RoBERTa's: it normalises as SentencePiece does, and each text begins with a space."""
    tokenizer = make_unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    spaces = normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return as_roberta(tokenizer, trim_offsets=False)


def make_camembert_unigram():
    """CamemBERT's: it splits at white space first, and its marks have other numbers."""
    marks = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<s>", "</s>", "<mask>"]
    tokenizer = make_unigram(marks)
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    return as_roberta(tokenizer, trim_offsets=True)
