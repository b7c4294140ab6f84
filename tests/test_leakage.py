"A picture is known by its content: copies, and other ways to write a path, are one picture to splits and to the report of leaks."

import collections
import csv
import json
import warnings
from dataclasses import replace

import made_data
import pytest

from cmi_mtl.core import InputError, data_home
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


def splits_of(samples):
    return [s.split for s in samples]


def test_rows_added_later_move_no_other(tmp_path):
    "The same pictures under names that are less in order than those of before."
    before = [(f"copies/{i}.png", None) for i in range(40)]
    splits = splits_of(table(tmp_path, before))
    more = [(f"{i}.png", None) for i in range(40)]
    assert splits_of(table(tmp_path, more + before)) == splits + splits


def test_names_of_files_play_no_part(tmp_path):
    "Nor the sign between folders, which another system writes otherwise."
    splits = [
        splits_of(table(tmp_path, [(f"{folder}{i}.png", None) for i in range(40)]))
        for folder in ("", "copies/")
    ]
    assert splits[0] == splits[1] and len(set(splits[0])) == 3


def test_pictures_added_to_a_patient_join_the_others(tmp_path):
    made_data.write(PICTURES, tmp_path)

    def loaded(rows):
        lines = [f"{i}.png,Is it {k}?,yes,patient {i % 8}" for k, i in enumerate(rows)]
        text = "\n".join(["image,question,answer,image_id", *lines])
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        return splits_of(load_dataset("table", tmp_path / "t.csv"))

    first, rows = loaded(range(20, 40)), range(40)
    second = loaded(rows)
    assert second[20:] == first and len(set(first)) > 1
    assert all(second[i] == second[20 + (i - 20) % 8] for i in rows)


def test_a_wrong_split_is_said_of_its_own_row_alone(tmp_path):
    with pytest.raises(InputError) as e:
        table(tmp_path, [("1.png", "val"), ("copies/1.png", None)])
    assert [p.what for p in e.value.problems] == ["unknown split 'val'"]


def test_the_report_sees_a_patient(tmp_path):
    "Two pictures of one patient, divided by hand."
    made_data.write(PICTURES, tmp_path)
    rows = ["1.png,Is it?,yes,train,7", "2.png,Is it?,yes,test,7", "3.png,Is it?,no,test,8"]
    text = "\n".join(["image,question,answer,split,image_id", *rows])
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    (row,) = leakage_report(load_dataset("table", tmp_path / "t.csv"))
    assert (row["images"], row["shared_images"], row["questions_on_shared_images"]) == (2, 1, 1)
    assert row["identical_image_and_question"] == 0


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


def test_words_on_one_picture_stay_together_with_a_link_and_without(tmp_path):
    samples = table(tmp_path, [(f"{i}.png", "train") for i in range(40) for _ in "ab"])
    samples = [
        replace(s, question="Why?", linked_id=f"g{i}" if i % 2 else None)
        for i, s in enumerate(samples)
    ]
    for seed in range(5):
        split = splits_of(carve_validation(samples, seed=seed))
        assert split[::2] == split[1::2] and set(split) == {"train", "validation"}


def test_loaders_of_files_name_the_content(tmp_path):
    made_data.write(made_data.rad_files(), tmp_path / "rad")
    made_data.write(made_data.slake_files(), tmp_path / "slake")
    for name, folder in (("vqa_rad", "rad"), ("slake", "slake")):
        samples = load_dataset(name, tmp_path / folder)
        assert all(len(s.image_digest) == 64 and s.picture == s.image_digest for s in samples)


def test_the_phantom_names_its_pictures_by_their_ids(tmp_path):
    "It draws each once; a digest would change what published records say of its data."
    samples = load_dataset("phantom", tmp_path, n_images=10, size=48)
    assert all(s.image_digest is None and s.picture == s.image_id for s in samples)


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
