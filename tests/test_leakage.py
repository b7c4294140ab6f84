"A picture is known by its content: copies, and other ways to write a path, are one picture to splits and to the report of leaks."

import collections
import csv
import json
import warnings

import made_data
import pytest

from cmi_mtl.core import data_home
from cmi_mtl.datasets import check_samples, load_dataset
from cmi_mtl.samples import carve_validation, leakage_report, normalise_answer

PICTURES = {f"{i}.png": made_data.picture(i, kind="PNG") for i in range(40)}


def table(folder, rows):
    "A table of (image, split or None) with the pictures, and a copy of each in copies/."
    made_data.write({**PICTURES, **{f"copies/{k}": v for k, v in PICTURES.items()}}, folder)
    with open(folder / "t.csv", "w", newline="", encoding="utf-8") as f:
        w = csv.writer(f)
        w.writerow(["image", "question", "answer", "split"])
        w.writerows(
            [image, f"Is it {i}?", "yes", split or ""] for i, (image, split) in enumerate(rows)
        )
    return load_dataset("table", folder / "t.csv")


def test_two_ways_to_write_a_path_are_one_image(tmp_path):
    samples = table(
        tmp_path, [("1.png", None), ("./1.png", None), ("copies/../1.png", None), ("2.png", None)]
    )
    assert [s.image_id for s in samples] == ["1.png", "1.png", "1.png", "2.png"]


def test_a_copy_goes_into_the_split_of_its_original(tmp_path):
    samples = table(
        tmp_path, [(f"{folder}{i}.png", None) for i in range(40) for folder in ("", "copies/")]
    )
    splits = collections.defaultdict(set)
    for s in samples:
        splits[s.image_digest].add(s.split)
    assert len(splits) == 40 and all(len(x) == 1 for x in splits.values())
    assert {s.split for s in samples} == {"train", "validation", "test"}
    assert all(row["shared_images"] == 0 for row in leakage_report(samples))


def test_a_row_without_split_joins_its_picture(tmp_path):
    for split in ("train", "validation", "test"):
        assert [s.split for s in table(tmp_path, [("3.png", split), ("copies/3.png", None)])] == [
            split,
            split,
        ]


def test_the_report_sees_a_copy(tmp_path):
    samples = table(tmp_path, [("1.png", "train"), ("copies/1.png", "test"), ("2.png", "test")])
    assert leakage_report(samples)[0] | {"questions": 0} == {
        "split": "test",
        "with_split": "train",
        "questions": 0,
        "images": 2,
        "shared_images": 1,
        "questions_on_shared_images": 1,
        "identical_image_and_question": 0,
        "linked_questions": 0,
    }


def test_validation_carved_by_image_keeps_copies_together(tmp_path):
    samples = table(
        tmp_path, [(f"{folder}{i}.png", "train") for i in range(40) for folder in ("", "copies/")]
    )
    carved = carve_validation(samples, by="image")
    picture = {
        split: {s.image_digest for s in carved if s.split == split}
        for split in ("train", "validation")
    }
    assert picture["validation"] and not picture["train"] & picture["validation"]


def test_every_loader_names_the_content(tmp_path):
    made_data.write(made_data.rad_files(), tmp_path / "rad")
    made_data.write(made_data.slake_files(), tmp_path / "slake")
    for name, folder in (("vqa_rad", "rad"), ("slake", "slake")):
        samples = load_dataset(name, tmp_path / folder)
        assert all(len(s.image_digest) == 64 and s.picture == s.image_digest for s in samples)


@pytest.mark.skipif(not (data_home() / "vqa_rad").is_dir(), reason="VQA-RAD is not at hand")
def test_what_the_chapter_says_of_vqa_rad():
    "10_samples shows these numbers from a record; that of the answers stands in its prose alone."
    samples = load_dataset("vqa_rad")
    (row,) = leakage_report(samples)
    assert row["questions"] == row["questions_on_shared_images"] == 451
    assert (row["identical_image_and_question"], row["linked_questions"]) == (14, 299)
    answers = collections.defaultdict(set)
    for s in samples:
        if s.split == "train" and s.linked_id:
            answers[s.linked_id].add(normalise_answer(s.answer))
    test = [s for s in samples if s.split == "test"]
    assert sum(normalise_answer(s.answer) in answers[s.linked_id] for s in test) == 294


def said(load, *args):
    "The warnings of a call."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(*args)
    return [str(w.message) for w in caught]


def test_a_question_in_two_splits_is_said_in_a_line(tmp_path):
    made_data.write({"a.png": PICTURES["1.png"], "b.png": PICTURES["1.png"]}, tmp_path)
    rows = ["a.png,Is it?,yes,train", "b.png,is  IT?,yes,test", "a.png,Where?,left,test"]
    rows += ["a.png,Is it?,no,validation", "a.png,When?,now,validation"]
    path = tmp_path / "t.csv"
    path.write_text("image,question,answer,split\n" + "\n".join(rows) + "\n", encoding="utf-8")
    expected = [
        "1 of 2 validation questions stand in train, too; "
        "1 of 2 test questions stand in train, too; "
        "1 of 2 test questions stand in validation, too: the same words about the same picture"
    ]
    assert said(load_dataset, "table", path) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = load_dataset("table", path)
    assert said(check_samples, samples) == expected
    assert not said(check_samples, [s for s in samples if s.split == "test"])


@pytest.mark.parametrize("name, images", [("vqa_rad", "images"), ("ovqa", "img")])
def test_published_splits_are_loaded_without_a_word(tmp_path, name, images):
    "Everybody uses them as they are, and 14 questions of VQA-RAD's test would be named at each start."
    rows = json.dumps(made_data.rad_rows("train")).encode()
    files = {f"{split}set.json": rows for split in ("train", "val", "test")}
    files |= {f"{images}/made{i}.jpg": made_data.picture(i) for i in range(3)}
    made_data.write(files, tmp_path)
    samples = load_dataset(name, tmp_path)
    assert any(row["identical_image_and_question"] for row in leakage_report(samples))
    assert not said(load_dataset, name, tmp_path)
