"Answers that are the same to a radiologist are one, all others stay apart; on the real data nothing changes but what should."

import collections
import itertools
import json
import random
import unicodedata
from types import SimpleNamespace

import made_data
import pytest

from cmi_mtl.core import InputError, data_home
from cmi_mtl.datasets import load_dataset
from cmi_mtl.model import check_counts, check_question
from cmi_mtl.samples import normalise_answer, plain_text

APART = [
    ("hepatitis A", "hepatitis"),
    ("vitamin a", "vitamin"),
    ("A.P.", "P.A."),
    (".5 cm", "5 cm"),
    ("<5 mm", ">5 mm"),
    ("<= 5", ">= 5"),
    ("HER2+", "HER2-"),
    ("-5", "5"),
    ("−5", "5"),
    ("±2", "2"),
    ("1/2", "12"),
    ("1/2", "1-2"),
    ("3–5", "35"),
    ("3.5", "35"),
    ("50%", "50"),
    ("T2 ↑", "T2 ↓"),
    ("x = 1", "x > 1"),
    ("हिन्दी", "हन्द"),
    ("กิน", "กน"),
    ("كَتَبَ", "كتب"),
    ("10^3", "103"),
    ("~5", "5"),
    ("++", "+"),
    ("-.5", ".5"),
    ("A, B", "B"),
    ("A, B, C", "B, C"),
    ("A or B", "B"),
    ("A positive", "positive"),
    ("A +", "+"),
    ("3 - 5", "3 5"),
]
SAME = [
    ("Yes.", "yes"),
    (" the  Liver ", "liver"),
    ("An aneurysm", "aneurysm"),
    ("in the brain", "in brain"),
    ("2.0", "2"),
    (2.0, 2),
    (".50", "0.5"),
    ("1,000", "1000"),
    ("two", "2"),
    ("A.P.", "AP"),
    ("X-ray", "x ray"),
    ("L4-5", "L4/5"),
    ("< 5 mm", "<5 mm"),
    ("Crohn’s disease", "Crohn's disease"),
    ("left,right", "left, right"),
    ("ＣＴ　５０％", "ct 50%"),
    ("μm", "µm"),
    ("co\u00adlon", "colon"),
    (unicodedata.normalize("NFD", "Sjögren"), "Sjögren"),
    ("(mass)", "mass"),
    ("“mass”", "mass"),
    ("肺部。", "肺部"),
    ("not sure?", "Not sure"),
    ("-.50", "-0.5"),
    ("A/B", "A, B"),
    ("a positive finding", "positive finding"),
    ("A T-tube", "T tube"),
    ("50 %", "50%"),
    ("3 - 5 cm", "3-5 cm"),
    ("1 – 2 – 3", "1-2-3"),
]


@pytest.mark.parametrize("a, b", APART)
def test_different_answers_stay_apart(a, b):
    assert normalise_answer(a) != normalise_answer(b)


@pytest.mark.parametrize("a, b", SAME)
def test_spellings_of_one_answer_are_merged(a, b):
    assert normalise_answer(a) == normalise_answer(b) != ""


def test_a_normalised_answer_is_its_own_normalisation():
    rng = random.Random(0)
    signs = [
        *"aA thean.,-/%+<>=±~' 0123456789",
        "é",
        "e\u0301",
        "ि",
        "肺",
        "５",
        "\u200d",
        "½",
        "²",
        "<=",
        "the ",
        "a.b.",
        "1.50",
    ]
    for _ in range(20000):
        text = "".join(
            rng.choice(signs) if rng.random() < 0.9 else chr(rng.randrange(32, 0x3000))
            for _ in range(rng.randrange(1, 9))
        )
        once = normalise_answer(text)
        assert normalise_answer(once) == once, (text, once)


def test_questions_of_another_unicode_form_are_one_question():
    assert plain_text(unicodedata.normalize("NFD", "Où est  la lésion?")) == plain_text(
        "où est la lésion?"
    )


@pytest.mark.parametrize("answer", ["...", "?!", "\u200b"])
def test_an_answer_of_which_nothing_is_left_is_an_error(tmp_path, answer):
    made_data.write({"a.png": made_data.picture(1, kind="PNG")}, tmp_path)
    rows = [dict(image="a.png", question="Is it?", answer=x) for x in ("yes", answer)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(InputError, match=r"t.jsonl, row 2: the answer .* (is empty|has no letter)"):
        load_dataset("table", tmp_path / "t.jsonl")


# ---------------------------------------------------------------- the benchmarks' own spellings, where they are at hand

PAIRS = {
    "vqa_rad": (["trainset.json", "testset.json"], None, 67),
    "slake, en": (["train.json", "validate.json", "test.json"], "en", 11),
    "slake, zh": (["train.json", "validate.json", "test.json"], "zh", 17),
}


@pytest.mark.parametrize("name", PAIRS)
def test_merged_pairs_of_the_benchmarks(name):
    "As many as by the literal convention; all were read, each is two spellings of one answer."
    files, language, expected = PAIRS[name]
    folder = data_home() / name.split(",")[0]
    if not folder.is_dir():
        pytest.skip(f"{folder} is not at hand")
    rows = [r for f in files for r in json.loads((folder / f).read_text(encoding="utf-8"))]
    raw, merged = (
        {str(r["answer"]) for r in rows if r.get("q_lang") == language},
        collections.defaultdict(set),
    )
    for a in raw:
        merged[normalise_answer(a)].add(a)
    assert sum(len(list(itertools.combinations(v, 2))) for v in merged.values()) == expected


# ---------------------------------------------------------------- what cannot be asked


@pytest.mark.parametrize("question", [None, float("nan"), [], ["Is it?"], {}, 3])
def test_a_question_that_is_no_text_is_refused(question):
    net = SimpleNamespace(processor=object(), config=SimpleNamespace(answers=["yes"]))
    with pytest.raises(InputError, match="question: .* is no text. Write a question"):
        check_question(net, question)


@pytest.mark.parametrize("counts", [dict(top=0), dict(top=True), dict(top=1.5)])
def test_numbers_that_count_nothing_are_refused(counts):
    with pytest.raises(InputError, match="out of range. Give a whole number") as e:
        check_counts(**counts)
    assert all(name in str(e.value) for name in counts)
