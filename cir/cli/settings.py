"""The options of a run as a file: read for ``--config``, each checked as on the command line, and written again."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cir.cli.options import Parser
from cir.cli.output import meant
from cir.system.files import is_json, named, shown, strict_json, whole_text

NAME = "config.yaml"
MOST = 2**20
"""Characters of such a file."""
OF_THE_CALL = ("command", "config", "out", "overwrite", "quiet", "verbose", "debug", "json", "process")
"""What a file that is written leaves out: it changes nothing of what is done."""


def words_of(parser: Parser, words: list[str]) -> list[str]:
    """What the file of ``--config`` among ``words`` says, as words of the command line; none without one.

    Raises:
        ValueError: if the file is not a mapping of this command's options, each once and with a value that it takes.
        OSError: if it cannot be read.
    """
    ahead = Parser(prog=parser.prog, add_help=False)
    ahead.add_argument("--config")
    path = ahead.parse_known_args(words)[0].config
    if path is None:
        return []
    name, options, found = named(Path(path)), parser.options(), {}
    del options["config"]
    for key, value in _read(Path(path)).items():
        option = options.get(str(key).replace("-", "_"))
        if option is None:
            raise ValueError(f"{name}: expected an option, got {shown(key)}{meant(str(key), options)}")
        if option.dest in found:
            raise ValueError(f"{name}: expected {option.dest} once, got it twice")
        found[option.dest] = _word(f"{name}, {option.dest}", option, value)
    return [word for word in found.values() if word]


def _read(path: Path) -> dict[Any, Any]:
    text = whole_text(path, MOST)
    value = strict_json(named(path), text) if is_json(path) else _yaml(named(path), text)
    if not isinstance(value, dict):
        raise ValueError(f"{named(path)}: expected options by name, got {shown(value)}")
    return value


def _yaml(name: str, text: str) -> Any:
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode) and node.value:
            key, times = Counter(str(key.value) for key, _ in node.value).most_common(1)[0]
            if times > 1:
                raise ValueError(f"{name}: expected {shown(key)} once, got it {times} times")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name}: expected YAML, got {error!s:.300}") from None


def _word(where: str, option: argparse.Action, value: Any) -> str:
    """``value`` as a word of the command line; "" for a switch that is off."""
    flag = option.option_strings[0]
    if option.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false, got {shown(value)}")
        return flag if value else ""
    # YAML reads 1e-3 as text: what is to be a number may be text that is one.
    kinds = (str,) if option.type is None else (str, int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{where}: expected {'text' if option.type is None else 'a number'}, got {shown(value)}")
    if option.choices is not None and value not in option.choices:
        raise ValueError(f"{where}: expected one of {', '.join(map(str, option.choices))}, got {shown(value)}")
    try:
        if callable(option.type):
            option.type(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{where}: {error}") from None
    return f"{flag}={value}"


def used(arguments: argparse.Namespace, config: Any) -> str:
    """The file that repeats a run: the options of ``arguments``, with what ``config`` says of those not given."""
    import yaml

    given: Mapping[str, Any] = {name: value for name, value in vars(arguments).items() if name not in OF_THE_CALL}
    resolved = {field.name: getattr(config, field.name) for field in fields(config) if field.name in given}
    plain = {name: value for name, value in {**given, **resolved}.items() if value is not None and value is not False}
    head = "# `cir unlearn --config THIS --out NEW` repeats the run, from the folder that it ran in.\n"
    return head + yaml.safe_dump(plain, sort_keys=True, allow_unicode=True)
