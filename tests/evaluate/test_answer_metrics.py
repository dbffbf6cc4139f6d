"""Metrics of answers: results that are published or computed by hand, and odd texts."""

from dataclasses import replace

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from research.core.errors import UserError
from research.evaluate.answer_metrics import beyond_loss, label_metrics
from research.evaluate.answer_metrics.choose_metrics import METRICS, choose_metrics
from research.evaluate.answer_metrics.rouge import common_subsequence
from research.evaluate.answered_row import AnsweredRow

ROW = AnsweredRow(
    "id", "test.jsonl:7", "", "test", "P", "q", "", "", "", 0, 0, True
)  # fmt: skip


def row(answer, *references, **fields):
    reference, *others = references or ("",)
    given = {"answer": answer, "reference": reference, **fields}
    return replace(ROW, **given, other_references=tuple(others))


def value(name, *rows):
    return METRICS[name].measure(rows).value


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1", "contains"),
    [
        # The official script's normalisation: case, articles, punctuation, space.
        ("the Eiffel  Tower!", ("Eiffel tower",), 1, 1, 1),
        ("It is in Paris, France.", ("Paris",), 0, 1 / 3, 1),
        ("U.S.", ("US",), 1, 1, 1),
        ("in 1,000 days", ("1000",), 0, 1 / 2, 1),
        ("Russia", ("us",), 0, 0, 0),
        ("a b b c", ("b b d",), 0, 2 * 2 / 6, 0),
        ("", ("Paris",), 0, 0, 0),
        ("Berlin", ("Bonn", "berlin", "Köln"), 1, 1, 1),
        # Numbers stay what they are.
        ("35", ("3.5",), 0, 0, 0),
        ("3.5.", ("3.5",), 1, 1, 1),
        ("5", ("-5",), 0, 0, 0),
        ("5", (".5",), 0, 0, 0),
        ("5", ("-.5",), 0, 0, 0),
        ("\u22125", ("-5",), 1, 1, 1),
        ("5 - 3", ("3",), 0, 2 / 3, 1),
        ("pages 3-4", ("4",), 0, 0, 1),
        ("1,000", ("1",), 0, 0, 0),
        ("C", ("C++",), 0, 0, 0),
        ("C#!", ("C#",), 1, 1, 1),
        ("#5 + $3", ("5 3",), 1, 1, 1),
        # A word ends at its punctuation, or is one without it.
        ("Answer:Paris", ("Paris",), 0, 0, 1),
        ("in the U.S.A.", ("usa",), 0, 2 / 3, 1),
        # Nothing of these would stay without articles, or without punctuation.
        ("A.", ("A",), 1, 1, 1),
        ("B", ("A",), 0, 0, 0),
        ("", ("The",), 0, 0, 0),
        ("-", ("+",), 0, 0, 0),
        ("+", ("+",), 1, 1, 1),
        # Other scripts: case, width, punctuation, marks, and no spaces.
        ("«STRASSE»", ("straße",), 1, 1, 1),
        ("\uff30aris", ("Paris",), 1, 1, 1),
        ("cafe\u0301", ("café",), 1, 1, 1),
        ("हिन्दी।", ("हिन्दी",), 1, 1, 1),
        ("東京です。", ("東京",), 0, 2 * 2 / 6, 1),
        ("👍", ("👍",), 1, 1, 1),
        ("👎", ("👍",), 0, 0, 0),
    ],
)
def test_short_answers(answer, references, exact, f1, contains):
    given = row(answer, *references)
    assert value("exact_match", given) == exact
    assert value("token_f1", given) == pytest.approx(f1)
    assert value("contains", given) == contains


# Results of the package rouge-score 0.1.2: F1 of rouge2 and rougeL.
ROUGE_EXAMPLES = [
    ("The quick brown fox jumps over the lazy dog",
     "The quick brown dog jumps on the log.", 0.26666666666666666, 0.5882352941176471),
    ("testing one two", "testing", 0.0, 0.5),
    ("police killed the gunman", "police kill the gunman", 1 / 3, 0.75),
    ("police killed the gunman", "the gunman kill police", 1 / 3, 0.5),
    ("police killed the gunman", "", 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "answer", "two", "longest"), ROUGE_EXAMPLES)
def test_rouge_equals_the_package_of_that_name(reference, answer, two, longest):
    given = row(answer, reference)
    assert value("rouge_2", given) == pytest.approx(two, abs=1e-12)
    assert value("rouge_l", given) == pytest.approx(longest, abs=1e-12)


def test_rouge_reads_every_script_and_takes_the_best_reference():
    assert value("rouge_l", row("кот сидит", "Кот сидит дома")) == pytest.approx(0.8)
    assert value("rouge_l", row("猫在家", "猫在家里")) == pytest.approx(6 / 7)
    assert value("rouge_l", row("x y", "a b", "x z")) == 0.5
    # References without words say nothing; neither does one word about pairs.
    assert METRICS["rouge_l"].measure([row("x", "👍")]).scores == (None,)
    assert METRICS["rouge_2"].measure([row("x", "one")]).scores == (None,)


def test_the_common_subsequence_by_bits_equals_the_table():
    generator = np.random.default_rng(0)
    for _ in range(50):
        one, two = (
            [str(word) for word in generator.integers(0, 6, generator.integers(0, 90))]
            for _ in range(2)
        )
        table = np.zeros((len(one) + 1, len(two) + 1), int)
        for i, a in enumerate(one):
            for j, b in enumerate(two):
                step = table[i, j] + 1 if a == b else 0
                table[i + 1, j + 1] = max(step, table[i, j + 1], table[i + 1, j])
        assert common_subsequence(one, two) == table[-1, -1]


# The example of sacreBLEU's README, whose BLEU it prints as 48.53.
HYPOTHESES = [
    "The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."
]  # fmt: skip
REFERENCES = [
    ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
    [
        "The dog had bit the man.",
        "No one was surprised.",
        "The man had bitten the dog.",
    ],
]  # fmt: skip


def test_bleu_and_chrf_are_those_of_the_readme_of_sacrebleu():
    rows = [row(h, *r) for h, *r in zip(HYPOTHESES, *REFERENCES, strict=True)]
    assert round(value("bleu", *rows), 2) == 48.53
    assert value("chrf", *rows) == pytest.approx(
        CHRF().corpus_score(HYPOTHESES, REFERENCES).score
    )


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_metrics_equal_sacrebleu_on_any_rows(name):
    """Also without matches, without words, and for any rows of a resample."""
    generator = np.random.default_rng(0)
    words = ["the", "cat", "sat", ".", "Über", "mat", "on", "!"]
    scorer = {"bleu": BLEU(), "chrf": CHRF()}[name]
    for _ in range(12):
        texts = [
            " ".join(generator.choice(words, generator.integers(size > 0, 9)))
            for size in range(14)
            for _ in "_"
        ]
        answers, references = texts[::2], [text or "the" for text in texts[1::2]]
        rows = [row(*pair) for pair in zip(answers, references, strict=True)]
        picked = generator.integers(0, len(rows), len(rows))
        expected = scorer.corpus_score(
            [answers[i] for i in picked], [[references[i] for i in picked]]
        ).score
        assert METRICS[name].measure(rows).subset(picked).value == pytest.approx(
            expected
        )


def test_bleu_cuts_chinese_into_characters():
    assert value("bleu", row("猫坐在垫子上面。", "猫坐在垫子上。")) > 50
    assert value("bleu", row("", "猫")) == 0


LABELLED = [
    row("Positive.", "positive"),
    row("I think it is negative", "negative"),
    row("negative", "positive"),
    row("positive or negative", "positive"),
    row("neutral!", "neutral"),
    row("no idea", "negative"),
]


def test_accuracy_and_macro_f1_by_hand():
    assert value("accuracy", *LABELLED) == 3 / 6
    # positive: 1 of 1 answered, of 3; negative: 1 of 2, of 2; neutral: 1 of 1.
    expected = np.mean([2 * 1 / (1 + 3), 2 * 1 / (2 + 2), 1])
    assert value("macro_f1", *LABELLED) == pytest.approx(expected)
    assert value("label_named", *LABELLED) == 4 / 6


def test_the_mean_is_over_labels_that_occur_in_the_rows_at_hand():
    """Otherwise a category, or a resample without a rare label, would get zeros."""
    found = METRICS["macro_f1"].measure(LABELLED)
    assert found.subset([4]).value == 1
    assert found.subset([4, 5]).value == 1 / 2


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Very positive", "very positive"),  # and not the label inside it
        ("A", "A"),
        ("(b)", "B"),
        ("B, because a cat is one", "B"),
        ("a cat", None),
        ("positive\n\n### very positive or B?", "positive"),
        ("A or B", None),
        ("label:positive", "positive"),
        ("unpositive", None),
        ("", None),
    ],
)
def test_labels_in_answers(answer, label):
    labels = ["positive", "very positive", "A", "B"]
    assert label_metrics.label_in(answer, labels) == label


@pytest.mark.parametrize(
    ("answer", "labels", "label"),
    [
        ("The text is non-toxic.", ["toxic", "non-toxic"], "non-toxic"),
        ("The text is toxic.", ["toxic", "non-toxic"], "toxic"),
        ("Label: non-fiction", ["fiction", "non-fiction"], "non-fiction"),
        ("It is not_spam.", ["spam", "not_spam"], "not_spam"),
        ("I say: very/positive", ["positive", "very positive"], "very positive"),
        ("It is type A+B.", ["A", "A+B"], "A+B"),
        ("It is pre-owned or new", ["owned", "pre-owned", "new"], None),
    ],
)
def test_a_label_inside_a_longer_one_does_not_count(answer, labels, label):
    assert label_metrics.label_in(answer, labels) == label
    assert label_metrics.label_in(answer, labels[::-1]) == label


def test_a_thousand_different_texts_are_no_labels():
    rows = [row("x", f"text {number}") for number in range(1001)]
    with pytest.raises(UserError, match=r"1001 different texts.*use exact_match"):
        METRICS["accuracy"].measure(rows)


def test_repetition_is_the_share_of_runs_that_are_there_already():
    assert beyond_loss.repetition("a b c d e") == 0
    assert beyond_loss.repetition("a b c d a b c d") == 1 / 5
    assert beyond_loss.repetition("") == beyond_loss.repetition("no no no") == 0
    for text in ("!" * 60, "la " * 60, "哈" * 60, "0" * 60):
        assert beyond_loss.repetition(text) > 0.9, text


CONTEXT = "one two three four five six seven eight nine ten"


def test_copied_is_the_share_of_words_in_long_copied_runs():
    copy = row("one two three four five six seven eight, zzz yyy", context=CONTEXT)
    assert value("copied", copy) == 0.8
    assert value("copied", replace(copy, reference=CONTEXT)) == 0
    assert value("copied", row("one two three four", context=CONTEXT)) == 0
    assert value("copied", row("", context=CONTEXT)) == 0


def test_the_language_of_an_answer_is_that_of_its_reference():
    english = "The museum opens at nine and closes late in the evening."
    german = "Das Museum öffnet um neun und schließt erst spät am Abend."
    assert value("language_switch", row(german, english)) == 1
    assert value("language_switch", row(english, english)) == 0
    assert value("language_switch", row(german, german, question=english)) == 0
    assert value("language_switch", row(german, question=english)) == 1
    assert value("language_switch", row("Ja.", english)) is None


ENGLISH = "The museum opens at nine and closes late in the evening."
CHINESE = [
    "博物馆早上九点开门。",
    "水在一百摄氏度时沸腾。",
    "台灣的首都台北人口約有兩百五十萬。",
    "牛顿是发现了万有引力定律的物理学家。",
]


@pytest.mark.parametrize("chinese", CHINESE)
def test_a_switch_from_and_to_chinese_is_seen(chinese):
    assert value("language_switch", row(chinese, ENGLISH)) == 1
    assert value("language_switch", row(ENGLISH, chinese)) == 1
    for other in CHINESE:
        assert value("language_switch", row(chinese, other)) == 0


@pytest.mark.parametrize(
    "text",
    [
        "Hovedstaden i Norge er Oslo, som ligger innerst i Oslofjorden.",
        "Glavni grad Srbije je Beograd, koji leži na ušću Save u Dunav.",
        "Ibu kota Indonesia adalah Jakarta, yang terletak di pulau Jawa.",
        "Det er en god idé at drikke vand hver dag.",
        "東京は日本の首都です。",
        "서울은 대한민국의 수도이다.",
    ],
)
def test_languages_that_look_like_another_are_not_english(text):
    assert value("language_switch", row(text, ENGLISH)) == 1
    assert value("language_switch", row(text, text)) in (0, None)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "是的。",
        "Oslo.",
        "3,141 + 2,718 = 5,859",
        "Ganges, Nile, Yamuna, Indus, Thames",
    ],
)
def test_an_answer_that_shows_no_language_is_no_switch(answer):
    assert value("language_switch", row(answer, ENGLISH)) is None


def test_a_category_has_labels_of_its_own():
    mood = [row("It is bad, no doubt.", "bad"), row("good", "good"), row("Bad", "Bad")]
    mood = [replace(x, category="mood") for x in (*mood, row("yes", "good"))]
    checks = [row("yes", "Yes"), row("no", "yes"), row("No good", "no"), row("", "no")]
    checks = [replace(x, category="check") for x in checks]
    found = METRICS["accuracy"].measure([*mood, *checks])
    assert found.scores == (1, 1, 1, 0, 1, 0, 1, 0)
    # bad: 2 of 2; good: 1 of 1, of 2; yes and no: 1 of 1 and 1 of 2, of 2 each.
    by_hand = np.mean([1, 2 / 3, 2 / 3, 2 / 4])
    assert value("macro_f1", *mood, *checks) == pytest.approx(by_hand)


def test_rows_of_one_kind_share_their_labels_across_small_categories():
    rows = [row("positive or negative", x) for x in ("positive", "negative")]
    rows = [replace(x, category=x.reference) for x in rows]
    assert value("accuracy", *rows) == 0


def test_a_wrong_label_is_named_and_makes_a_model_no_better():
    assert value("label_named", row("negative", "positive"), *LABELLED) > 4 / 6
    assert METRICS["label_named"].higher_is_better is None


def test_properties_of_answers_by_hand():
    rows = [
        row("yes", "a b", new_tokens=1, reference_tokens=2),
        row(" \u200b", "a b c d e f", new_tokens=3, reference_tokens=6, stopped=False),
    ]
    assert value("stopped", *rows) == 1 / 2
    assert value("length_ratio", *rows) == 4 / 8
    assert value("empty", *rows) == 1 / 2


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "text",
    ["", " \n", "\x00\ud800", "word " * 900, "é" * 2000, "A" * 2000, "。" * 50, "ไทย"],
    ids=["empty", "space", "broken", "long", "one word", "capitals", "signs", "thai"],
)
def test_any_text_is_measured(name, text):
    rows = [row(text, "some reference"), row("answer", text), row(text, text)]
    for score in METRICS[name].measure(rows).scores:
        assert score is None or np.isfinite(score)


def test_rows_without_a_reference_have_no_score_where_one_is_needed():
    rows = [row("a", "a"), row("a"), row("b", None), row("c", "c")]
    found = METRICS["exact_match"].measure(rows)
    assert found.scores == (1, None, None, 1) and found.value == 1
    with pytest.raises(UserError, match=r"rouge_l.*none of 2 rows has one"):
        choose_metrics(["rouge_l"], rows[1:3])
    with pytest.raises(UserError, match=r"test\.jsonl:7: the answer is None"):
        METRICS["empty"].measure([row(None)])
    assert METRICS["macro_f1"].measure([]).value is None


def test_the_note_of_a_metric_is_one_line():
    for metric in METRICS.values():
        assert metric.note and "\n" not in metric.note
