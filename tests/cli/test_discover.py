"""`lfm`, `lfm methods` and `lfm show`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from lfm import cli
from lfm.cli.orders import settings
from planted import METHODS

pytestmark = pytest.mark.usefixtures("planted")


HEAVY = (
    *("torch", "transformers", "peft", "numpy", "sklearn", "matplotlib"),
    *("PIL", "jinja2", "pyarrow", "httpx", "starlette", "uvicorn"),
)


def output_of(code: str) -> str:
    """What a Python process of its own prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", [["--help"], ["methods"], ["methods", "--json"]])
def test_listing_and_help_import_no_heavy_library(command: list[str]) -> None:
    code = (
        f"import sys; from lfm import cli; assert cli.run({command!r}) == 0; "
        f"print('LOADED', *[n for n in {HEAVY!r} if n in sys.modules])"
    )
    assert output_of(code).strip().splitlines()[-1] == "LOADED"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("methods", "show"):
        assert name in shown


def test_methods_lists_all_by_area(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(id in shown for id in METHODS)
    assert shown.index("tune.lora") < shown.index("probe.lama")


def test_methods_of_one_area(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["methods", "probe"]) == 0
    shown = capsys.readouterr().out
    assert "probe.lama" in shown and "tune.lora" not in shown


def test_what_works_comes_first_and_then_what_one_more_access_unlocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["methods", "--have", "text,logprobs", "--data", "few-shot"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 6 methods work with text, logprobs and few-shot data" in shown
    works, unlocked = shown.split("With one thing more")
    assert "prompt.manual" in works and "augment.reason" in works
    assert "reuse.linear" in unlocked and "+ weights" in unlocked
    assert "probe.lama" in unlocked and "+ labeled data" in unlocked
    assert "tune.lora" not in shown.split("lfm show")[0], "gradients and codec are two things"


def test_json_says_what_works_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["methods", "--have", "logprobs", "--data", "few-shot", "--json"]) == 0
    found = {entry["id"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(found) == set(METHODS)
    assert found["prompt.manual"]["works"] and not found["prompt.manual"]["missing"]
    assert found["tune.lora"]["missing"] == ["codec", "gradients"]
    assert found["probe.lama"]["missing_data"] == "labeled"
    assert found["reuse.linear"]["models"]["models"] == {
        "needs": ["weights"],
        "any_of": [],
        "min": 2,
        "max": None,
        "help": "",
    }


def test_a_slot_that_may_stay_empty_asks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["methods", "reuse", "--have", "weights", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["works"]


def test_show_has_idea_access_settings_and_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["show", "tune.lora"]) == 0
    shown = capsys.readouterr().out
    assert "ΔW = (α/r)·B·A" in shown
    assert "rank of the update" in shown and "8" in shown
    assert "lfm run tune.lora model=MODEL train=train.jsonl --out runs/lora" in shown
    assert "arxiv.org/abs/2106.09685" in shown


def test_show_json_holds_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["show", "tune.lora", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["settings"][0] == {"name": "rank", "type": "int ≥ 1", "default": 8, "help": "rank of the update"}
    assert known["models"]["model"]["needs"] == ["codec", "gradients"]


def test_schema_accepts_the_defaults_and_refuses_what_the_config_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["show", "tune.lora", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.validate({"rank": 8}, schema)
    for bad in ({"rank": 0}, {"rnk": 8}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["methods", "edits"], "did you mean 'edit'"),
        (["methods", "--have", "logit"], "did you mean 'logits'"),
        (["methods", "--data", "some"], "none, unlabeled, few-shot, labeled"),
        (["show", "tune.lra"], "did you mean tune.lora"),
        (["shw"], "'show'"),
        (["show"], "lfm show --help"),
        (["methods", "--hve", "text"], "--have"),
    ],
)
def test_a_mistake_is_one_error_with_a_way_out(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 2
    captured = capsys.readouterr()
    assert says in " ".join(captured.err.split()) and captured.out == ""
    assert captured.err.count("error") == 1 and "Traceback" not in captured.err


def test_a_run_is_no_method_and_where_it_is_told_of_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert cli.run(["show", str(tmp_path)]) == 2
    said = "".join(capsys.readouterr().err.split())
    assert "whatarunmade" in said and "report.html" in said and "lfmlineage" in said


def test_an_unexpected_exception_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(id: str) -> None:
        raise RuntimeError("a bug\nwith details")

    monkeypatch.setattr("lfm.core.registry.get", broken)
    assert cli.run(["show", "tune.lora"]) == cli.UNEXPECTED
    shown = capsys.readouterr().err
    assert (
        "unexpected RuntimeError: a bug\n" in shown and "--debug" in shown and "details\n" not in shown.split("run")[0]
    )
    with pytest.raises(RuntimeError):
        cli.run(["show", "tune.lora", "--debug"])


def test_a_number_may_begin_with_its_point() -> None:
    said = settings(["alpha=.5", "shift=-.25e-3", "ends=...", "path=.5x", "beta=1.5"])
    assert said == {"alpha": "0.5", "shift": "-0.25e-3", "ends": "...", "path": ".5x", "beta": "1.5"}


def test_a_setting_that_begins_with_a_gap_is_a_template_and_no_json() -> None:
    said = settings(["template={text} : {mask}", 'words={"good": ["fine"]}', "sizes=[1, 2]"])
    assert said == {"template": "{text} : {mask}", "words": {"good": ["fine"]}, "sizes": [1, 2]}
