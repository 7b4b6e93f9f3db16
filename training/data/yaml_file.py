"""Read YAML of unknown origin: whatever is wrong in it is one `ConfigError`."""

from __future__ import annotations

import re
from typing import Any

import yaml

from icae_fast.errors import ConfigError

_MOST_LEVELS = 64  # of nested values; our own files need 5
_MOST_NODES = 100_000  # of all values, with what aliases repeat
_MOST_BITS = 64  # of an integer


class _Loader(yaml.SafeLoader):
    """A YAML loader with limits, which reads `1e-4` as a number.

    YAML 1.2 does so, too; YAML 1.1 reads text, because it has no dot.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self._sizes: dict[int, int] = {}  # of finished nodes, by id

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node; raise if it is nested too deeply, or is too large with its aliases."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._level += 1
        if self._level > _MOST_LEVELS:
            raise _refused(f"values are nested in more than {_MOST_LEVELS} levels", mark)
        node = super().compose_node(parent, index)
        assert node is not None  # as long as there is an event
        self._level -= 1
        if is_alias:
            if id(node) not in self._sizes:
                raise _refused("an alias stands within its own value", mark)
            return node
        parts = node.value if isinstance(node.value, list) else []
        flat = [part for both in parts for part in (both if isinstance(both, tuple) else (both,))]
        self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in flat)
        if self._sizes[id(node)] > _MOST_NODES:
            raise _refused(f"there are more than {_MOST_NODES} values, with what aliases repeat", mark)
        return node

    def construct_integer(self, node: Any) -> int:
        """Return an integer; raise if no setting can be so large."""
        if len(node.value) <= _MOST_BITS + 3:  # as many binary digits, a sign and 0b
            number = self.construct_yaml_int(node)
            if number.bit_length() < _MOST_BITS:
                return number
        raise _refused("an integer has too many digits", node.start_mark)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _refused(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def parse_yaml(text: str, what: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: YAML.
        what: name of the text in error messages.

    Raises:
        ConfigError: it is not YAML, is nested too deeply, or is too large.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from error
    except (ValueError, LookupError, RecursionError) as error:  # such as a date of month 13, or `!!bool x`
        raise ConfigError(f"{what} is not valid YAML: a value cannot be read ({error})") from error
