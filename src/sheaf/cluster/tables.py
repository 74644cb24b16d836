"""Tables as TOML gives them, checked against a dataclass: every problem is found at once, none is a traceback."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from sheaf.errors import nearest

Rules = Mapping[str, Callable[[Any], str | None]]  # field name -> what is wrong with a value of it, None when nothing


def decode(kind: type[Any], table: Any, where: str, problems: list[str], rules: Rules) -> Any:
    """An instance of the dataclass ``kind`` from ``table``, or None with every reason added to ``problems``.

    Fields may be text, numbers, dictionaries of numbers (keys of whole numbers are text in TOML), other such
    dataclasses, and tuples of those. Numbers below zero, infinite or not a number are refused for every field.
    ``where`` is the table's place in the file, ``""`` for the file itself; ``rules`` go by field name.
    """
    if not isinstance(table, dict):
        problems.append(f"{where}: found {_shown(table)}, wanted a table of {_names(kind)}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    before, values = len(problems), dict[str, Any]()
    for key, value in table.items():
        place = f"{where}.{key}" if where else key
        if key not in fields:
            problems.append(f"{place} is not a known key; {nearest(key, fields)}")
        else:
            values[key] = _value(hints[key], value, place, problems, rules, key)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in table:
            problems.append(f"{f'{where}.{name}' if where else name} is missing: add it")
    return kind(**values) if len(problems) == before else None


def _value(hint: Any, value: Any, where: str, problems: list[str], rules: Rules, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        hint = next(argument for argument in arguments if argument is not type(None))
        return _value(hint, value, where, problems, rules, name)
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast("type[Any]", hint), value, where, problems, rules)
    if origin is tuple:
        if not isinstance(value, list):
            problems.append(f"{where}: found {_shown(value)}, wanted a list")
            return ()
        return tuple(
            _value(arguments[0], item, f"{where}[{index}]", problems, rules, name) for index, item in enumerate(value)
        )
    if origin is dict:
        return _dictionary(arguments, value, where, problems, rules, name)
    return _single(hint, value, where, problems, rules, name)


def _dictionary(
    arguments: tuple[Any, ...], value: Any, where: str, problems: list[str], rules: Rules, name: str
) -> dict[Any, Any]:
    if not isinstance(value, dict):
        problems.append(f"{where}: found {_shown(value)}, wanted a table")
        return {}
    decoded: dict[Any, Any] = {}
    for key, item in value.items():
        whole = arguments[0] is int
        if whole and not (key.isascii() and key.isdigit()):
            problems.append(f"{where}.{key}: found {key!r} as a key, wanted a whole number")
            continue
        if (wrong := rules.get(f"{name} key", _nothing_wrong)(int(key) if whole else key)) is not None:
            problems.append(f"{where}.{key}: {wrong}")
        decoded[int(key) if whole else key] = _value(arguments[1], item, f"{where}.{key}", problems, rules, name)
    return decoded


def _single(hint: Any, value: Any, where: str, problems: list[str], rules: Rules, name: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        wrong = None if isinstance(value, str) else f"found {_shown(value)}, wanted text"
    elif not number:
        wrong = f"found {_shown(value)}, wanted a number"
    elif not math.isfinite(value):
        wrong = f"found {value}, wanted a finite number"
    elif value < 0 and name not in rules:
        wrong = f"found {value}, wanted a number that is not negative"
    elif hint is int and value != int(value):
        wrong = f"found {value}, wanted a whole number"
    else:
        value, wrong = hint(value), None
    wrong = rules.get(name, _nothing_wrong)(value) if wrong is None else wrong
    if wrong is not None:
        problems.append(f"{where}: {wrong}")
    return value


def _nothing_wrong(value: Any) -> None:
    del value


def _names(kind: type[Any]) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)
