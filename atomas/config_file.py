"""Strict YAML and `--section.field value` overrides -> `Config`.

Every mistake names the file and line (or the flag), the key, the value and what is allowed, with the nearest key
as a suggestion. `extends: other.yaml` starts from another file, relative to the one that names it.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from atomas.config import Config
from atomas.errors import AtomasError


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, if any, and apply overrides such as `["--training.max_steps", "20"]`.

    Raises:
        AtomasError: the file cannot be read, a key is unknown, or a value has the wrong type or range.
    """
    values = _read(Path(path), seen=()) if path is not None else {}
    for key, value in _parse_overrides(overrides):
        values[key] = value
    return _build(values)


def dump_config(config: Config) -> str:
    """The YAML text that `load_config` reads back to an equal `Config`."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def config_keys() -> dict[str, Any]:
    """Every dotted key with its type, in the order of declaration."""
    keys: dict[str, Any] = {}
    for section, section_type in typing.get_type_hints(Config).items():
        for name, annotation in typing.get_type_hints(section_type).items():
            keys[f"{section}.{name}"] = annotation
    return keys


def check_key(key: str) -> None:
    """Raise an AtomasError with the nearest key where `key` is not one."""
    _check_known(key, list(config_keys()), key, "key")


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value still as YAML gave it, and where it stands."""

    value: Any
    place: str


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, _Value]:
    """All dotted keys of a file and of those it extends; later ones win."""
    if path.resolve() in seen:
        raise AtomasError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise AtomasError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AtomasError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise AtomasError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    values: dict[str, _Value] = {}
    if root is None:
        return values
    sections = typing.get_type_hints(Config)
    for key, node, place in _items(root, path):
        if key == "extends":
            parent = (path.parent / str(_scalar(node, place))).resolve()
            values = {**_read(parent, (*seen, path.resolve())), **values}
            continue
        _check_known(key, list(sections), place, "section")
        if isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~"):
            continue
        for name, child, child_place in _items(node, path, key):
            dotted = f"{key}.{name}"
            _check_known(dotted, list(config_keys()), child_place, "key")
            values[dotted] = _Value(_scalar(child, child_place), child_place)
    return values


def _items(node: yaml.Node, path: Path, section: str = "") -> Iterator[tuple[str, yaml.Node, str]]:
    if not isinstance(node, yaml.MappingNode):
        where = f"section {section!r}" if section else "the file"
        raise AtomasError(f"{path}:{node.start_mark.line + 1}: {where} must be a mapping of keys to values")
    seen: set[str] = set()
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if key.value in seen:
            raise AtomasError(f"{place}: {key.value!r} is given twice")
        seen.add(key.value)
        yield key.value, value, place


def _scalar(node: yaml.Node, place: str) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        raise AtomasError(f"{place}: {getattr(error, 'problem', error)}") from None


def _parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, _Value]]:
    known = list(config_keys())
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise AtomasError(f"unexpected argument {flag!r}: overrides are --section.field value")
        key, equals, text = flag[2:].partition("=")
        key = key.replace("-", "_")
        place = f"--{key}"
        _check_known(key, known, place, "key")
        if not equals:
            if not rest:
                raise AtomasError(f"{place} needs a value")
            text = rest.pop(0)
        try:
            value = yaml.safe_load(text) if _is_yaml(config_keys()[key], text) else text
        except yaml.YAMLError:
            value = text
        yield key, _Value(value, place)


def _is_yaml(annotation: Any, text: str) -> bool:
    """Text is taken as it stands, but for a list or a mapping where there may be one."""
    if annotation is str:
        return False
    return get_origin(annotation) is not types.UnionType or text[:1] in ("[", "{")


def _check_known(key: str, known: Sequence[str], place: str, what: str) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near and "." in key:  # a right field in a wrong section
        near = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    hint = f"did you mean {near[0]!r}?" if near else "`atomas config keys` lists all"
    raise AtomasError(f"{place}: unknown {what} {key!r}; {hint}")


def _build(values: dict[str, _Value]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for key, annotation in config_keys().items():
        section, name = key.split(".")
        sections.setdefault(section, {})
        if key in values:
            sections[section][name] = _convert(values[key], annotation, key)
    try:
        return Config(
            **{name: typing.get_type_hints(Config)[name](**given) for name, given in sections.items()}
        )
    except AtomasError as error:
        raise AtomasError(_with_place(str(error), values)) from None


def _with_place(message: str, values: dict[str, _Value]) -> str:
    """Prefix a range error with the place where its key was set, if it was."""
    for key, value in values.items():
        if message.startswith(f"{key} ") and not value.place.startswith("--"):
            return f"{value.place}: {message}"
    return message


def _convert(given: _Value, annotation: Any, key: str) -> Any:
    value, problem = given.value, ""
    origin = get_origin(annotation)
    if origin is Literal:
        choices = get_args(annotation)
        if value in choices and type(value) in {type(choice) for choice in choices}:
            return value
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        problem = f"one of {', '.join(map(str, choices))}" + (f" (did you mean {near[0]}?)" if near else "")
    elif origin is types.UnionType:
        return _convert_corpora(given, key)
    elif origin is tuple:
        inner = get_args(annotation)[0]
        if isinstance(value, list):
            return tuple(_convert(_Value(item, given.place), inner, key) for item in value)
        problem = "a list such as [0.25, 0.5]"
    elif origin is dict:
        if isinstance(value, dict):
            return value
        problem = "a mapping"
    elif annotation is bool:
        if isinstance(value, bool):
            return value
        problem = "true or false"
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        problem = "a whole number"
    elif annotation is float:
        number = _as_float(value)
        if number is not None:
            return number
        problem = "a number"
    elif annotation is str:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        problem = "text"
    else:
        raise AssertionError(f"{key}: no rule for the type {annotation}")
    raise AtomasError(f"{given.place}: {key} = {value!r} must be {problem}")


def _convert_corpora(given: _Value, key: str) -> str | tuple[str, ...] | dict[str, float]:
    """A name, a list of names, or a mapping of names to weights."""
    value = given.value
    if isinstance(value, list) and value:
        return tuple(_convert(_Value(item, given.place), str, key) for item in value)
    if isinstance(value, dict) and value:
        return {
            str(name): _convert(_Value(weight, given.place), float, f"{key}.{name}")
            for name, weight in value.items()
        }
    if isinstance(value, list | dict):
        raise AtomasError(f"{given.place}: {key} = {value!r} must name a corpus")
    return str(_convert(given, str, key))


def _as_float(value: Any) -> float | None:
    """YAML 1.1 reads `1e-4` as text; a learning rate is meant."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if number == number and abs(number) != float("inf") else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
