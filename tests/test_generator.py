"What the generator is taught it can write, letter for letter; what it cannot be taught is counted and said."

import json
from pathlib import Path

import made_data
import made_run
import pytest
import torch
from PIL import Image

import cmi_mtl.train as T
from cmi_mtl import batches, build
from cmi_mtl.config import PRESET_WEIGHTS, CMIMTLProcessor, tiny_config
from cmi_mtl.core import InputError, find_weights, seed_everything
from cmi_mtl.encoders import build_tokenizer
from cmi_mtl.ffae import answer_labels
from cmi_mtl.images import normalise_pixels
from cmi_mtl.model import CMIMTL
from cmi_mtl.samples import VQASample, normalise_answer
from cmi_mtl.settings import make_settings

TAUGHT = ["3.5 cm", "50%", "Sjögren syndrome", "肺部"]
TEXTS = [
    *TAUGHT,
    "sjögren syndrome",
    "<5 mm",
    "HER2+",
    "x - ray",
    "don't",
    "👩🏽‍⚕️ 🫁",
    "Sjo\u0308gren",
    "फेफड़ा",
    "ورم",
    "  two  blanks ",
    "a\nb",
    "[PAD]",
    "[END] of [SEP]",
    "</s>",
]


def made_samples(answers, image="none.png"):
    return [
        VQASample(str(i), str(image), "m", f"How is number {i}?", a, "OPEN", "train")
        for i, a in enumerate(answers)
    ]


def made_model(answers=TAUGHT, preset="tiny", image="none.png", **options):
    model_options = {**made_run.MODEL, **options} if preset == "tiny" else options
    settings = make_settings("table", preset, model_options=model_options)
    return build.build_model(settings, made_samples(answers, image))


def come_back(tokenizer, texts):
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def model():
    return made_model()


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_from_the_tokenizer_of_answers(model, text):
    assert come_back(model.processor.generator_tokenizer, [text]) == [text]


@pytest.mark.skipif(
    not all(Path(find_weights(w)).is_dir() for w in PRESET_WEIGHTS["compact"].values()),
    reason="the weights of compact are not at hand",
)
def test_compact_too_writes_what_it_is_taught():
    made = made_model(preset="compact")
    tokenizer = made.processor.generator_tokenizer
    assert come_back(tokenizer, TEXTS) == TEXTS and made.config.generator["vocab_size"] == len(
        tokenizer
    )


def test_a_taught_word_is_one_token(model):
    taught = [normalise_answer(a) for a in TAUGHT]
    lengths = [
        len(x)
        for x in model.processor.generator_tokenizer(taught, add_special_tokens=False)["input_ids"]
    ]
    assert lengths == [4, 2, 2, 1]
    assert model.config.max_answer_length == 5


def test_ids_of_model_and_tokenizer_agree(model):
    tokenizer, t5 = model.processor.generator_tokenizer, model.generator.t5
    assert t5.config.vocab_size == len(tokenizer)
    assert (
        t5.generation_config.eos_token_id
        == tokenizer.eos_token_id
        == answer_labels(tokenizer, ["liver"])[0, -1]
    )
    assert (
        t5.generation_config.decoder_start_token_id
        == t5.generation_config.pad_token_id
        == tokenizer.pad_token_id
    )


def test_the_tokenizer_travels_with_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = CMIMTL.from_pretrained(tmp_path).processor
    assert come_back(again.generator_tokenizer, TEXTS) == TEXTS
    assert again.generator_tokenizer.get_vocab() == model.processor.generator_tokenizer.get_vocab()
    assert (
        again.generator_tokenizer.eos_token_id == model.processor.generator_tokenizer.eos_token_id
    )
    assert again.tokenizer.get_vocab() == model.processor.tokenizer.get_vocab()


def test_a_model_saved_with_one_tokenizer_still_loads(tmp_path):
    "As before answers had a tokenizer of their own: the folder holds one."
    words = build_tokenizer(["is the heart enlarged", "yes", "no"])
    old = CMIMTL(tiny_config(["yes", "no"], words, **made_run.MODEL)).eval()
    old.processor = CMIMTLProcessor.for_model(old.config, words)
    old.save_pretrained(tmp_path)
    assert not (tmp_path / "generator_tokenizer").exists()
    again = CMIMTL.from_pretrained(tmp_path)
    assert again.processor.generator_tokenizer is again.processor.tokenizer
    picture = Image.new("RGB", (40, 40))
    assert again.answer(picture, "is it?").generated == old.answer(picture, "is it?").generated


def test_a_tiny_model_writes_3_5_cm_exactly(tmp_path):
    made_data.write({"a.png": made_data.picture(0, (32, 32), "PNG")}, tmp_path)
    model = made_model(image=tmp_path / "a.png", dropout=0.0)
    data = batches.QuestionSet(
        made_samples(TAUGHT, tmp_path / "a.png"),
        model,
        False,
        torch.device("cpu"),
    )
    seed_everything(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = data.batch(torch.arange(4))
    batch["pixel_values"] = normalise_pixels(batch.pop("squares"))
    for _ in range(100):
        optimiser.zero_grad()
        model.train()(**batch).loss.backward()
        optimiser.step()
    written = [model.answer(s.image, s.question).generated for s in data.samples]
    assert written == ["3.5 cm", "50%", "sjögren syndrome", "肺部"]


def test_a_long_answer_is_taught_whole_up_to_the_limit():
    words = [f"word{a}{b}" for a in "cdfgh" for b in "klmnprst"]
    assert made_model([" ".join(words)]).config.max_answer_length == 41
    assert made_model([" ".join(3 * words)]).config.max_answer_length == 64
    assert made_model(max_answer_length=7).config.max_answer_length == 7
    with pytest.raises(InputError, match="max_answer_length"):
        made_model(max_answer_length=0)


def test_what_cannot_be_taught_is_said_and_recorded(tmp_path, capsys):
    settings = made_run.settings(tmp_path, epochs=1, model_options={"max_answer_length": 2})
    table = tmp_path / "table.csv"
    table.write_text(
        table.read_text(encoding="utf-8").replace("lung", "ö 3.5 cm"), encoding="utf-8"
    )
    record = T.train(settings, tmp_path / "run")
    counts = record["data"]["generator_answers"]
    questions = [
        r.split(",") for r in table.read_text(encoding="utf-8").splitlines() if r.endswith("train")
    ]
    cut = sum(r[2] in ("left side", "ö 3.5 cm") for r in questions)
    assert 0 < cut < 36 and counts == {"answers": 36, "max_length": 2, "cut": cut, "changed": 0}
    said = f"generator: {cut} of 36 training answers take more than 2 tokens and are cut; 0 do not come back from the tokenizer"
    assert said in capsys.readouterr().out.splitlines()
    assert (
        json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))["data"]
        == record["data"]
    )


def test_answers_that_a_foreign_tokenizer_spoils_are_counted():
    from cmi_mtl.ffae import answer_coverage

    lossy = build_tokenizer(["3.5 cm", "left lung"])
    counts = answer_coverage(lossy, ["3.5 cm", "left lung", "sjögren"], 4)
    assert counts == {"answers": 3, "max_length": 4, "cut": 2, "changed": 2}
