"""Settings of a training run: one dataclass from which the YAML keys and the command-line flags both come."""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

S = TypeVar("S")


def setting(group: str, help: str, default: Any = dataclasses.MISSING, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with what its flag needs; without a default, the configuration file must give it."""
    metadata = {"group": group, "help": help, "choices": choices}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load_settings(settings_class: type[S], description: str, default_config: Path | None, argv: list[str] | None) -> S:
    """Settings from the YAML file named by `--config`, each overridden by the flag of its name where one is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = "" if default_config is None else f" (default: {default_config})"
    parser.add_argument("--config", type=Path, default=default_config, help=f"YAML file of the settings below{shown}")
    fields = {field.name: field for field in dataclasses.fields(settings_class)}  # type: ignore[arg-type]
    hints = get_type_hints(settings_class)
    groups: dict[str, Any] = {}
    for name, field in fields.items():
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text = field.metadata["help"] + _shown_default(field, default_config)
        options: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if hints[name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hints[name]) is dict:
            options |= {"nargs": "+", "metavar": "KEY=VALUE"}
        elif choices := field.metadata["choices"]:
            options["choices"] = choices
        else:
            options["metavar"] = name.rsplit("_", 1)[-1].upper()
        groups[group].add_argument(f"--{name}", **options)
    flags = vars(parser.parse_args(argv))
    path: Path | None = flags.pop("config")

    if path is not None and not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {str(path)!r}. Give one with --config.")
    values = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings to values, got a {type(values).__name__}.")
    for name, value in flags.items():
        # A mapping is updated by its flag, not replaced: `--model hidden_size=64` changes that one value.
        values[name] = {**(values.get(name) or {}), **_key_values(name, value)} if isinstance(value, list) else value
    _check_known(values, fields, path)
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        raise ValueError(
            f"The command gives no {', '.join(missing)}. Give the flag{' or a --config of yours with the key' if path else ''}."
        )
    return settings_from(settings_class, values, path)


def settings_from(settings_class: type[S], values: Mapping[str, Any], place: Any) -> S:
    """Settings from values as a YAML file or flags give them; `place` is where they stand."""
    fields = {field.name: field for field in dataclasses.fields(settings_class)}  # type: ignore[arg-type]
    hints = get_type_hints(settings_class)
    _check_known(values, fields, place)
    for name, value in values.items():
        choices = fields[name].metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))} (in quotes), got {value!r}.")
    return settings_class(**{name: _converted(name, value, hints[name]) for name, value in values.items()})


def _check_known(values: Mapping[str, Any], fields: Mapping[str, Any], place: Any) -> None:
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"Unknown key {', '.join(map(repr, unknown))} in {place}. Known keys: {', '.join(fields)}.")


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The command line that gives these settings; None is left out."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict) and value:
            flags += [f"--{name}", *(f"{key}={item}" for key, item in value.items())]
        elif isinstance(value, list) and value:
            flags += [f"--{name}", ",".join(map(str, value))]
        elif value is not None and not isinstance(value, dict | list):
            flags += [f"--{name}", str(value)]
    return flags


def _shown_default(field: dataclasses.Field[Any], default_config: Path | None) -> str:
    if _is_required(field):
        return " (required)" if default_config is None else " (default: from the file)"
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, list):
        default = ",".join(map(str, default))
    return "" if default in (None, "", {}) else f" (default: {default})"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _key_values(name: str, pairs: list[str]) -> dict[str, Any]:
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"--{name} takes KEY=VALUE pairs, got {wrong[0]!r}.")
    return {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def _number(value: Any) -> Any:
    """A number for text like 1e-5 or 2e-1, which YAML takes for text where it has no point."""
    is_one = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_one else value


def _converted(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's declared type; YAML reads 1e-5 as text and flags are text, so numbers are parsed here."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is dict:
        if value is None or isinstance(value, dict):
            return {key: _number(item) for key, item in (value or {}).items()}
    elif typing.get_origin(hint) is list:
        # A flag gives A,B, or nothing between quotes for none; a file gives a list.
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if isinstance(items, list):
            return [_converted(name, item, get_args(hint)[0]) for item in items]
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif not isinstance(value, bool | dict | list) and value is not None:
        try:
            return hint(str(value)) if hint is not str else str(value)
        except ValueError:
            pass
    raise ValueError(f"{name} must be of type {getattr(hint, '__name__', hint)}, got {value!r}.")
