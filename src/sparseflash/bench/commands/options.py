"""CLI options generated from dataclasses, which hold names, types, defaults and help texts in one place."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from sparseflash.common.errors import SparseFlashError

FIELD = "A field of the method, as name=value with a Python literal; may be repeated. "
FIELD += "See: sparseflash methods NAME."


def changes(said: str = FIELD, **about: Any) -> Any:
    """The option ``--set`` of a command that names a method; `settings` reads it."""
    return typer.Option("--set", help=said, **about)


def setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SparseFlashError(f"--set {text} has no value; write it as --set name=value")
    return name.strip(), literal(value)


def settings(texts: Iterable[str] | None) -> dict[str, Any]:
    """Read all occurrences of ``--set``; the last one of a repeated name counts."""
    return dict(map(setting, texts or ()))


def literal(text: str) -> Any:
    """Parse a Python literal; any other text is returned as a string."""
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        return text.strip()


def fields(cls: type, options: Mapping[str, Any]) -> list[inspect.Parameter]:
    """Make an option for each named field of a dataclass, with the field's type and default."""
    hints = typing.get_type_hints(cls)
    default = {field.name: field.default for field in dataclasses.fields(cls)}
    return [_parameter(name, hints[name], default[name], option) for name, option in options.items()]


def flags(
    named: Mapping[str, tuple[str, tuple[str, ...]]], find: Callable[[str], type], **about: Any
) -> list[inspect.Parameter]:
    """Make an option for each name in `named`, which stands for fields of the method that `find` returns."""
    found = []
    for name, (method, of) in named.items():
        cls = find(method)
        default = next(x.default for x in dataclasses.fields(cls) if x.name == of[0])
        said = re.split(r"(?<=\w)\. |\.$", described(cls).get(of[0], ""))[0]
        kind = typing.get_type_hints(cls)[of[0]].__name__
        said = f"{' and '.join(of)} of {method}: {said}. By default {default}."
        option = typer.Option(help=said, metavar=f"<{kind}>", **about)
        found.append(_parameter(name, str | None, None, option))
    return found


def taking(*parameters: inspect.Parameter) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replace ``**more`` in a command's signature with these options."""

    def change(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True)
        kept = [x for x in own.parameters.values() if x.kind is not x.VAR_KEYWORD]
        signature = own.replace(parameters=[*kept, *parameters])
        command.__annotations__ = {x.name: x.annotation for x in signature.parameters.values()}
        command.__signature__ = signature  # type: ignore[attr-defined]  # what inspect reads
        return command

    return change


def described(cls: type) -> dict[str, str]:
    """Each parameter's description in the docstrings of a class and its bases, joined into one line."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        _, _, text = inspect.cleandoc(one.__doc__ or "").partition("Parameters\n----------\n")
        text = re.split(r"\n\n\w+\n-+\n", text)[0]
        for names, said in re.findall(r"^(\w[\w, ]*?) : .*\n((?:[ ]+.*\n?)+)", text, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(said.split()))
    return found


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )
