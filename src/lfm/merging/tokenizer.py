"""The result's tokenizer and chat template: a model's, or the union of several, saved as transformers saves them."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm.core.errors import ConfigError, MismatchError, ModelError
from lfm.core.heavy import transformers
from lfm.merging.recipe import Tokenizer
from lfm.merging.vocabulary import Vocabulary

Files = Mapping[str, Path]

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
OF_TOKENIZERS = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template", "spiece")

TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
CLOSE = "{% if add_generation_prompt %}{{ OPEN }}{% endif %}"
TEMPLATES: Mapping[str, str] = {
    "chatml": "{% for m in messages %}" + TURN + "{% endfor %}" + CLOSE.replace("OPEN", "'<|im_start|>assistant\\n'"),
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    + CLOSE.replace("OPEN", "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'"),
    "mistral": "{{ bos_token }}{% set told = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set told.system = m['content'] + '\\n\\n' %}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + (told.system if loop.last else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    "alpaca": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] | trim + "
    "'\\n\\n' }}{% elif m['role'] == 'assistant' %}{{ '### Response:\\n' + m['content'] | trim + '\\n\\n' }}"
    "{% else %}{{ m['content'] | trim + '\\n\\n' }}{% endif %}{% endfor %}"
    + CLOSE.replace("OPEN", "'### Response:\\n'"),
    "exaone": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}"
    "{% endif %}{{ '[|' + m['role'] + '|]' + m['content'] + ('\\n' if m['role'] == 'user' else '[|endofturn|]\\n') }}"
    "{% endfor %}" + CLOSE.replace("OPEN", "'[|assistant|]'"),
}
"""What mergekit's names of templates stand for, written down from the formats."""


def opened(files: Files, ref: str) -> Any:
    """A model's tokenizer. ModelError where it has none that transformers can read."""
    from lfm.models.quiet import quiet

    homes = {path.parent for name, path in files.items() if name.startswith(OF_TOKENIZERS)}
    if len(homes) != 1:
        raise ModelError(f"{ref} has no tokenizer", fix="the recipe's tokenizer is made of those of all its models")
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(str(homes.pop()), local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read the tokenizer of {ref}", why=str(error).splitlines()[0]) from None


def made(
    wanted: Tokenizer, base: str, files: Mapping[str, Files], lengths: Mapping[str, int], out: Path
) -> tuple[Vocabulary, Files]:
    """The result's vocabulary, and its tokenizer's files, written into `out`. lengths: rows of each model's table."""
    tokenizers = {ref: opened(files[ref], ref) for ref in files}
    own = {ref: _used(tokenizer, lengths[ref]) for ref, tokenizer in tokenizers.items()}
    source = base if wanted.source in ("base", "union") else wanted.source
    result = opened(files[source], source)
    unused = {token for token in result.get_vocab() if token not in own[source]}
    if unused:
        result = _without(result, unused, files[source], source, out.with_name("stripped"))
    if wanted.source == "union":
        _join(result, [(tokenizers[ref], own[ref]) for ref in files if ref != base])
    known = set(result.get_vocab())
    result.add_tokens([token for token in wanted.tokens if token not in known])
    vocabulary = dict(sorted(result.get_vocab().items(), key=lambda item: item[1]))
    rows = max(vocabulary.values()) + 1
    multiple = wanted.pad_to_multiple_of or 1
    shutil.rmtree(out, ignore_errors=True)
    result.save_pretrained(str(out))
    saved = {path.name: path for path in sorted(out.iterdir()) if path.is_file()}
    return Vocabulary(vocabulary, own, wanted.tokens, -(-rows // multiple) * multiple, base), saved


def _used(tokenizer: Any, rows: int) -> dict[str, int]:
    """The tokens that a model's table has rows for."""
    return {token: i for token, i in tokenizer.get_vocab().items() if i < rows}


def _join(result: Any, others: Sequence[tuple[Any, Mapping[str, int]]]) -> None:
    """Adds every token that the others have, in the order of their numbers; special ones as they are there."""
    plain: dict[str, None] = {}
    added: dict[str, Any] = {}
    for tokenizer, own in others:
        special = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        for token in sorted(own, key=own.__getitem__):
            if token in special:
                added.setdefault(token, special[token])
            else:
                plain.setdefault(token)
    known = set(result.get_vocab())
    result.add_tokens([token for token in plain if token not in added and token not in known])
    result.add_tokens([token for name, token in added.items() if name not in known])


def _without(tokenizer: Any, unused: set[str], files: Files, ref: str, out: Path) -> Any:
    """The tokenizer without tokens that its model has no rows for. MismatchError for one that is not BPE."""
    told: dict[str, Any] = {"model": {}}
    if tokenizer.is_fast:
        told = json.loads(tokenizer.backend_tokenizer.to_str())
    if told["model"].get("type") != "BPE":
        raise MismatchError(
            f"{ref} has {len(unused)} tokens without a row in its table, {min(unused)!r} among them",
            why="they can be taken out of BPE tokenizers only",
        )
    told["added_tokens"] = [token for token in told["added_tokens"] if token["content"] not in unused]
    told["model"]["vocab"] = {token: i for token, i in told["model"]["vocab"].items() if token not in unused}
    pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in told["model"]["merges"]]
    told["model"]["merges"] = [m for m, pair in pairs if not unused & {*pair, "".join(pair)}]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, path in files.items():
        if name.startswith(OF_TOKENIZERS):
            shutil.copyfile(path, out / name)
    (out / "tokenizer.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    return opened({path.name: path for path in out.iterdir()}, ref)


def with_ids(config: dict[str, Any], source: Mapping[str, Any]) -> None:
    """The special tokens' numbers are those of the model whose tokenizer it is."""
    for place, section in {"": config, **{k: v for k, v in config.items() if isinstance(v, dict)}}.items():
        theirs = source.get(place, {}) if place else source
        section |= {key: theirs[key] for key in IDS if key in theirs and (not place or key in section)}


def template(asked: str, files: Mapping[str, Files]) -> str:
    """The chat template that a recipe asks for: a text of its own, a known name, or the one most models have (auto)."""
    if asked == "auto":
        have = [text.strip() for own in files.values() if (text := _template_of(own))]
        if not have:
            raise ConfigError("chat_template is auto, but no model of the recipe has one")
        return Counter(have).most_common(1)[0][0]
    if asked in TEMPLATES:
        return TEMPLATES[asked]
    if "{" in asked:
        _check(asked)
    else:
        raise ConfigError(
            f"chat_template is {asked!r}", fix=f"a Jinja template, auto, or one of {', '.join(sorted(TEMPLATES))}"
        )
    return asked


def _check(text: str) -> None:
    """ConfigError for a template that Jinja cannot read; transformers' own tag for generations is let be."""
    from jinja2 import Environment, TemplateSyntaxError

    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as error:
        raise ConfigError("chat_template is no Jinja template", why=f"line {error.lineno}: {error.message}") from None


def _template_of(files: Files) -> str:
    if TEMPLATE in files:
        return files[TEMPLATE].read_text(encoding="utf-8")
    if SETTINGS not in files:
        return ""
    told = json.loads(files[SETTINGS].read_text(encoding="utf-8")).get("chat_template") or ""
    if isinstance(told, list):
        told = next((each.get("template", "") for each in told if each.get("name") == "default"), "")
    return told if isinstance(told, str) else ""


def gathered(files: Files, out: Path) -> dict[str, Path]:
    """Copies of files from several places, in one."""
    out.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        if path != out / name:
            shutil.copyfile(path, out / name)
    return {name: out / name for name in files}


def with_template(files: Files, text: str, out: Path) -> Files:
    """The files with this chat template in place of any other; copies, in `out`."""
    found = gathered({name: path for name, path in files.items() if not name.startswith("chat_template")}, out)
    if SETTINGS in found:
        told = json.loads(found[SETTINGS].read_text(encoding="utf-8"))
        if told.pop("chat_template", None) is not None:
            found[SETTINGS].write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    found[TEMPLATE] = out / TEMPLATE
    found[TEMPLATE].write_text(text, encoding="utf-8")
    return found


def others(files: Files) -> Files:
    """A model's files that are not its tokenizer's: processors, generation settings."""
    return {name: path for name, path in files.items() if not name.startswith(OF_TOKENIZERS)}
