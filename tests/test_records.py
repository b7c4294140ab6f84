"What a run writes down: enough to build its model anew, to compare runs honestly, to need no run twice; and no names in public."

import csv
import importlib.metadata
import inspect
import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import made_data
import made_run
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModel

import cmi_mtl.train as T
from cmi_mtl import batches, build, core, loop, scores, tables
from cmi_mtl.config import PRESET_WEIGHTS, CMIMTLConfig
from cmi_mtl.core import InputError, read_jsonl, sha256_file, write_json, write_jsonl
from cmi_mtl.encoders import tiny_text_config
from cmi_mtl.metrics import accuracy
from cmi_mtl.model import CMIMTL
from cmi_mtl.names import digest
from cmi_mtl.records import publish, read_records, text_scores
from cmi_mtl.scores import other_pictures

ROOT = Path(__file__).resolve().parent.parent


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def word_vectors(texts, **_):
    "In place of MiniLM: the words of a text, so that nothing depends on weights that may not be there."
    words = sorted({w for t in texts for w in t.split()})
    counts = torch.tensor([[float(w in t.split()) for w in words] for t in texts])
    return torch.nn.functional.normalize(counts, dim=1)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def runs(top):
    "Folders of finished runs: two seeds, and one with kept tokens, trained on all but the test split."
    frozen = {"freeze_encoders": True, "augment": 0, "train_on": "train+validation"}
    changes = {"seed0": {}, "seed1": {"seed": 1}, "frozen": frozen}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(scores, "sentence_vectors", word_vectors)
        for name, given in changes.items():
            T.train(made_run.settings(top, epochs=2, **given), top / name)
    return {name: top / name for name in changes}


@pytest.fixture
def records(runs, tmp_path):
    "The two seeds, published."
    for name in ("seed0", "seed1"):
        publish(runs[name], tmp_path / "records")
    return read_records(tmp_path / "records")


# ---------------------------------------------------------------- the model


def shapes(model):
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


@pytest.mark.parametrize("name", ["seed0", "frozen"])
def test_model_is_rebuilt_from_its_record(runs, tmp_path, name):
    saved = CMIMTL.from_pretrained(runs[name] / "model")
    published = publish(runs[name], tmp_path)
    for path in (runs[name] / "record.json", published):
        assert shapes(build.model_from_record(read(path))) == shapes(saved)
    named = build.model_from_record(read(published), saved.config.answers)
    assert named.config.answers == saved.config.answers and named.config.num_queries == 4
    assert named.config.confidence_temperature == pytest.approx(
        saved.config.confidence_temperature, abs=1e-4
    )


def test_record_that_no_model_can_be_built_of(runs):
    record = read(runs["seed0"] / "record.json")

    def changed(**fields):
        return {**record, "model": {**record["model"], **fields}}

    for wrong, message in (
        ({**record, "schema": 99}, "its schema is 99, this version reads 2"),
        ({k: v for k, v in record.items() if k != "schema"}, "configuration is not recorded"),
        (changed(num_queries=9), "makes another one of it: weights have other names or shapes"),
        (changed(forgotten_field=1), "makes another one of it: it has no forgotten_field"),
    ):
        with pytest.raises(InputError, match=message):
            build.model_from_record(wrong)
    with pytest.raises(InputError, match="not the vocabulary of the record"):
        build.model_from_record(record, ["yes", "no"])


def test_every_field_of_the_configuration_is_recorded(runs):
    record = read(runs["seed0"] / "record.json")
    config = CMIMTL.from_pretrained(runs["seed0"] / "model").config
    short = {"image_encoder", "text_encoder", "answers", "fusion_options", "confidence_temperature"}
    for name in set(inspect.signature(CMIMTLConfig).parameters) - short - {"kwargs"}:
        assert record["model"][name] == getattr(config, name), name
    assert record["model"]["mend_negatives"] is True  # a default, nowhere given
    assert record["model"]["fusion_options"] == {
        "d_state": 4,
        "expand": 2,
        "d_conv": 4,
        "bidirectional": False,
    }
    assert record["model"]["answers"]["size"] == len(config.answers) == 4
    text = json.dumps(record["model"])
    assert (
        not any(answer in text for answer in ("left side", "lung"))
        and len(text.splitlines()) == 1
        and len(text) < 5000
    )
    assert record["model"]["image_encoder"]["name"] is None and record["model"]["image_encoder"][
        "configuration"
    ]["depths"] == [1, 2]


def test_encoder_is_named_by_the_weights_that_tokens_need():
    torch.manual_seed(0)
    encoder = AutoModel.from_config(tiny_text_config(30))
    first = build.encoder_record(encoder, "made/text")
    assert first["name"] == "made/text" and re.fullmatch("[0-9a-f]{64}", first["sha256"])
    assert not {"transformers_version", "_name_or_path"} & first["configuration"].keys()
    encoder.pooler.dense.weight.data.add_(1)  # what files may lack is random
    assert build.encoder_record(encoder, "made/text") == first
    encoder.embeddings.word_embeddings.weight.data[0, 0] += 1
    assert build.encoder_record(encoder, "made/text")["sha256"] != first["sha256"]


def test_trained_encoders_keep_the_checksum_of_their_start(top, monkeypatch):
    monkeypatch.setitem(PRESET_WEIGHTS, "tiny", {"image": "made/image", "text": "made/text"})
    monkeypatch.setattr(build, "with_pretrained_encoders", lambda config, **_: CMIMTL(config))
    monkeypatch.setattr(scores, "sentence_vectors", word_vectors)
    s = made_run.settings(top, epochs=1)
    record = T.train(s, top / "started")
    fresh = build.build_model(s, batches.prepare_samples(s, None))
    trained = CMIMTL.from_pretrained(top / "started/model")
    assert record["model"]["image_encoder"] == build.encoder_record(
        fresh.image_encoder, "made/image"
    )
    assert record["model"]["image_encoder"] != build.encoder_record(
        trained.image_encoder, "made/image"
    )


# ---------------------------------------------------------------- the run


def test_history_stands_in_the_record(runs):
    for name, validated in (("seed0", True), ("frozen", False)):
        record = read(runs[name] / "record.json")
        assert record["history"] == read_jsonl(runs[name] / "history.jsonl")
        assert [row["epoch"] for row in record["history"]] == [1, 2]
        assert ["validation" in row for row in record["history"]] == [validated] * 2
        assert record["settings"]["epochs"] == 2 and not {"best_epoch", "refit"} & record.keys()
        assert (record["validation"] is not None) == validated
        if validated:  # that of the last weights
            last = record["history"][-1]["validation"]
            assert record["validation"]["overall"]["accuracy"] == pytest.approx(last, abs=1e-3)


def test_versions_of_all_that_the_lock_file_pins():
    said = core.provenance(torch.device("cpu"))["versions"]

    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    installed = {plain(d.name) for d in importlib.metadata.distributions() if d.name}
    lines = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {plain(line.split("==")[0]) for line in lines if "==" in line}
    tools = {"wheel", "build"}  # they install packages; no package requires them
    assert len(pinned & installed) > 100 and pinned & installed - tools <= set(said)
    assert said["torchmetrics"] == importlib.metadata.version("torchmetrics")


def test_versions_in_a_checkout_that_is_not_installed(monkeypatch):
    all_of_them = importlib.metadata.distributions
    monkeypatch.setattr(
        importlib.metadata,
        "distributions",
        lambda: [d for d in all_of_them() if d.name != "cmi_mtl"],
    )
    said = core.package_versions()
    assert {"torch", "transformers", "numpy", "tokenizers", "huggingface-hub"} <= set(said)


def test_host_and_kernel_are_not_named(monkeypatch):
    box = platform.uname_result("Linux", "john-does-box", "6.1-doe", "#1 doe", "x86_64")
    monkeypatch.setattr(platform, "uname", lambda: box)
    said = json.dumps(core.provenance(torch.device("cpu")))
    assert "doe" not in said and "Linux x86_64" in said


# ---------------------------------------------------------------- each question


@pytest.mark.parametrize("name", ["seed0", "frozen"])
def test_answers_with_a_blank_and_a_shuffled_picture(runs, top, name):
    "As the saved model answers, asked by itself."
    model, rows = (
        CMIMTL.from_pretrained(runs[name] / "model"),
        read_jsonl(runs[name] / "predictions.jsonl"),
    )
    place = {sha256_file(p): p for p in top.glob("*.png")}
    other = other_pictures([r["image_digest"] for r in rows], 0)
    assert {r["image_digest"] for r in rows} == set(place) and all(a != b for a, b in other.items())
    blank = np.zeros((40, 40), np.uint8)
    for key, picture in (
        ("correct", lambda r: place[r["image_digest"]]),
        ("correct_blank", lambda r: blank),
        ("correct_shuffled", lambda r: place[other[r["image_digest"]]]),
    ):
        assert [model.answer(picture(r), r["question"]).answer == r["answer"] for r in rows] == [
            r[key] for r in rows
        ], key


def test_pictures_shown_are_those_asked_for(top):
    "Logits with another picture are those of a question about that picture, with kept tokens and with pixels."
    for frozen in (True, False):
        s = made_run.settings(top, freeze_encoders=frozen, augment=0)
        samples = batches.prepare_samples(s, None)
        model = build.build_model(s, samples).eval()
        data = batches.QuestionSet(samples, model, s.tokens_kept, torch.device("cpu"))
        rows, n = torch.tensor([0, 1, 2]), len(data.digests)
        shown = torch.tensor([3, n, 3])
        batch = data.batch(rows, shown)
        pixels = [samples[data.image_ids.tolist().index(3)].image, np.zeros((9, 9), np.uint8)]
        given = torch.stack([model.processor.pixels(x) for x in pixels])
        inputs = loop.to_inputs(
            batch, type("R", (), {"accelerator": Accelerator(cpu=True), "data": data}), False
        )
        tokens = inputs["image_tokens"] if frozen else model.encode_image(inputs["pixel_values"])
        torch.testing.assert_close(
            tokens, model.encode_image(given), rtol=1e-2, atol=1e-2
        )  # kept in 16 bits
        assert batch["image_index"].tolist() == [0, 1, 0] and data.batch(rows)[
            "image_ids"
        ].tolist() == [0, 1, 2]


def test_one_test_picture_has_no_other(top, runs, monkeypatch):
    monkeypatch.setattr(scores, "sentence_vectors", word_vectors)
    s = made_run.settings(top, epochs=1)
    samples = [
        x
        for x in batches.prepare_samples(s, None)
        if x.split != "test" or x.image.endswith("0.png")
    ]
    T.train(s, top / "one", samples)
    rows = read_jsonl(top / "one/predictions.jsonl")
    assert [r["correct_shuffled"] for r in rows] == [None] and [
        type(r["correct_blank"]) for r in rows
    ] == [bool]


def near(s, samples, folder):
    T.train(s, folder, samples)
    return [
        (r["nearest"], r["nearest_same_type"]) for r in read_jsonl(folder / "predictions.jsonl")
    ]


def test_nearest_training_question(top, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "sentence_vectors", word_vectors)
    s = made_run.settings(top, epochs=1)
    samples = batches.prepare_samples(s, None)
    train = [x for x in samples if x.split == "train"]
    alone = [x for x in samples if x.split == "test"][0]
    rest = [x for x in samples if x.image != alone.image and x.split != "test"]

    def put(qid, question, kind, split):
        return replace(alone, qid=qid, question=question, answer_type=kind, split=split)

    test = put("t", "alpha beta gamma delta", "OPEN", "test")
    assert near(s, [*rest, test], tmp_path / "0") == [
        (None, None)
    ]  # training has others' pictures only
    told = [
        put("a", "alpha beta gamma delta", "CLOSED", "train"),
        put("b", "alpha beta gamma other", "OPEN", "train"),
    ]
    assert near(s, [*rest, *told, test], tmp_path / "1") == [(1.0, 0.75)]
    validation = put("c", "alpha beta gamma delta", "OPEN", "validation")
    assert near(s, [*rest, told[1], validation, test], tmp_path / "2") == [(0.75, 0.75)]
    on_both = replace(s, train_on="train+validation")
    assert near(on_both, [*rest, told[1], validation, test], tmp_path / "3") == [(1.0, 1.0)]
    copy = tmp_path / "copy.png"  # the same picture under another name
    copy.write_bytes(Path(alone.image).read_bytes())
    told = replace(told[1], image=str(copy), image_id="copy.png")
    assert (
        near(s, [*rest, told, test], tmp_path / "4") == [(0.75, 0.75)]
        and len(train) == made_run.SPLITS["train"]
    )


def test_without_the_sentence_encoder(top, tmp_path, monkeypatch):
    monkeypatch.setenv("CMI_MTL_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    record = T.train(made_run.settings(top, epochs=1), tmp_path / "run")
    assert record["nearest_question"]["missing"].startswith("its weights are not at hand")
    assert all(
        r["nearest"] is None and r["nearest_same_type"] is None
        for r in read_jsonl(tmp_path / "run/predictions.jsonl")
    )
    columns = read(publish(tmp_path / "run", tmp_path))["per_question"]
    assert "nearest" not in columns and len(columns["correct_blank"]) == made_run.SPLITS["test"]


def test_intervals_go_by_pictures_not_by_names():
    rows = [
        dict(image_id=f"{i}.png", image_digest=f"{i // 4:064x}", correct=i // 4 % 2 == 0)
        for i in range(40)
    ]
    by_name = accuracy([{k: v for k, v in r.items() if k != "image_digest"} for r in rows])
    assert accuracy(rows)["high"] - accuracy(rows)["low"] > 1.4 * (by_name["high"] - by_name["low"])


# ---------------------------------------------------------------- in public

# substrings of no checksum: each has a letter that is no hex digit
NAMES = ("john", "doe", "zelda", "clinic", "secret")


def table_of_names(folder):
    "A user's table in which every field that may be free text holds a name."
    folder = folder / "John Doe at the Clinic"
    made_data.write(
        {f"Doe_John_{i}.png": made_data.picture(i, (32, 32), "PNG") for i in range(6)}, folder
    )
    columns = [
        "qid",
        "image",
        "image_id",
        "question",
        "answer",
        "answer_type",
        "split",
        "organ",
        "modality",
        "question_type",
        "phrase_type",
        "linked_id",
    ]
    with open(folder / "secret.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(columns)
        for i in range(24):
            split = ("train", "train", "validation", "test")[i // 4 % 4]
            out.writerow(
                [
                    f"Doe-{i}",
                    f"Doe_John_{i % 6}.png",
                    f"John {i % 6}",
                    f"Has John Doe {i}?",
                    ("yes", "no", "Zelda")[i % 3],
                    "OPEN" if i % 3 == 2 else "CLOSED",
                    split,
                    f"John's organ {i % 2}",
                    f"Clinic machine {split}",
                    f"Zelda's type {i % 3}",
                    "secret",
                    f"Doe group {i // 2}",
                ]
            )
    return folder / "secret.csv"


def test_no_name_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "sentence_vectors", word_vectors)
    path = table_of_names(tmp_path)
    s = made_run.settings(tmp_path / "unused", epochs=1)
    run = tmp_path / "John Doe at the Clinic/run"
    record = T.train(replace(s, data_root=str(path)), run)
    beyond = {k: {"difference": 1.0} for k in record["test"] if k.startswith("question_type")}
    write_json(
        run / "record.json",
        {**record, "baselines": {"majority": record["test"]}, "beyond_the_view": beyond},
    )
    before = (run / "record.json").read_text(encoding="utf-8") + (
        run / "predictions.jsonl"
    ).read_text(encoding="utf-8")
    assert all(name in before.lower() for name in NAMES)  # the run's own folder may say them
    target = publish(run, tmp_path / "public")
    text = target.read_text(encoding="utf-8").lower()
    assert not [name for name in NAMES if name in text] and str(tmp_path).lower() not in text
    published = json.loads(text)
    columns, rows = published["per_question"], read_jsonl(run / "predictions.jsonl")
    assert columns["organ"] == [0 if r["organ"].endswith("0") else 1 for r in rows]
    assert columns["image"] == [r["image_digest"][:16] for r in rows]
    assert columns["linked"] == [digest(r["linked_id"]) for r in rows] and columns["qid"][
        0
    ] == digest(rows[0]["qid"])
    assert (
        set(published["beyond_the_view"])
        == {f"question_type: {i}" for i in range(len(beyond))}
        != set()
    )
    assert (
        {k for k in published["test"] if "organ" in k}
        == {"organ: 0", "organ: 1"}
        == {k for k in published["baselines"]["majority"] if "organ" in k}
    )
    assert (
        published["validation"]["modality: 1"]["questions"] == 4
    )  # behind that of the test questions


def test_published_scores_of_texts(runs, tmp_path):
    target = publish(runs["seed0"], tmp_path)
    published, rows = read(target), read_jsonl(runs["seed0"] / "predictions.jsonl")
    columns = published["per_question"]
    right = [i for i, r in enumerate(rows) if r["generated_correct"]]
    for key in ("token_f1", "bleu4", "rouge_l"):
        assert len(columns[key]) == len(rows) and all(0 <= x <= 1 for x in columns[key])
        assert all(columns[key][i] == 1 for i in right)
    assert columns["generated_correct"] == [int(r["generated_correct"]) for r in rows]
    assert text_scores("left lung", "left lung") == {"token_f1": 1, "bleu4": 1, "rouge_l": 1}
    assert text_scores("left", "left lung") == {
        "token_f1": 0.6667,
        "bleu4": 0.3679,
        "rouge_l": 0.6667,
    }
    assert published["corpus_bleu4"].keys() == {"open", "closed", "overall"}
    assert columns["correct_shuffled"] == [int(r["correct_shuffled"]) for r in rows]
    assert (
        sum(
            line.startswith('  "correct": [')
            for line in target.read_text(encoding="utf-8").splitlines()
        )
        == 1
    )


def test_a_run_without_schema_is_not_published(runs, tmp_path):
    record = read(runs["seed0"] / "record.json")
    del record["schema"]
    write_json(tmp_path / "run/record.json", record)
    (tmp_path / "run/predictions.jsonl").write_bytes(
        (runs["seed0"] / "predictions.jsonl").read_bytes()
    )
    with pytest.raises(
        InputError, match="record.json: the model's configuration is not recorded. Run it again"
    ):
        publish(tmp_path / "run", tmp_path)


def copy_of(run, folder, **changes):
    "A run's record, with changes, beside its predictions."
    write_json(folder / "record.json", {**read(run / "record.json"), **changes})
    (folder / "predictions.jsonl").write_bytes((run / "predictions.jsonl").read_bytes())
    return folder


def test_predictions_of_another_run_are_not_joined(runs, tmp_path):
    run = copy_of(runs["seed0"], tmp_path / "run")
    rows = read_jsonl(run / "predictions.jsonl")
    flipped = [{**rows[0], "correct": not rows[0]["correct"]}, *rows[1:]]
    generated = {**rows[0], "generated_correct": not rows[0]["generated_correct"]}
    for others in (flipped, [generated, *rows[1:]], rows[:-1]):
        write_jsonl(run / "predictions.jsonl", others)
        with pytest.raises(InputError, match="of two runs. Let the run end, or make it again"):
            publish(run, tmp_path / "records")
    text = (runs["seed0"] / "predictions.jsonl").read_text(encoding="utf-8")
    (run / "predictions.jsonl").write_text(text[:-20], encoding="utf-8")
    with pytest.raises(InputError, match="predictions.jsonl: it was cut off"):
        publish(run, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_record_without_scores_is_not_published(runs, tmp_path):
    run = copy_of(runs["seed0"], tmp_path / "run")
    record = read(run / "record.json")
    del record["test"]
    write_json(run / "record.json", record)
    with pytest.raises(InputError, match="record.json: it has no scores of the test split. Make"):
        publish(run, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_record_of_other_settings_is_not_overwritten(runs, tmp_path):
    target = publish(runs["seed0"], tmp_path / "records")
    before, record = target.read_bytes(), read(runs["seed0"] / "record.json")
    settings = record["settings"]
    settings = {**settings, "model_options": {**settings["model_options"], "num_queries": 9}}
    other = copy_of(runs["seed0"], tmp_path / "other", settings=settings)
    message = "other settings: settings.model_options.num_queries. Move it away first"
    with pytest.raises(InputError, match=message):
        publish(other, tmp_path / "records")
    assert target.read_bytes() == before
    publish(copy_of(runs["seed0"], tmp_path / "again", seconds=1), tmp_path / "records")
    publish(other, tmp_path / "records", replace=True)
    assert read(target)["settings"]["model_options"]["num_queries"] == 9
    write_json(target, {**read(target), "schema": 1})  # one of an older schema goes
    publish(runs["seed0"], tmp_path / "records")


@pytest.mark.parametrize("text", ['{"schema": 2, "sett', "<<<<<<< HEAD", '{"schema": 2}'])
def test_a_damaged_record_gives_way_to_replace_alone(runs, tmp_path, text):
    target = publish(runs["seed0"], tmp_path / "records")
    target.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"{target.name}: .*Move it away first, or say --replace"):
        publish(runs["seed0"], tmp_path / "records")
    assert target.read_text(encoding="utf-8") == text
    publish(runs["seed0"], tmp_path / "records", replace=True)
    assert read(target)["per_question"]


@pytest.mark.parametrize("text", ['{"schema": 2, "sett', "[1]", ""])
def test_a_record_that_was_cut_off_is_named(records, tmp_path, text):
    path = tmp_path / "records/train-table-cmi_mtl-seed1.json"
    path.write_text(text, encoding="utf-8")
    (tmp_path / "page.md").write_text(f"## Made of\n\n- {path.name}, commit 1\n", encoding="utf-8")
    for look in (
        lambda: read_records(tmp_path / "records"),
        lambda: tables.trace(tmp_path / "page.md"),
    ):
        with pytest.raises(InputError, match="seed1.json: .*Fetch or publish it again"):
            look()
    path.unlink()
    with pytest.raises(InputError, match="seed1.json: .*Fetch or publish it again"):
        tables.trace(tmp_path / "page.md")


# ---------------------------------------------------------------- in tables


def test_a_copied_record_is_no_seed(records):
    (name, one), _ = records.items()
    with pytest.raises(InputError, match=f"copy.json: seed 0 again, as in {name}. Move one"):
        tables.results_table({**records, "copy.json": one})


def test_lengths_set_by_hand_are_compared(records):
    at = records["train-table-cmi_mtl-seed1.json"]["settings"]
    at["model_options"] = {**(at["model_options"] or {}), "max_answer_length": 40}
    with pytest.raises(InputError, match="settings.model_options.max_answer_length is 40"):
        tables.results_table(records)


def test_corrected_answers_are_other_test_questions(records):
    data = records["train-table-cmi_mtl-seed1.json"]["data"]
    assert re.fullmatch("[0-9a-f]{64}", data["sha256_test"])
    tables.results_table(records)
    data["sha256_test"] = "0" * 64
    with pytest.raises(InputError, match="other test questions than in"):
        tables.results_table(records)


@pytest.mark.parametrize("schema", ["2", "none", 2.5, 1])
def test_a_schema_of_any_type_is_refused(records, schema):
    records["train-table-cmi_mtl-seed1.json"]["schema"] = schema
    with pytest.raises(InputError, match="its schema is"):
        tables.results_table(records)


def test_two_recipes_have_no_line_of_the_summary(records):
    one = records["train-table-cmi_mtl-seed0.json"]
    other = {**one, "settings": {**one["settings"], "variant": "pooled", "epochs": 9}}
    with pytest.raises(
        InputError, match="train-table-pooled-seed0.json: trained in another way.*settings.epochs"
    ):
        tables.summary_table({"a": one, "b": other})


def test_the_first_kind_of_a_table_of_numbers_counts(records):
    one = records["train-table-cmi_mtl-seed0.json"]
    kinds = [i % 2 for i in range(len(one["per_question"]["qid"]))]
    one["per_question"]["question_type"] = kinds
    lines = tables.kinds_table({"cmi_mtl": [one], "usual_answer": [one]}).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 0", "| 1"]


def test_seeds_of_one_configuration_are_averaged(records):
    lines = tables.results_table(records).splitlines()
    assert (
        len(records) == 2
        and "| table | cmi_mtl, classifier |" in lines[2]
        and lines[2].endswith("| 8 | 2 |")
        and "±" in lines[2]
    )


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("model", "num_queries"), 5, "model.num_queries is 5, there 4"),
        (("model", "fusion_options", "expand"), 1, "model.fusion_options.expand is 1, there 2"),
        (
            ("model", "image_encoder", "sha256"),
            "ab",
            "model.image_encoder.sha256 is 'ab', there None",
        ),
        (("settings", "weight_decay"), 0.5, "settings.weight_decay is 0.5, there 0.01"),
        (("settings", "preset"), "compact", "settings.preset is 'compact', there 'tiny'"),
        (("processes",), 2, "processes is 2, there 1"),
        (
            ("per_question", "qid", 0),
            "another",
            "other test questions than in train-table-cmi_mtl-seed0.json",
        ),
        (("per_question", "image", 0), "another", "other test questions than in"),
        (("schema",), 3, "its schema is 3, this version reads 2"),
    ],
)
def test_seeds_that_differ_are_not_averaged(records, place, value, message):
    at = records["train-table-cmi_mtl-seed1.json"]
    at["commit"] = "another"  # alone it is no difference
    tables.results_table(records)
    for k in place[:-1]:
        at = at[k]
    at[place[-1]] = value
    with pytest.raises(
        InputError, match=re.escape("train-table-cmi_mtl-seed1.json: ") + ".*" + re.escape(message)
    ):
        tables.results_table(records)


def test_run_of_an_older_schema_is_refused(runs, tmp_path):
    record = {**read(runs["seed0"] / "record.json"), "schema": 1}
    message = "its schema is 1, this version reads 2"
    with pytest.raises(InputError, match=message):
        build.model_from_record(record)
    run, predictions = tmp_path / "run", runs["seed0"] / "predictions.jsonl"
    write_json(run / "record.json", record)
    (run / "predictions.jsonl").write_bytes(predictions.read_bytes())
    with pytest.raises(InputError, match=message):
        publish(run, tmp_path)


def test_record_without_a_validation_score(runs, tmp_path):
    "Trained on all but the test split: its line has no number there, and a run with one is no seed of it."
    published = {"a": read(publish(runs["frozen"], tmp_path))}
    assert published["a"]["validation"] is None and published["a"]["temperature"] == 1
    line = tables.results_table(published).splitlines()[2]
    assert line.endswith("| none | 8 | 1 |") and "| table | cmi_mtl, classifier |" in line
    published["b"] = read(publish(runs["seed0"], tmp_path / "other"))
    with pytest.raises(InputError, match="settings.train_on is 'train', there 'train.validation'"):
        tables.results_table(published)


def test_earlier_records_of_this_repository_are_refused():
    "Those of an older schema, or of none, lie in a folder of their own, which no table reads."
    tables.by_variant(read_records(ROOT / "figures/records"))  # holds none of them
    old = read_records(ROOT / "figures/records/earlier")
    assert old
    for name, record in old.items():
        said = f"{re.escape(name)}: (its schema is 1|the model's configuration is not recorded)"
        with pytest.raises(InputError, match=said):
            tables.by_variant({name: record})
