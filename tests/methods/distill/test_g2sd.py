"""Generic, then specific: what is hidden, what is learned of it, and that the paper's gain shows where it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tiny
from case import Case
from lfm.core import Codec, Features, Gradients, Inputs, Logits, Model
from lfm.core.errors import MismatchError, ModelError
from lfm.core.method import check
from lfm.data import records as data
from lfm.data.files import write
from lfm.distilling import unmasking
from lfm.methods.distill import g2sd
from lfm.models import forward, load, structure
from lfm.runs.run import LocalRun

DRAWN = torch.randint(0, 255, (12, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
IMAGES = [data.Image(image=x.numpy(), label=str(i % 10)) for i, x in enumerate(DRAWN)]


def distill(models: dict[str, Model], records: Any, work: Path, seed: int = 0, **settings: Any) -> Any:
    inputs = Inputs({role: (model,) for role, model in models.items()}, {"train": records})
    config = g2sd.Config(**({"steps": 10, "lr": 3e-3, "batch_size": 12} | settings))
    g2sd.agree(config, inputs)
    run = LocalRun(seed, work)
    made = g2sd.run(config, check("distill.g2sd", g2sd.METHOD, inputs), run)
    assert isinstance(made, Model)
    return made, run


def autoencoder(path: Path, seed: int = 0, **settings: Any) -> Path:
    """A ViTMAE over the images of tiny's ViT, of 16 patches."""
    from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

    shape: dict[str, Any] = {
        "image_size": 8,
        "patch_size": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    shape |= {"num_attention_heads": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2}
    shape |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
    torch.manual_seed(seed)
    ViTMAEForPreTraining(ViTMAEConfig(**(shape | settings))).eval().save_pretrained(path)
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(path)
    return path


def case(here: Path) -> Case:
    tiny.vit(here / "big", patch_size=2, hidden_size=48)
    tiny.vit(here / "small", patch_size=2, seed=1)
    write(IMAGES, here / "images.jsonl")
    settings = {"steps": 4, "generic_steps": 4, "batch_size": 6, "checkpoint_every": 0.0}
    return Case({"teacher": ("big",), "student": ("small",)}, {"train": "images.jsonl"}, settings)


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("vits")
    return {
        "teacher": load(tiny.vit(root / "t", patch_size=2, hidden_size=48)),
        "student": load(tiny.vit(root / "s", patch_size=2, seed=1)),
    }


def test_what_is_seen_and_where_is_the_autoencoders_own_order(tmp_path: Path) -> None:
    module: Any = load(autoencoder(tmp_path / "mae")).ask(Gradients).module()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    seen, where = unmasking.order(noise, 0.75)
    out = module(pixel_values=torch.randn(3, 3, 8, 8), noise=noise)
    assert torch.equal(out.ids_restore, where)
    hidden = torch.ones(3, 16).scatter(1, seen, 0.0)
    assert torch.equal(out.mask, hidden) and seen.shape == (3, 4)


def test_blocks_that_see_every_patch_answer_as_ever_and_hidden_ones_tell_nothing(vits: dict[str, Model]) -> None:
    module = vits["student"].ask(Gradients).module()
    batch = dict(vits["student"].ask(Codec).images([r.image for r in IMAGES[:3]]))
    plain = forward(module, batch)
    every = torch.stack([torch.randperm(16) for _ in range(3)])
    with unmasking.seeing(module, every, 1):  # in any order: positions are in them
        torch.testing.assert_close(forward(module, batch), plain, atol=1e-5, rtol=1e-5)
    some = torch.tensor([[0, 1, 4, 5]] * 3)  # the upper left quarter
    changed = batch["pixel_values"].clone()
    changed[:, :, 4:] += 1.0
    changed[:, :, :, 4:] += 1.0
    with unmasking.seeing(module, some, 1):
        told = [forward(module, {"pixel_values": x}) for x in (batch["pixel_values"], changed)]
    torch.testing.assert_close(*told)
    assert not torch.allclose(forward(module, {"pixel_values": changed}), plain)
    torch.testing.assert_close(forward(module, batch), plain)


def test_the_decoder_puts_what_was_seen_where_it_was() -> None:
    """With no blocks and a linear end each patch that was seen is told at its own place, all others alike."""
    torch.manual_seed(0)
    head: Any = unmasking.decoder(8, 5, 6, 1, inner=8, depth=0)
    torch.nn.init.zeros_(head.positions)
    noise = torch.rand(2, 6)
    seen, where = unmasking.order(noise, 0.5)
    x = torch.randn(2, 1 + 3, 8)
    told = head(x, where)
    alone = head.tell(head.read(head.norm(x)))
    torch.testing.assert_close(told[:, :1], alone[:, :1])
    torch.testing.assert_close(told[:, 1:].gather(1, seen[..., None].expand(-1, -1, 5)), alone[:, 1:])
    blank = head.tell(head.hidden)[0, 0]
    hidden = noise.argsort(1)[:, 3:]
    for row in range(2):
        torch.testing.assert_close(told[row, 1:][hidden[row]], blank.expand(3, 5))


def test_the_loss_written_out() -> None:
    """Quadratic under 2, linear above: (d² / 4, d − 1), of a target whose channels have mean 0 and variance 1."""
    told, target = 3 * torch.randn(2, 5, 7), 4 + 9 * torch.randn(2, 5, 7)
    normal = (target - target.mean(-1, keepdim=True)) / (target.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    d = (told - normal).abs()
    expected = torch.where(d < 2, d.square() / 4, d - 1).mean()
    torch.testing.assert_close(unmasking.apart(told, target, 4), expected)
    patches = torch.where(d < 2, d.square() / 4, d - 1)[:, 1:].mean()
    torch.testing.assert_close(unmasking.apart(told, target[:, 1:], 4), patches)


def test_the_first_losses_are_the_papers_two(vits: dict[str, Model], tmp_path: Path) -> None:
    """A decoder that says nothing is as far as the target is from nought; then the answers' loss of response."""
    _, run = distill(vits, IMAGES, tmp_path, steps=1, lr=1e-12, precision="fp32", temperature=3.0, alpha=0.5)
    batch = vits["student"].ask(Codec).images([r.image for r in IMAGES])
    s, t = (vits[role].ask(Logits).logits(batch) for role in ("student", "teacher"))
    labels = torch.tensor([int(r.label) for r in IMAGES])
    soft = F.kl_div((s / 3).log_softmax(-1), (t / 3).log_softmax(-1), reduction="batchmean", log_target=True)
    expected = 0.5 * F.cross_entropy(s, labels) + 0.5 * 9 * soft
    assert run.notes["loss_before"] == pytest.approx(float(expected), rel=1e-3)
    hidden = vits["teacher"].ask(Features).features(batch, [("hidden", -1)])[0]
    nothing = unmasking.apart(torch.zeros_like(hidden), hidden, 16)
    assert run.notes["generic_before"] == pytest.approx(float(nothing), rel=0.3)


@pytest.mark.parametrize("generic", [False, True])
def test_the_first_stage_comes_to_tell_what_is_hidden(generic: bool, vits: dict[str, Model], tmp_path: Path) -> None:
    models = dict(vits)
    if generic:
        models["generic"] = load(autoencoder(tmp_path / "mae"))
    made, run = distill(models, IMAGES, tmp_path / "w", generic_steps=60, steps=2)
    assert run.notes["generic_after"] < 0.7 * run.notes["generic_before"]
    assert (
        made.ask(Gradients).module().state_dict().keys() == vits["student"].ask(Gradients).module().state_dict().keys()
    )
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    assert load(tmp_path / "out").digest == made.digest


def test_an_autoencoders_target_is_its_decoders_block(tmp_path: Path) -> None:
    """Recomputed from its own parts: the second block's output, before the last norm, of the patches left to it."""
    module: Any = load(autoencoder(tmp_path / "mae")).ask(Gradients).module()
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    pixels = torch.randn(2, 3, 8, 8)
    target = g2sd._autoencoder(module, 0.5)(pixels, noise)
    assert target.shape == (2, 17, 16)
    out = module(pixel_values=pixels, noise=noise)
    assert int(out.mask.sum()) == 16
    told = module.decoder.decoder_pred(module.decoder.decoder_norm(target))[:, 1:]
    torch.testing.assert_close(told, out.logits)


def test_what_cannot_go_together_is_refused(vits: dict[str, Model], tmp_path: Path) -> None:
    coarse = load(tiny.vit(tmp_path / "coarse"))
    with pytest.raises(MismatchError, match="4 patches where its teacher sees 16"):
        distill(vits | {"student": coarse}, IMAGES, tmp_path / "a")
    with pytest.raises(ModelError, match="no masked autoencoder"):
        distill(vits | {"generic": coarse}, IMAGES, tmp_path / "b")
    with pytest.raises(MismatchError, match="does not classify images"):
        distill(vits | {"student": load(tiny.causal(tmp_path / "lm"))}, IMAGES, tmp_path / "c")
    assert structure.blocks(coarse.ask(Gradients).module())
