"""A recipe's text: what it means, and where an error in it lies."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.core.errors import LfmError, RecipeError
from lfm.recipe.expand import expand
from lfm.recipe.parse import parse, read

pytestmark = pytest.mark.usefixtures("planted")

GOOD = """\
name: a chain
seed: 3
params: {facts: zoo:facts, rate: 0.01}
steps:
  - id: probe
    method: probe.lama
    models: {model: zoo:lm}
    data: {facts: "${params.facts}"}
  - id: tuned
    method: tune.lora
    models: {model: zoo:lm}
    data: {train: train.jsonl}
    set: {rate: "${params.rate}"}
    matrix: {rank: [4, 8]}
    eval: held-out.jsonl
  - id: merged
    method: reuse.linear
    models: {models: "${tuned[*]}"}
    about: merges rank ${tuned[rank=8].metrics.accuracy}
  - id: chosen
    method: augment.reason
    models: {model: "serve:${tuned[rank=4]}"}
"""


def line(text: str, part: str) -> int:
    return next(i for i, row in enumerate(text.splitlines(), 1) if part in row)


def test_steps_become_jobs_and_a_matrix_one_job_a_value() -> None:
    jobs = {job.name: job for job in expand(parse(GOOD))}
    assert list(jobs) == ["probe", "tuned[rank=4]", "tuned[rank=8]", "merged", "chosen"]
    assert jobs["tuned[rank=8]"].settings == {"rate": 0.01, "rank": 8}
    assert jobs["tuned[rank=8]"].folder == "tuned/rank=8"
    assert jobs["tuned[rank=4]"].eval == ["held-out.jsonl"]
    assert jobs["probe"].data == {"facts": "zoo:facts"}
    assert {job.seed for job in jobs.values()} == {3}


def test_references_make_needs() -> None:
    jobs = {job.name: job for job in expand(parse(GOOD))}
    assert jobs["probe"].needs == ()
    assert jobs["merged"].models == {"models": ["${tuned[rank=4]}", "${tuned[rank=8]}"]}
    assert set(jobs["merged"].needs) == {"tuned[rank=4]", "tuned[rank=8]"}
    assert jobs["chosen"].models == {"model": ["serve:${tuned[rank=4]}"]}
    assert jobs["chosen"].needs == ("tuned[rank=4]",)


def test_a_parameter_may_be_a_list_of_references() -> None:
    text = GOOD.replace("params: {", "params: {both: [a, b], ").replace('"${tuned[*]}"', '["${params.both}", c]')
    jobs = {job.name: job for job in expand(parse(text))}
    assert jobs["merged"].models == {"models": ["a", "b", "c"]}


def test_jobs_come_after_what_they_need_wherever_they_are_written() -> None:
    backwards = """\
name: backwards
steps:
  - {id: b, method: augment.reason, models: {model: "${a}"}}
  - {id: a, method: augment.reason, models: {model: zoo:lm}}
"""
    assert [job.name for job in expand(parse(backwards))] == ["a", "b"]


def test_overrides_replace_settings_parameters_and_matrices() -> None:
    single = GOOD.replace("${tuned[rank=8].metrics.accuracy}", "all").replace("tuned[rank=4]", "tuned")
    jobs = {job.name: job for job in expand(parse(single), {"tuned.rank": "2", "params.rate": "0.5"}, seed=9)}
    assert jobs["tuned"].settings == {"rate": "0.5", "rank": "2"}
    assert jobs["tuned"].seed == 9


def test_an_override_of_nothing_says_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"params\.facts.*tuned\.SETTING"):
        expand(parse(GOOD), {"tuend.rank": "2"})


BAD = {
    "an unknown key": ("    eval: held-out.jsonl", "    evall: held-out.jsonl", "did you mean 'eval'"),
    "an unknown top key": ("seed: 3", "sed: 3", "did you mean 'seed'"),
    "an unknown method": ("    method: tune.lora", "    method: tune.lra", "did you mean tune.lora"),
    "an unknown setting": ("    matrix: {rank: [4, 8]}", "    matrix: {rnak: [4, 8]}", "did you mean 'rank'"),
    "a setting out of range": ("    matrix: {rank: [4, 8]}", "    matrix: {rank: [4, 0]}", ">= 1"),
    "a setting of the wrong type": ("    set: {rate: ", "    set: {rate: fast, kind: ", "float"),
    "an unknown slot": ("    models: {models: ", "    models: {modles: ", "did you mean 'models'"),
    "an unknown data slot": ("    data: {train: train.jsonl}", "    data: {tran: train.jsonl}", "did you mean 'train'"),
    "an unknown step": ('"${tuned[*]}"', '"${tunde}"', "did you mean 'tuned'"),
    "an ambiguous step": ('"serve:${tuned[rank=4]}"', '"${tuned}"', r"${tuned[rank=4]}, ${tuned[rank=8]}"),
    "a point that is not there": ('"serve:${tuned[rank=4]}"', '"${tuned[rank=5]}"', "0 of them fit"),
    "an unknown parameter": ('"${params.rate}"', '"${params.rat}"', "facts, rate"),
    "an unreadable reference": ('"${tuned[*]}"', '"${tuned[}"', "write ${step}"),
    "a field that steps do not have": ("metrics.accuracy", "weights.accuracy", "metrics and notes"),
    "an id given twice": ("  - id: merged", "  - id: tuned", "given twice"),
    "an id that cannot be": ("  - id: merged", "  - id: Merged!", "lower-case"),
    "a key given twice": ("    about: merges", "    method: reuse.linear #", "given twice"),
    "a wrong type": ("seed: 3", "seed: three", "int"),
    "an empty matrix": ("rank: [4, 8]", "rank: []", "at least one"),
    "broken YAML": ("    models: {models: ", "    models: ]{models: ", "not YAML"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_file_and_line_and_a_way_out(name: str) -> None:
    old, new, says = BAD[name]
    assert GOOD.count(old) >= 1
    text = GOOD.replace(old, new, 1)
    with pytest.raises(RecipeError) as caught:
        expand(parse(text, "bad.yaml"))
    message = str(caught.value)
    assert message.startswith(f"bad.yaml:{GOOD[: GOOD.index(old)].count(chr(10)) + 1}:"), message
    assert says in message


def test_a_missing_role_is_named_at_its_step() -> None:
    text = GOOD.replace("    data: {train: train.jsonl}\n", "")
    with pytest.raises(RecipeError, match=rf"r\.yaml:{line(text, 'id: tuned')}: .*needs data for 'train'"):
        expand(parse(text, "r.yaml"))


def test_a_circle_is_shown() -> None:
    text = """\
name: circle
steps:
  - {id: a, method: augment.reason, models: {model: "${b}"}}
  - {id: b, method: augment.reason, models: {model: "${a}"}}
"""
    with pytest.raises(RecipeError, match=r"r\.yaml:3: steps need each other: (a → b → a|b → a → b)"):
        expand(parse(text, "r.yaml"))


def test_scientific_notation_is_a_number() -> None:
    text = GOOD.replace("rate: 0.01", "rate: 1e-3")
    assert expand(parse(text))[1].settings["rate"] == 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "steps: 1",
        "name: x",
        "name: x\nsteps: []",
        "a: &a [*a]",
        "name: !!python/object:os.system x",
        "? [a]\n: 1",
    ],
)
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        expand(parse(text))


def test_aliases_that_multiply_are_refused() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="larger than"):
        parse("\n".join(rows))


@given(st.text(alphabet="name: steps-[]{}&*!|>'\"\n #${}.ab1", max_size=80))
def test_any_text_is_a_recipe_or_one_clear_error(text: str) -> None:
    with contextlib.suppress(LfmError):
        expand(parse(text))


def test_a_file_that_is_not_there_names_what_ships() -> None:
    with pytest.raises(RecipeError, match="recipes that come with lfm"):
        read("no-such-recipe")


def test_a_recipe_of_mergekits_is_told_apart() -> None:
    with pytest.raises(RecipeError) as error:
        parse("merge_method: linear\nmodels: []\n", "mine.yml")
    assert "lfm merge mine.yml" in str(error.value)
