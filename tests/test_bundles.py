"""Questions about one picture share its encoding: same answers, same losses, every question once an epoch."""

from types import SimpleNamespace

import pytest
import torch

from cmi_mtl.config import example_batch, tiny_config
from cmi_mtl.core import seed_everything
from cmi_mtl.encoders import build_tokenizer
from cmi_mtl.loop import epoch_batches
from cmi_mtl.model import CMIMTL


@pytest.mark.parametrize("fvta", [True, False])
def test_a_picture_read_once_gives_what_repeating_it_gives(fvta):
    seed_everything(0)
    words = build_tokenizer(["is the heart enlarged", "yes", "no"])
    model = CMIMTL(tiny_config(["yes", "no"], words, fvta=fvta)).eval()
    batch, index = example_batch(model.config, 6), torch.tensor([1, 0, 1, 1, 0, 0])
    pictures = batch.pop("pixel_values")[:2]
    batch["image_ids"] = index
    shared = model(pixel_values=pictures, image_index=index, **batch)
    repeated = model(pixel_values=pictures[index], **batch)
    assert torch.allclose(shared.logits, repeated.logits, atol=1e-5)
    assert torch.allclose(shared.loss, repeated.loss, atol=1e-5)
    assert not torch.allclose(
        shared.logits, model(pixel_values=pictures[1 - index], **batch).logits, atol=1e-5
    )


@pytest.mark.parametrize("bundle", [1, 4])
def test_an_epoch_has_every_question_once_and_bundles_side_by_side(bundle):
    images = torch.arange(12).repeat_interleave(7)
    rows = torch.arange(84)[torch.arange(84) % 5 > 0]
    run = SimpleNamespace(
        rows=rows,
        steps=5,
        data=SimpleNamespace(image_ids=images),
        settings=SimpleNamespace(seed=3, questions_per_image=bundle),
    )
    first, second = (torch.cat(epoch_batches(run, epoch)) for epoch in (1, 2))
    assert sorted(first.tolist()) == rows.tolist() and not torch.equal(first, second)
    assert torch.equal(first, torch.cat(epoch_batches(run, 1)))
    runs_of_one_image = 1 + int((images[first][1:] != images[first][:-1]).sum())
    assert runs_of_one_image <= 24 if bundle == 4 else runs_of_one_image > 40
