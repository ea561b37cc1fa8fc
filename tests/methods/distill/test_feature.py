"""What is inside a teacher: the papers' distances in closed form, and a student that comes to be like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tiny
from case import Case
from lfm.core import Codec, Features, Gradients, Inputs, Logits, Model
from lfm.core.errors import AccessError, MismatchError, ModelError
from lfm.core.method import check
from lfm.data import records as data
from lfm.data.files import write
from lfm.data.task import task_for
from lfm.distilling import inside
from lfm.methods.distill import feature
from lfm.models import load, structure
from lfm.runs.run import LocalRun
from teaching import means

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]
TEXTS = [data.Text(text=line) for line in tiny.CORPUS]
KINDS = ("fitnets", "attention", "ffa", "affinity")


def distill(teacher: Model, student: Model, records: Any, work: Path, seed: int = 0, **settings: Any) -> Any:
    inputs = Inputs({"teacher": (teacher,), "student": (student,)}, {"train": records})
    config = feature.Config(**({"steps": 20, "lr": 5e-3, "batch_size": 4} | settings))
    feature.agree(config, inputs)
    run = LocalRun(seed, work)
    made = feature.run(config, check("distill.feature", feature.METHOD, inputs), run)
    assert isinstance(made, Model)
    return made, run


def case(here: Path) -> Case:
    tiny.classifier(here / "big", hidden_size=48)
    tiny.classifier(here / "small", seed=1)
    write(LABELS, here / "texts.jsonl")
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 0.0}
    return Case({"teacher": ("big",), "student": ("small",)}, {"train": "texts.jsonl"}, settings)


@pytest.mark.parametrize("real", [400, 1000, 3100, 6400])
def test_of_sounds_the_places_that_count_are_those_of_samples_that_are_there(real: int, tmp_path: Path) -> None:
    """Within one of those that the model itself takes for sound."""
    module: Any = load(tiny.hearer(tmp_path / "hears")).ask(Gradients).module()
    mask = torch.zeros(2, 6400, dtype=torch.long)
    mask[0], mask[1, :real] = 1, 1
    places = int(module._get_feat_extract_output_lengths(6400))
    own = module._get_feature_vector_attention_mask(places, mask).sum(1)
    found = inside.counted({"attention_mask": mask}, places, "audio-classification")
    assert found is not None and found[0].all()
    assert abs(int(found[1].sum()) - int(own[1])) <= 1 and not found[1, int(own[1]) + 1 :].any()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        still(tiny.classifier(root / f"classifier{seed}", seed=seed))
        still(tiny.causal(root / f"causal{seed}", seed=seed, num_hidden_layers=3 - seed))
    return root


def still(directory: Path) -> Path:
    """The same model without dropout."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: 0.0 for key in config if key.endswith(("dropout", "dropout_prob"))}))
    return directory


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_fast_affinity_is_the_affinity_on_average() -> None:
    """Over 4000 draws of one direction its mean is within five standard errors; one draw is not."""
    s, t = maps(2, 9, 5), maps(2, 9, 7, seed=1)
    exact = inside.affinity(s, t)
    torch.manual_seed(0)
    drawn = torch.stack([inside.fast_affinity(s, t, 1) for _ in range(4000)])
    error = drawn.std() / len(drawn) ** 0.5
    assert (drawn.mean() - exact).abs() < 5 * error < 0.1 * exact
    assert (drawn[0] - exact).abs() > 5 * error


def test_more_directions_err_less_as_one_over_their_root() -> None:
    s, t = maps(1, 12, 6), maps(1, 12, 6, seed=1)
    torch.manual_seed(0)
    spread = [torch.stack([inside.fast_affinity(s, t, k) for _ in range(600)]).std().item() for k in (1, 16)]
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.2)


def test_twice_the_positions_are_twice_the_fast_arithmetic_and_four_times_the_exact() -> None:
    """Multiplications of the loss and its gradient, counted; benchmarks/affinity.py has time and memory too."""
    from torch.utils.flop_counter import FlopCounterMode

    def operations(places: int, fast: bool) -> int:
        s, t = maps(1, places, 16).requires_grad_(True), maps(1, places, 16, seed=1)
        with FlopCounterMode(display=False) as counter:
            (inside.fast_affinity(s, t, 4) if fast else inside.affinity(s, t)).backward()
        return counter.get_total_flops()

    assert operations(256, True) == 2 * operations(128, True)
    assert operations(256, False) == 4 * operations(128, False)
    assert operations(256, False) > 30 * operations(256, True)


def test_the_affinity_written_out_pair_by_pair() -> None:
    s, t = maps(2, 4, 3), maps(2, 4, 5, seed=1)
    total = 0.0
    for b in range(2):
        for i in range(4):
            for j in range(4):
                one = F.cosine_similarity(s[b, i], s[b, j], dim=0)
                other = F.cosine_similarity(t[b, i], t[b, j], dim=0)
                total += float(one - other) ** 2 / 16 / 2
    assert inside.affinity(s, t).item() == pytest.approx(total, rel=1e-5)


def test_turned_features_have_the_same_affinity_and_attention_of_any_scale() -> None:
    """Cosines know no rotation of the channels; normalised attention no scale."""
    x = maps(2, 6, 8)
    turn = torch.linalg.qr(maps(8, 8, seed=1)).Q
    assert inside.affinity(x @ turn, x).item() == pytest.approx(0, abs=1e-10)
    assert inside.fast_affinity(x @ turn, x, 4).item() == pytest.approx(0, abs=1e-10)
    assert inside.attention(3 * x @ turn, x).item() == pytest.approx(0, abs=1e-10)
    assert inside.hint(x, x).item() == 0 and inside.hint(0 * x, x).item() == pytest.approx(1)


def test_attention_at_one_place_against_another_is_two() -> None:
    one, other = torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)
    one[0, 1], other[0, 2] = 5.0, 7.0
    assert inside.attention(one, other).item() == pytest.approx(2)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_counts_for_nothing(kind: Any) -> None:
    """What stands at places that the mask leaves out changes no distance; it is that of the other places alone."""
    s, t = maps(2, 5, 4), maps(2, 5, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2).bool()

    def apart(x: torch.Tensor, mask: torch.Tensor | None, places: int) -> float:
        torch.manual_seed(0)
        if kind == "ffa":  # directions are drawn for all places: those of places left out meet zeros
            return inside.fast_affinity(x[:, :places], t[:, :places], 4000, mask).item()
        config = feature.Config(kind=kind)
        return feature._apart(config, x[:, :places], t[:, :places], mask).item()

    wild = s.clone()
    wild[:, 3:] = 100.0
    assert apart(wild, mask, 5) == pytest.approx(apart(s, mask, 5), rel=1e-5)
    assert apart(s, mask, 5) == pytest.approx(apart(s, None, 3), rel=1e-5 if kind != "ffa" else 0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["classifier", "causal"])
def test_the_first_loss_is_the_papers_on_both_models_features(name: str, kind: Any, root: Path, tmp_path: Path) -> None:
    """(1 − α) CE + α T² KL + β d, recomputed from what the two models give when they are asked."""
    records = LABELS[:4] if name == "classifier" else TEXTS[:4]
    teacher, student = load(root / f"{name}0"), load(root / f"{name}1")
    settings = {"temperature": 3.0, "alpha": 0.7, "beta": 5.0, "places": 1, "precision": "fp32", "draws": 20000}
    _, run = distill(teacher, student, records, tmp_path, steps=1, kind=kind, **settings)
    task = task_for(records, student.ask(Codec), student.facts)
    batch = task.collate(records)
    s, t = (model.ask(Features).features(batch, [("hidden", -1)])[0] for model in (student, teacher))
    mask = batch["attention_mask"].bool()
    if kind == "fitnets":  # of one width: the hint begins as the identity
        apart = float((s - t)[mask].square().sum() / t[mask].square().sum())
    elif kind == "attention":
        q = [F.normalize(x.square().mean(-1) * mask, dim=-1) for x in (s, t)]
        apart = float((q[0] - q[1]).square().sum(-1).mean())
    else:
        apart = 0.0
        for row in range(4):
            own = [F.normalize(x[row, mask[row]], dim=-1) for x in (s, t)]
            apart += float((own[0] @ own[0].T - own[1] @ own[1].T).square().mean()) / 4
    (own, labels), (theirs, _) = (task.scored(m.ask(Logits).logits(batch), batch) for m in (student, teacher))
    p, q = (theirs / 3).log_softmax(-1), (own / 3).log_softmax(-1)
    answers = 0.3 * F.cross_entropy(own, labels) + 0.7 * 9 * F.kl_div(q, p, reduction="batchmean", log_target=True)
    close = 0.03 if kind == "ffa" else 1e-4
    assert run.notes["loss_before"] - float(answers) == pytest.approx(5 * apart, rel=close, abs=1e-6)


def test_the_loss_inside_is_the_mean_over_places(root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "causal0"), load(root / "causal1")
    losses = [
        distill(teacher, student, TEXTS[:4], tmp_path / str(beta), steps=1, kind="attention", places=2, beta=beta)[1]
        for beta in (0.0, 4.0)
    ]
    batch = student.ask(Codec).texts([r.text for r in TEXTS[:4]])
    mask = batch["attention_mask"].bool()
    sites = inside.paired(student.ask(Gradients).module(), teacher, 2)
    seen = [m.ask(Features).features(batch, some) for m, some in zip((student, teacher), sites)]
    apart = [float(inside.attention(s, t, mask)) for s, t in zip(*seen)]
    assert len(apart) == 2 and min(apart) > 0
    gained = losses[1].notes["loss_before"] - losses[0].notes["loss_before"]
    assert gained == pytest.approx(4 * sum(apart) / 2, rel=1e-3)


def test_a_teacher_inside_itself_is_no_distance_away(root: Path, tmp_path: Path) -> None:
    model = load(root / "causal0")
    for kind in KINDS:
        _, run = distill(model, model, TEXTS, tmp_path / kind, steps=1, alpha=1.0, kind=kind, places=0)
        assert run.notes["loss_before"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_comes_to_be_like_its_teacher_inside(kind: Any, root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "causal0"), load(root / "causal1")
    made, _ = distill(teacher, student, TEXTS, tmp_path, steps=60, kind=kind, beta=20.0, temperature=1.0)
    batch = student.ask(Codec).texts([r.text for r in TEXTS])

    def apart(model: Model) -> float:
        s, t = (m.ask(Features).features(batch, [("hidden", -1)])[0] for m in (model, teacher))
        mask = inside.counted(batch, s.shape[1], "causal-lm")
        return float(inside.attention(s, t, mask) if kind == "attention" else inside.affinity(s, t, mask))

    assert apart(made) < 0.6 * apart(student)
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    assert load(tmp_path / "out").digest == made.digest


def test_hints_are_dropped_at_the_end(root: Path, tmp_path: Path) -> None:
    wide = load(still(tiny.causal(tmp_path / "wide", hidden_size=48, num_attention_heads=4)))
    student = load(root / "causal1")
    made, run = distill(wide, student, TEXTS, tmp_path / "w", places=1)
    own = student.ask(Gradients).module()
    assert made.ask(Gradients).module().state_dict().keys() == own.state_dict().keys()
    width = student.facts.width
    assert run.notes["trained"] == sum(p.numel() for p in own.parameters()) + 48 * width + 48


def test_places_are_the_ends_of_equal_parts_of_the_depth() -> None:
    assert inside.depths(2, 6) == [2, 5] and inside.depths(1, 5) == [4] and inside.depths(3, 9) == [2, 5, 8]
    assert inside.depths(3, 3) == [0, 1, 2]
    assert inside.depths(2, 5) == [2, 4] and inside.depths(3, 4) == [1, 2, 3]  # a part that ends within a block has it


def vision(path: Path, seed: int, **shape: Any) -> Path:
    """A ResNet of four stages over the images of tiny's ViT."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    settings = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"} | shape
    torch.manual_seed(seed)
    config = ResNetConfig(
        **settings, id2label=dict(enumerate(tiny.DIGITS)), label2id={n: i for i, n in enumerate(tiny.DIGITS)}
    )
    ResNetForImageClassification(config).eval().save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def images(count: int = 8) -> list[data.Image]:
    drawn = torch.randint(0, 255, (count, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return [data.Image(image=x.numpy(), label=str(i % 10)) for i, x in enumerate(drawn)]


def test_a_convolutional_network_has_stages_and_its_maps_have_pixels(tmp_path: Path) -> None:
    model = load(vision(tmp_path / "conv", 0))
    module = model.ask(Gradients).module()
    assert structure.levels(module) == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    batch = model.ask(Codec).images([r.image for r in images(2)])
    seen = inside.mapped(model.ask(Features).features(batch, [("level", -1)])[0], 2)
    assert seen.shape[0] == 2 and seen.shape[2] == 12 and seen.shape[1] > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_vit_teaches_a_convolutional_network_inside(kind: Any, tmp_path: Path) -> None:
    """Patches and pixels are laid over one another; what the two then differ by falls."""
    teacher = load(tiny.vit(tmp_path / "vit", patch_size=2))
    student = load(vision(tmp_path / "conv", 1))
    _, run = distill(teacher, student, images(), tmp_path / "w", steps=12, batch_size=8, kind=kind, beta=10.0)
    assert run.notes["loss_after"] < run.notes["loss_before"]


def test_the_same_maps_averaged_down_are_the_same() -> None:
    """A map of constant quarters loses nothing when it is averaged to four places, and class tokens go."""
    small = maps(1, 4, 3)
    large = small.transpose(1, 2).unflatten(2, (2, 2)).repeat_interleave(3, 2).repeat_interleave(3, 3)
    with_class = torch.cat([maps(1, 1, 3, seed=1), inside.mapped(large, 1)], 1)
    s, t = inside.matched(with_class, small, "image-classification")
    torch.testing.assert_close(s, t)
    with pytest.raises(MismatchError, match="no square"):
        inside.matched(maps(1, 8, 3), small, "image-classification")
    with pytest.raises(MismatchError, match="8 places where its teacher sees 4"):
        inside.matched(maps(1, 8, 3), small, "text-classification")


def test_what_cannot_go_together_is_said_first(root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "causal0"), load(root / "causal1")
    silent = teacher.only((Features, Codec))
    with pytest.raises(AccessError, match="does not give logits"):
        distill(silent, student, TEXTS, tmp_path / "a")
    made, _ = distill(silent, student, TEXTS, tmp_path / "b", alpha=0.0, steps=2)
    assert made.facts.layers == student.facts.layers
    with pytest.raises(ModelError, match="there are no 3 places"):
        distill(teacher, student, TEXTS, tmp_path / "c", places=3)


@pytest.mark.slow
def test_taught_inside_and_by_answers_beats_the_student_alone(tmp_path: Path) -> None:
    """A one-block ViT on 200 of the zoo's digits, taught by zoo:vit; mean accuracy of three seeds, equal steps.

    Not shown, since it is not so here: that the inside adds to what the answers alone give (docs/distilling.md).
    """
    from lfm import zoo
    from lfm.zoo.vision import images as digits

    teacher, train, test = load(zoo.model("vit")), digits("identity", "train"), digits("identity", "test")

    def accuracy(model: Model) -> float:
        task = task_for(test, model.ask(Codec), model.facts)
        batch = task.collate(test)
        logits, labels = task.scored(model.ask(Logits).logits(batch), batch)
        return (logits.argmax(-1) == labels).double().mean().item()

    scores: dict[str, list[float]] = {"alone": [], "taught": []}
    for seed in range(3):
        shape: dict[str, Any] = {"num_hidden_layers": 1, "initializer_range": 0.05}
        student = load(tiny.vit(tmp_path / f"s{seed}", seed=10 + seed, **shape))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        some = [train[i] for i in order[:200]]
        how = {"steps": 250, "batch_size": 32, "lr": 3e-3, "places": 1, "kind": "attention"}
        for name, other in (("alone", {"alpha": 0.0, "beta": 0.0}), ("taught", {})):
            made, _ = distill(teacher, student, some, tmp_path / f"{name}{seed}", seed, **how, **other)
            scores[name].append(accuracy(made))
    mean = means(scores)
    assert mean["taught"] > mean["alone"] + 0.005, scores
