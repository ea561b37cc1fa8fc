"""Students cut out of their teachers: what goes, what stays, and that plain transformers reads what is left."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from lfm.core import Codec, Gradients, Inputs, Model
from lfm.core.errors import ConfigError, ModelError
from lfm.core.method import check
from lfm.core.model import Facts
from lfm.data import records as data
from lfm.distilling import lesson as lessons
from lfm.distilling import narrower
from lfm.distilling.narrower import Shares
from lfm.distilling.student import Taught, agree, formed, smaller
from lfm.models import forward, load, structure
from lfm.runs.run import LocalRun

TEXTS = [data.Text(text=line) for line in tiny.CORPUS]
DRAWN = torch.randint(0, 255, (6, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
IMAGES = [data.Image(image=x.numpy(), label=str(i)) for i, x in enumerate(DRAWN)]


def lesson_of(model: Model) -> lessons.Lesson:
    return lessons.lesson(IMAGES if model.facts.task.startswith("image") else TEXTS, model, model)


def batches(model: Model) -> list[Any]:
    lesson = lesson_of(model)
    return [lesson.collate(lesson.numbers)]


def made(path: Path, name: str, **settings: Any) -> Model:
    makers: dict[str, Callable[..., Path]] = {"causal": tiny.causal, "masked": tiny.masked, "vit": tiny.vit}
    makers |= {"conv1d": tiny.conv1d}
    return load(makers[name](path / name, **settings))


def saved(model: Model, module: Any, out: Path) -> Any:
    """The module as plain transformers reads it back."""
    out.mkdir()
    model.ask(Gradients).rewrap(module).save(out)
    return type(module).from_pretrained(out).eval()


@pytest.mark.parametrize("name", ["causal", "masked", "vit", "conv1d"])
@pytest.mark.parametrize("importance", ["activation", "magnitude"])
def test_neurons_that_do_nothing_go_first_and_nothing_changes(name: str, importance: Any, tmp_path: Path) -> None:
    """Half the neurons of every block are made to write nothing and to say nothing; half are kept: the same answers."""
    model = made(tmp_path, name)
    module = model.ask(Gradients).module()
    config: Any = module.config
    given = batches(model)
    for block in structure.blocks(module):
        inner = structure.feed_forward(module, block).inner
        idle = torch.randperm(inner, generator=torch.Generator().manual_seed(1))[: inner // 2]
        for _, layer, read, written in structure.linears(module.get_submodule(block)):
            weight: Any = layer.weight
            with torch.no_grad():
                if written == inner:  # a gate too
                    weight.index_fill_(1 if structure.transposed(layer) else 0, idle, 0.0)
                if written == inner and getattr(layer, "bias", None) is not None:
                    layer.bias[idle] = 0.0  # type: ignore[index]
                if read == inner:
                    weight.index_fill_(0 if structure.transposed(layer) else 1, idle, 0.0)
    before = forward(module, given[0]).detach()
    small = narrower.narrower(module, Shares(neurons=0.5), importance, given)
    torch.testing.assert_close(forward(small, given[0]), before, atol=1e-4, rtol=1e-4)
    again = saved(model, small, tmp_path / "out")
    torch.testing.assert_close(forward(again, given[0]), forward(small, given[0]))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in module.parameters())
    assert type(again.config) is type(config)


def test_heads_that_write_nothing_go_first_with_their_keys(tmp_path: Path) -> None:
    """A Llama of four heads over two keys: those of one key write nothing; without them the answers are the same."""
    model = made(tmp_path, "causal", num_attention_heads=4, num_key_value_heads=2)
    module = model.ask(Gradients).module()
    given = batches(model)
    config: Any = module.config
    width = config.hidden_size // 4
    for place, block in enumerate(structure.blocks(module)):
        out: Any = module.get_submodule(structure.attention_out(module, block))
        value: Any = module.get_submodule(block + ".self_attn.v_proj")
        idle = place % 2  # another in each block
        with torch.no_grad():
            out.weight[:, idle * 2 * width : (idle + 1) * 2 * width] = 0.0
            value.weight[idle * width : (idle + 1) * width] = 0.0
    before = forward(module, given[0]).detach()
    for importance in ("activation", "magnitude"):
        small = narrower.narrower(module, Shares(heads=0.5), importance, given)
        torch.testing.assert_close(forward(small, given[0]), before, atol=1e-4, rtol=1e-4)
        config = small.config
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, width)
    again = saved(model, small, tmp_path / "out")
    torch.testing.assert_close(forward(again, given[0]), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["causal", "masked", "vit"])
def test_a_width_of_everything_by_half_is_read_by_plain_transformers(name: str, tmp_path: Path) -> None:
    """Channels and heads by one share: as wide as a head is, whichever way the config says it."""
    model = made(tmp_path, name)
    module = model.ask(Gradients).module()
    given = batches(model)
    small: Any = narrower.narrower(module, Shares(0.5, 0.5, 0.5), "activation", given)
    config: Any = module.config
    assert small.config.hidden_size == config.hidden_size // 2
    assert small.config.num_attention_heads == config.num_attention_heads // 2
    assert small.config.intermediate_size == config.intermediate_size // 2
    again = saved(model, small, tmp_path / "out")
    torch.testing.assert_close(forward(again, given[0]), forward(small, given[0]))
    # what is kept is a part of what there was, in its order
    for key, tensor in small.state_dict().items():
        assert set(tensor.flatten()[:50].tolist()) <= set(module.state_dict()[key].flatten().tolist()), key


@pytest.mark.parametrize("shares", [Shares(channels=0.7), Shares(channels=0.3), Shares(0.001, 0.1, 0.01)])
def test_of_any_share_what_is_left_can_be_read_again(shares: Shares, tmp_path: Path) -> None:
    """Llama's config is only read with as many channels for each head."""
    model = made(tmp_path, "causal")
    small: Any = narrower.narrower(model.ask(Gradients).module(), shares, "magnitude", batches(model))
    assert small.config.hidden_size % small.config.num_attention_heads == 0
    assert small.config.hidden_size == pytest.approx(model.facts.width * shares.channels, abs=4)
    again = saved(model, small, tmp_path / "out")
    torch.testing.assert_close(forward(again, batches(model)[0]), forward(small, batches(model)[0]))


def test_what_a_config_cannot_say_is_refused(tmp_path: Path) -> None:
    """BERT's heads are as wide as its channels over their number: fewer heads alone would be wider ones."""
    model = made(tmp_path, "masked")
    with pytest.raises(ModelError, match="cannot say what would be left") as caught:
        narrower.narrower(model.ask(Gradients).module(), Shares(heads=0.5), "activation", batches(model))
    assert "by one share" in str(caught.value)
    model = made(tmp_path, "vit")
    with pytest.raises(ModelError, match="cannot say what would be left"):  # heads of no width at all
        narrower.narrower(model.ask(Gradients).module(), Shares(channels=0.01), "activation", batches(model))


def test_a_block_that_does_nothing_has_no_influence_and_goes(tmp_path: Path) -> None:
    model = made(tmp_path, "causal", num_hidden_layers=4)
    module = model.ask(Gradients).module()
    idle = structure.blocks(module)[1]
    with torch.no_grad():
        for name in (structure.attention_out(module, idle), structure.feed_forward(module, idle).down):
            module.get_submodule(name).weight.zero_()  # type: ignore[operator,union-attr]
    given = batches(model)
    before = forward(module, given[0]).detach()
    found = narrower.influences(module, given)
    assert found[1] == pytest.approx(0, abs=1e-6) and min(found[0], found[2], found[3]) > 1e-3
    small: Any = narrower.without_idle_blocks(module, 3, given)
    assert small.config.num_hidden_layers == 3
    torch.testing.assert_close(forward(small, given[0]), before, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="4 blocks cannot be kept of 3"):
        narrower.without_idle_blocks(small, 4, given)


def test_padding_does_not_count_for_importance(tmp_path: Path) -> None:
    model = made(tmp_path, "masked")
    module = model.ask(Gradients).module()
    (given,) = batches(model)
    more = {key: torch.cat([value, value.new_zeros(len(value), 9)], 1) for key, value in given.items()}
    assert narrower.influences(module, [more]) == pytest.approx(narrower.influences(module, [given]), rel=1e-4)


def test_what_is_asked_is_padded_otherwise_than_what_is_answered(tmp_path: Path) -> None:
    """Of an encoder-decoder: places that pad questions say nothing of the encoder, those of answers of the decoder."""
    module: Any = load(tiny.seq2seq(tmp_path / "m")).ask(Gradients).module()
    draw = torch.Generator().manual_seed(0)
    given = {name: torch.randint(3, 20, (4, 7), generator=draw) for name in ("input_ids", "labels")}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    more = {name: torch.cat([value, value.new_full((4, 9), fill[name])], 1) for name, value in given.items()}
    blocks = structure.all_blocks(module)
    sites = [("ffn_key", blocks[0]), ("ffn_key", blocks[-1])]
    bare, padded = (narrower._watched(module, sites, [batch]) for batch in (given, more))
    for own, other in zip(bare, padded, strict=True):
        assert len(own) == 28
        torch.testing.assert_close(other, own, atol=1e-4, rtol=1e-4)


def test_the_settings_make_such_a_student(tmp_path: Path) -> None:
    model = made(tmp_path, "causal", num_hidden_layers=3)
    lesson, run = lesson_of(model), LocalRun(0, tmp_path / "w")
    config = Taught(layers=2, drop="influence", neurons=0.5, channels=0.5, importance="magnitude")
    small: Any = formed(model.ask(Gradients).module(), config, run, lesson=lesson)
    assert (small.config.num_hidden_layers, small.config.hidden_size) == (2, model.facts.width // 2)
    random: Any = formed(model.ask(Gradients).module(), Taught(neurons=0.5, start="random"), run, lesson=lesson)
    assert random.config.intermediate_size == model.ask(Gradients).module().config.intermediate_size // 2  # type: ignore
    with pytest.raises(ConfigError, match="4 blocks cannot be kept of 3"):
        agree(Taught(layers=4), model)
    with pytest.raises(ConfigError, match="which parts of the student matter"):
        formed(model.ask(Gradients).module(), config, run)


@pytest.mark.parametrize(
    ("name", "role", "more"),
    [
        ("cross_tokenizer", "train", {}),
        ("on_policy", "train", {"new": 4}),
        ("samples", "", {"samples": 4, "max_tokens": 8}),
        ("text", "prompts", {"max_tokens": 4}),
    ],
)
def test_what_is_read_or_drawn_tells_which_parts_of_a_student_go(
    name: str, role: str, more: dict[str, Any], tmp_path: Path
) -> None:
    method: Any = import_module(f"lfm.methods.distill.{name}")
    model = made(tmp_path, "causal")
    inputs = Inputs({"teacher": (model,), "student": (model,)}, {role: TEXTS} if role else {})
    (tmp_path / "w").mkdir()
    config = method.Config(steps=1, neurons=0.5, **more)
    taught = method.run(config, check(f"distill.{name}", method.METHOD, inputs), LocalRun(0, tmp_path / "w"))
    modules: list[Any] = [m.ask(Gradients).module() for m in (model, taught)]
    assert modules[0].config.intermediate_size == 2 * modules[1].config.intermediate_size


def test_a_plan_knows_about_how_small_it_will_be(tmp_path: Path) -> None:
    """Within three tenths of what is made, for shares of everything."""
    model = made(tmp_path, "causal", num_hidden_layers=4)
    for config in (Taught(layers=2), Taught(neurons=0.5), Taught(neurons=0.5, heads=0.5, channels=0.5)):
        module = formed(model.ask(Gradients).module(), config, LocalRun(0, tmp_path), lesson=lesson_of(model))
        actual = sum(p.numel() for p in module.parameters())
        told = smaller(config, model.facts)
        assert told.parameters == pytest.approx(actual, rel=0.3)
        assert told.parameters < model.facts.parameters
    assert smaller(Taught(layers=1), Facts()).parameters == 0
    assert Codec in model.gives


@pytest.mark.slow
def test_a_student_cut_out_of_its_teacher_beats_new_weights_of_its_shape(tmp_path: Path) -> None:
    """Half of zoo:vit in every axis, 100 steps on 200 digits with the teacher's answers; mean accuracy of two seeds."""
    from lfm import zoo
    from lfm.core import Inputs, Logits
    from lfm.core.method import check
    from lfm.data.task import task_for
    from lfm.methods.distill import response
    from lfm.zoo.vision import images

    teacher, train, test = load(zoo.model("vit")), images("identity", "train"), images("identity", "test")
    task = task_for(test, teacher.ask(Codec), teacher.facts)
    batch = task.collate(test)
    found: dict[Any, float] = {"weights": 0.0, "random": 0.0}
    for seed in range(2):
        some = train[200 * seed : 200 * (seed + 1)]
        inputs = Inputs({"teacher": (teacher,), "student": (teacher,)}, {"train": some})
        for start in found:
            config = response.Config(
                start=start, neurons=0.5, heads=0.5, channels=0.5, steps=100, batch_size=32, lr=1e-3
            )
            given = check("distill.response", response.METHOD, inputs)
            made: Any = response.run(config, given, LocalRun(seed, tmp_path / f"{start}{seed}"))
            logits, labels = task.scored(made.ask(Logits).logits(batch), batch)
            found[start] += (logits.argmax(-1) == labels).double().mean().item() / 2
    assert found["weights"] > found["random"] + 0.02, found
