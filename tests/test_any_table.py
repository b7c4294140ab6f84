"Whatever passes the loader trains, scores and is published: tables that hypothesis makes up."

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import made_data
import made_run
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import cmi_mtl.train as T
from cmi_mtl import run
from cmi_mtl.core import InputError
from cmi_mtl.datasets import load_dataset
from cmi_mtl.records import publish
from cmi_mtl.samples import normalise_answer

PAGES = Path(__file__).resolve().parent.parent / "nbs/experiments"
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
QUESTION = st.one_of(TEXT, st.sampled_from(["Is it well?", "Where is it?"]))
ANSWER = st.one_of(TEXT, st.integers(-3, 3), st.sampled_from(["yes", "no", "left side"]))
LABEL = st.one_of(st.none(), TEXT, st.integers(), st.floats())
OPTIONAL = {
    "answer_type": st.sampled_from(["OPEN", "closed", "CLOSED ", None]),
    **dict.fromkeys(("organ", "modality", "question_type", "phrase_type", "linked_id"), LABEL),
    "image_id": st.one_of(st.none(), TEXT, st.integers()),
}
ROW = st.fixed_dictionaries(
    {
        "image": st.sampled_from(["0.png", "1.png", "2.png"]),
        "question": QUESTION.filter(str.strip),
        "answer": ANSWER.filter(normalise_answer),
        "split": st.sampled_from(["train", "train", "validation", "test"]),
    },
    optional=OPTIONAL,
)
WHOLE = [
    {"image": "0.png", "question": "Is it well?", "answer": "yes", "split": split}
    for split in ("train", "train", "validation", "test")
]


def settings_for(folder, rows):
    for k in range(3):
        made_data.write({f"{k}.png": made_data.picture(k, (32, 32), "PNG")}, folder)
    table = folder / "table.jsonl"
    table.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    s = made_run.settings(folder, epochs=1, batch_size=4)
    return replace(s, data_root=str(table))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,  # the same tables each time
    database=None,
    phases=[Phase.explicit, Phase.generate],  # each try is a training: none to make it smaller
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(ROW, max_size=10).map(lambda rows: WHOLE + rows))
@example(WHOLE)  # a training set with one answer
@example([r | {"answer_type": "CLOSED"} for r in WHOLE])  # and without an open question
@example([r | {"linked_id": k if k else None, "organ": "Lung"} for k, r in enumerate(WHOLE)])
def test_whatever_passes_the_loader_trains_and_is_published(rows):
    with tempfile.TemporaryDirectory() as top:
        top = Path(top)
        s = settings_for(top, rows)
        try:
            samples = load_dataset(s.dataset, s.data_root)
        except InputError:
            return  # told, with the way out
        try:
            record = T.train(s, top / "run", samples)
        except InputError as e:
            assert "no question in split" in str(e) or "unknown to the text encoder" in str(e)
            return
        tested = sum(x.split == "test" for x in samples)
        assert record["test"]["overall"]["questions"] == tested
        kept = json.loads(publish(top / "run", top / "records").read_text(encoding="utf-8"))
        assert len(kept["per_question"]["correct"]) == tested


@pytest.mark.parametrize("answers", [("yes", "left side", "no"), ("yes", "no")])
def test_pages_are_made_of_a_bare_table(tmp_path, answers):
    "It has no organ, no modality and no kind of question; the second not one open question either."
    rows = [
        r
        | {"image": f"{k % 3}.png", "question": f"Is it {k}?", "answer": answers[k % len(answers)]}
        for k, r in enumerate(6 * WHOLE)
    ]
    T.train(settings_for(tmp_path, rows), tmp_path / "run")
    kept = publish(tmp_path / "run", tmp_path / "records").read_text(encoding="utf-8")
    columns = json.loads(kept)["per_question"]
    assert columns.keys().isdisjoint({"organ", "modality", "question_type", "linked"})
    assert set(columns["answer_type"]) == ({"CLOSED"} if len(answers) == 2 else {"OPEN", "CLOSED"})
    for page in ("comparison", "ablation"):
        argv = [str(PAGES / f"{page}.ipynb"), "--out", str(tmp_path / "pages")]
        argv += ["-p", "dataset", "table", "-p", "records", str(tmp_path / "records")]
        assert run.main(argv) == 0, page
    comparison, ablation = (
        (tmp_path / f"pages/{page}_table.md").read_text(encoding="utf-8")
        for page in ("comparison", "ablation")
    )
    assert "answer type: CLOSED" in comparison and "organ: " not in comparison
    assert ("## Written answers" in comparison) == ("OPEN" in columns["answer_type"])
    assert "no question has one" in ablation
