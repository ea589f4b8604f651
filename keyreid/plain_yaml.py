"""YAML from people: plain data, read by one set of rules and within bounds of size, depth and expansion."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from keyreid.errors import ConfigError

MOST_BYTES, MOST_VALUES, DEEPEST = 2**17, 50_000, 32  # an alias counts as all that it stands for
CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Scalar(NamedTuple):
    """An unquoted number or truth value, and how it was written: where text is wanted, `007` is `007`."""

    text: str
    value: int | float | bool


class _Loader(yaml.SafeLoader):
    """Whole numbers are decimal (010 is 10, 1:30 is text), 1e-3 is a number, dates are text."""

    depth = values = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.Node) -> int:
        return int(node.value)

    def plain(self, node: yaml.Node, depth: int = 1) -> Any:
        """A node as plain data; ValueError where there is no such setting."""
        self.values += 1
        if self.values > MOST_VALUES or depth > DEEPEST:
            raise ValueError(f"more than {MOST_VALUES} values or {DEEPEST} levels (or an alias inside itself)")
        tag, at = node.tag.removeprefix("tag:yaml.org,2002:"), f"line {node.start_mark.line + 1}: "
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.plain(value, depth + 1) for value in node.value]
        if isinstance(node, yaml.MappingNode) and tag == "map":
            pairs = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or CONTROL.search(key.value) or key.value in pairs:
                    raise ValueError(f"{at}duplicate key {str(key.value)[:80]}, or one that is not a line of text")
                pairs[key.value] = self.plain(value, depth + 1)
            return pairs
        if not isinstance(node, yaml.ScalarNode) or tag not in ("null", "bool", "int", "float", "str"):
            raise ValueError(f"{at}{tag} is no kind of setting")
        value = getattr(self, f"construct_yaml_{tag}")(node)
        if CONTROL.search(value) if tag == "str" else tag != "null" and not -(2**63) < value < 2**63:
            raise ValueError(f"{at}{node.value[:40]!r} cannot be a setting: control characters, or no finite number")
        return value if tag in ("null", "str") else Scalar(node.value, value)


_FLOAT = r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0].endswith((":bool", ":null"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _form in (("int", r"[-+]?\d+"), ("float", _FLOAT)):
    _pattern = re.compile(rf"(?:{_form})\Z", re.ASCII)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, list("-+.0123456789"))


def read(path: Path) -> Any:
    """What a file holds; errors as of `parse`, and OSError."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: not a file")
    with path.open("rb") as file:
        return parse(file.read(MOST_BYTES + 1), str(path))


def parse(text: str | bytes, source: str) -> Any:
    """None, text, a `Scalar`, or lists and mappings of these; keys are text as it was written.

    Raises:
        ConfigError: it is not YAML, too large, or holds what no setting can be; `source` names it.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{source}: larger than {MOST_BYTES // 1024} KiB, which no configuration is")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.plain(node)
    except (yaml.YAMLError, ValueError, OverflowError, LookupError) as error:  # PyYAML's own slips among them
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())[:300]}") from None
