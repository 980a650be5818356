"""`topology.yml`: which node serves which span. Knows nothing of connections or weights.

    worker0:
      host: 192.168.1.20:10128
      description: gaming PC
      layers:
        - model.layers.0-15
        - model.layers.20

Both ends of a range are included in the file; in code, spans are half-open `range`s. A node marked
`replica: true` may serve blocks that another node serves too, and stands in for it.
"""

import itertools
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cake.cover import Offer, cheapest_cover
from cake.errors import TopologyError

MASTER = "master"
KEYS = ("host", "description", "layers", "replica")
NAME = re.compile(r"\w[\w. -]*")  # names become folders
LAYERS = re.compile(r"model\.layers\.(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Node:
    """A device that serves blocks. Neighbouring blocks form one span, in ascending order."""

    name: str
    host: str
    port: int
    spans: tuple[range, ...]
    description: str = ""
    replica: bool = False  # others may serve its blocks too

    @property
    def address(self) -> str:
        """`host:port`, as in the file."""
        return format_address(self.host, self.port)


@dataclass(frozen=True)
class Topology:
    """All nodes by name, in the order of the file."""

    nodes: Mapping[str, Node]

    def node(self, name: str | None) -> Node:
        """The node called `name`; without a name, the only one there is."""
        names = ", ".join(self.nodes)
        if name is None:
            if len(self.nodes) == 1:
                return next(iter(self.nodes.values()))
            raise TopologyError(f"which node is this? say --name with one of: {names}")
        if name not in self.nodes:
            raise TopologyError(f"no node {name!r} in the topology; it has: {names}")
        return self.nodes[name]

    def own_spans(self, n_blocks: int) -> tuple[range, ...]:
        """The spans that no node serves: the master's."""
        served = {block for node in self.nodes.values() for span in node.spans for block in span}
        return merge(block for block in range(n_blocks) if block not in served)

    def layout(self, n_blocks: int) -> list[tuple[Node | None, range]]:
        """The spans of a model of `n_blocks` blocks in order, without stand-ins; none is the master.

        Raises `TopologyError` where the nodes do not fit the model, or their spans one another.
        """
        offers: list[Offer[Node | None]] = [Offer(span, 0, None) for span in self.own_spans(n_blocks)]
        for node in self.nodes.values():
            if node.spans[-1].stop > n_blocks:
                raise TopologyError(
                    f"node {node.name!r} claims block {node.spans[-1][-1]}, but the model's last block is "
                    f"{n_blocks - 1}"
                )
            offers += [Offer(span, float(node.replica), node) for span in node.spans]
        cover = cheapest_cover(offers, n_blocks)
        if cover is None:
            raise TopologyError(
                "the spans of the replicas do not join up: a span is run whole, so give a replica the same "
                "layers as the node that it stands in for"
            )
        return [(offer.by, offer.span) for offer in cover]


def load_topology(path: Path) -> Topology:
    """Read and check a file. Raises `TopologyError`, whose line names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TopologyError(f"{path} cannot be read: {reason}") from error
    try:
        return parse_topology(text)
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from error.__cause__


def parse_topology(text: str) -> Topology:
    """Check the text of a topology file."""
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TopologyError(f"not YAML: {_what_is_wrong(error, text)}") from error
    if not isinstance(content, dict) or not content:
        empty = "names no node; it " if not content else ""
        raise TopologyError(f"{empty}must be a map from node names to host and layers")
    nodes = {str(name): _node(str(name), fields) for name, fields in content.items()}
    if len(nodes) < len(content):
        names = [str(name) for name in content]
        twice = next(name for name in names if names.count(name) > 1)
        raise TopologyError(f"the node {twice!r} appears twice, as a number and as text")
    _refuse_shared_blocks(nodes.values())
    return Topology(nodes)


def _what_is_wrong(error: Exception, text: str) -> str:
    """And in which line of the text, as far as the error knows."""
    marks = [getattr(error, name, None) for name in ("problem_mark", "context_mark")]
    lines = text.split("\n")
    for mark in filter(None, marks):
        line = lines[mark.line].strip("\r ") if mark.line < len(lines) else ""
        if line:  # the end of the file, where a quotation has no end, explains nothing
            tab = "; indent with spaces, not tabs" if line.startswith("\t") else ""
            problem = getattr(error, "problem", None)
            return f"line {mark.line + 1}, column {mark.column + 1}, {line[:80]!r}: {problem}{tab}"
    return " ".join(str(error).split())


def _node(name: str, fields: object) -> Node:
    if name == MASTER:
        raise TopologyError("a node cannot be called 'master'; blocks that no node claims run there anyway")
    if not NAME.fullmatch(name):
        raise TopologyError(
            f"{name!r} cannot be a node's name: letters, digits, '.', '_', '-' and spaces can be in it"
        )
    if not isinstance(fields, dict):
        raise TopologyError(f"node {name!r} must be a map with the keys {', '.join(KEYS)}")
    for key in fields:
        if key not in KEYS:
            raise TopologyError(f"node {name!r} has the unknown key {key!r}; known: {', '.join(KEYS)}")
    for key in ("host", "layers"):
        if key not in fields:
            raise TopologyError(f"node {name!r} lacks {key!r}")
    try:
        host, port = parse_address(fields["host"])
    except ValueError as error:
        raise TopologyError(f"node {name!r}: {error}") from error
    replica = fields.get("replica", False)
    if not isinstance(replica, bool):
        raise TopologyError(f"node {name!r}: replica is true or false, not {replica!r}")
    spans = _spans(name, fields["layers"])
    return Node(name, host, port, spans, str(fields.get("description") or ""), replica)


def parse_address(text: object, example: str = "192.168.1.20:10128") -> tuple[str, int]:
    """`host:port` in two; `[...]` around an IPv6 address. Raises `ValueError` that ends with the example."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+)):(\d{1,5})", str(text))
    if match is None:
        raise ValueError(f"{text!r} is not an address; write host:port, such as {example}")
    if int(match[3]) > 65535:
        raise ValueError(f"{text!r} is not an address: ports end at 65535; write such as {example}")
    return match[1] or match[2], int(match[3])


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _spans(name: str, layers: object) -> tuple[range, ...]:
    if not isinstance(layers, list) or not layers:
        raise TopologyError(f"node {name!r}: layers must be a list such as [model.layers.0-5]")
    blocks: list[int] = []
    for text in layers:
        blocks += _layer_range(name, text)
    ordered = sorted(blocks)
    if len(set(ordered)) < len(ordered):
        twice = next(a for a, b in itertools.pairwise(ordered) if a == b)
        raise TopologyError(f"node {name!r} lists block {twice} twice")
    return merge(ordered)


def _layer_range(name: str, text: object) -> range:
    match = LAYERS.fullmatch(str(text))
    if match is None:
        raise TopologyError(
            f"node {name!r}: {text!r} is not a layer; write model.layers.5 or model.layers.0-5"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise TopologyError(f"node {name!r}: the range {text} ends before it begins")
    if last >= 100_000:
        raise TopologyError(f"node {name!r}: {text} goes beyond any model's last block")
    return range(first, last + 1)


def merge(blocks: Iterable[int]) -> tuple[range, ...]:
    """Ascending block numbers as the fewest ranges."""
    spans: list[range] = []
    for block in blocks:
        if spans and spans[-1].stop == block:
            spans[-1] = range(spans[-1].start, block + 1)
        else:
            spans.append(range(block, block + 1))
    return tuple(spans)


def _refuse_shared_blocks(nodes: Iterable[Node]) -> None:
    """Of the nodes that serve a block, all but one must be marked as replicas."""
    owner: dict[int, str] = {}
    for node in nodes:
        for block in [block for span in node.spans for block in span if not node.replica]:
            if block in owner:
                raise TopologyError(
                    f"nodes {owner[block]!r} and {node.name!r} both claim block {block}; mark one of them "
                    "'replica: true' if it is to stand in for the other"
                )
            owner[block] = node.name


def dump_topology(topology: Topology) -> str:
    """The text of a topology file with these nodes."""
    content = {name: _fields(node) for name, node in topology.nodes.items()}
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _fields(node: Node) -> dict[str, Any]:
    layers = [f"model.layers.{span[0]}" + (f"-{span[-1]}" if len(span) > 1 else "") for span in node.spans]
    description = {"description": node.description} if node.description else {}
    replica = {"replica": True} if node.replica else {}
    return {"host": node.address, **description, "layers": layers, **replica}


class _UniqueKeyLoader(yaml.SafeLoader):
    """A second node of the same name is a mistake; YAML itself would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(mapping) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            lines = [key.start_mark.line + 1 for key, _ in node.value]
            where = [str(line) for line, key in zip(lines, keys, strict=True) if key == twice]
            raise TopologyError(f"the key {twice!r} appears twice, in lines {' and '.join(where)}")
        return mapping
