"""What was asked for: by an environment variable, or in vLLM's own configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ... import cache, methods
from ...common.errors import SparseFlashError, require
from ...methods.base import Method
from ...methods.reading import ReadingMethod
from .._host import named_method

VARIABLE = "SPARSEFLASH_VLLM"
"""The environment variable: on, off, or settings as JSON."""
KEY = "sparseflash"
"""The same in vLLM's `additional_config`, where it counts before the variable."""

_OFF, _ON = ("", "0", "off", "false", "no"), ("1", "on", "true", "yes", "dense")


@dataclass(frozen=True)
class Settings:
    """What attends in the layers that see everything; layers with a window of their own are exact.

    Parameters
    ----------
    decode : ReadingMethod or cache.StreamingLLM, optional
        Which keys the one token of a decode step reads. None: all of them.
    prefill : Method, optional
        Which keys a chunk of a prompt sees, two tokens or more. None: all of them.

    Examples
    --------
    >>> from sparseflash.integrations.vllm import Settings
    >>> Settings.read({"decode": {"name": "quest", "budget": 256}, "prefill": "block-topk"}).decode.budget
    256
    """

    decode: ReadingMethod | cache.StreamingLLM | None = None
    prefill: Method | None = None

    def __post_init__(self) -> None:
        by, streams = self.decode, isinstance(self.decode, cache.StreamingLLM)
        require(
            (
                by is None or streams or _by_pages(by),
                lambda: f"decode={by!r}: expected {_named(_by_pages)}, or streaming-llm",
            ),
            (
                not isinstance(by, cache.StreamingLLM) or (isinstance(by.budget, int) and not by.renumber),
                lambda: (
                    f"decode={by!r}: expected a budget in tokens and renumber=False, since keys stay where "
                    "vLLM has put them"
                ),
            ),
            (
                self.prefill is None or _by_chunks(self.prefill),
                lambda: (
                    f"prefill={self.prefill!r}: expected a method that selects for a chunk of a prompt by "
                    f"its queries and keys, {_named(_by_chunks)}"
                ),
            ),
        )

    @classmethod
    def read(cls, given: Any) -> Settings | None:
        """Settings of True, a mapping, or a text that says so; None where nothing is asked for.

        Raises
        ------
        SparseFlashError
            For what is neither, for unknown keys, methods and hyper-parameters, and for values they refuse.
        """
        if isinstance(given, str):
            word = given.strip().lower()
            if word in _ON or word in _OFF:
                given = word in _ON
            else:
                try:
                    given = json.loads(given)
                except ValueError:
                    given = object()
        if given is None or given is False:
            return None
        if given is True:
            return cls()
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping) or not given.keys() <= {"decode", "prefill"}:
            raise SparseFlashError(
                f"settings of sparseflash for vLLM: {given!r}; expected true, false, or an object with "
                'decode and prefill, such as {"decode": {"name": "quest", "budget": 1024}}'
            )
        return cls(_made(given.get("decode"), streams=True), _made(given.get("prefill")))

    def __str__(self) -> str:
        return f"decode: {self.decode or 'all keys'}, prompts: {self.prefill or 'all keys'}"


def asked(additional: Any = None) -> Settings | None:
    """What `additional_config` asks for, or else the environment; None where neither does."""
    if isinstance(additional, Mapping) and KEY in additional:
        return Settings.read(additional[KEY])
    return Settings.read(os.environ.get(VARIABLE, ""))


def _made(given: Any, streams: bool = False) -> Any:
    """A method of its name, alone or beside its hyper-parameters; `streams`: or the policy streaming-llm."""
    named = named_method(given, "quest")
    if named is None:
        return None
    name, more = named
    return cache.policy(name, **more) if streams and name == "streaming-llm" else methods.get(name, **more)


def _by_pages(method: Any) -> bool:
    """Whether a method (or a class of them) chooses by what is kept of pages, and by nothing else."""
    cls = method if isinstance(method, type) else type(method)
    return issubclass(cls, ReadingMethod) and cls.select is ReadingMethod.select


def _by_chunks(method: Any) -> bool:
    """Whether a method (or a class of them) chooses for queries behind others, and needs to know no more."""
    cls = method if isinstance(method, type) else type(method)
    if not issubclass(cls, Method) or "prefill" not in method.phases or method.across_layers:
        return False
    return {"q_offset"} <= set(method.reads) <= {"q_offset", "scale", "softcap", "v"}


def _named(fits: Callable[[Any], bool]) -> str:
    return "one of " + ", ".join(name for name in methods.names() if fits(methods.find(name)))
