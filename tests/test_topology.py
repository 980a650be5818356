"""`topology.yml`: what it means, and what each mistake in it says."""

from pathlib import Path

import pytest

from cake.errors import TopologyError
from cake.topology import (
    Node,
    Topology,
    dump_topology,
    load_topology,
    merge,
    parse_address,
    parse_topology,
)

EXAMPLE = Path(__file__).parent.parent / "examples" / "topology.yml"


def test_example_file() -> None:
    assert list(load_topology(EXAMPLE).nodes.values()) == [
        Node("linux_server_1", "linux_server.host", 10128, (range(6),), "NVIDIA Titan X Pascal (12GB)"),
        Node("linux_server_2", "linux_server2.host", 10128, (range(6, 17),), "NVIDIA GeForce 3080 (10GB)"),
        Node("iphone", "iphone.host", 10128, (range(17, 18),), "iPhone 15 Pro Max"),
        Node("ipad", "ipad.host", 10128, (range(18, 20),), "iPad"),
        Node("macbook", "macbook.host", 10128, (range(20, 32),), "M1 Max"),
    ]


def test_example_file_covers_llama_3_8b_without_the_master() -> None:
    layout = load_topology(EXAMPLE).layout(32)
    assert [(node and node.name, span) for node, span in layout] == [
        ("linux_server_1", range(6)),
        ("linux_server_2", range(6, 17)),
        ("iphone", range(17, 18)),
        ("ipad", range(18, 20)),
        ("macbook", range(20, 32)),
    ]


@pytest.mark.parametrize(
    ("layers", "spans"),
    [
        ("[model.layers.5]", (range(5, 6),)),
        ("[model.layers.0-3]", (range(4),)),
        ("[model.layers.4-4]", (range(4, 5),)),
        ("[model.layers.0-3, model.layers.4-5]", (range(6),)),
        ("[model.layers.0-3, model.layers.5-6]", (range(4), range(5, 7))),
        ("[model.layers.9, model.layers.0-1, model.layers.8]", (range(2), range(8, 10))),
        ("[model.layers.2, model.layers.0, model.layers.1]", (range(3),)),
    ],
)
def test_neighbouring_blocks_form_one_ascending_span(layers: str, spans: tuple[range, ...]) -> None:
    topology = parse_topology(f"a: {{host: 'h:1', layers: {layers}}}")
    assert topology.node("a").spans == spans


def test_merge() -> None:
    assert merge([]) == ()
    assert merge([0, 1, 2, 4, 7, 8]) == (range(3), range(4, 5), range(7, 9))


@pytest.mark.parametrize(
    ("spans", "layout"),
    [
        ({"a": (range(2, 4),)}, [(None, range(2)), ("a", range(2, 4)), (None, range(4, 6))]),
        ({"a": (range(6),)}, [("a", range(6))]),
        (
            {"a": (range(5, 6),), "b": (range(2), range(3, 4))},
            [
                ("b", range(2)),
                (None, range(2, 3)),
                ("b", range(3, 4)),
                (None, range(4, 5)),
                ("a", range(5, 6)),
            ],
        ),
        ({}, [(None, range(6))]),
    ],
)
def test_layout_gives_the_master_what_no_node_serves(
    spans: dict[str, tuple[range, ...]], layout: list[tuple[str | None, range]]
) -> None:
    topology = Topology({name: Node(name, "h", 1, s) for name, s in spans.items()})
    assert [(node and node.name, span) for node, span in topology.layout(6)] == layout


def test_layout_refuses_a_block_beyond_the_last() -> None:
    topology = Topology({"a": Node("a", "h", 1, (range(30, 33),))})
    with pytest.raises(TopologyError, match=r"'a' claims block 32, but the model's last block is 31"):
        topology.layout(32)


def node(layers: str = "[model.layers.0]", host: str = "h:1", more: str = "") -> str:
    """The text of a node's fields."""
    return f"{{host: '{host}', layers: {layers}{more}}}"


BAD = {
    "not YAML": (
        "a: [",
        r"not YAML: line 1, column 5, 'a: \[': expected the node content, but found '<stream",
    ),
    "a colon too many": (
        "a:\n  host: h: 1\n",
        r"topology\.yml: not YAML: line 2, column 10, 'host: h: 1': mapping values are not allowed here$",
    ),
    "no end of a quotation": (
        "a:\n  host: 'h:1\n\n",
        r"line 2, column 9, \"host: 'h:1\": found unexpected end",
    ),
    "a tab as indentation": ("a:\n\thost: h:1", r"line 2, column 1, '\\thost: h:1': .*; indent with spaces"),
    "a python object": ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    "nested too deep": ("[" * 1500, "not YAML"),
    "an impossible date": (f"a: {node(more=', description: 2024-99-99')}", "not YAML"),
    "a list": ("- a", "map from node names"),
    "a word": ("hello", "map from node names"),
    "empty": ("", "names no node; it must be a map from node names"),
    "only a comment": ("# nothing", "names no node; it must be a map from node names"),
    "an empty map": ("{}", "map from node names"),
    "node not a map": ("a: 5", "'a' must be a map"),
    "node is nothing": ("a:", "'a' must be a map"),
    "unknown key": (f"a: {node(more=', gpu: 1')}", "'a' has the unknown key 'gpu'"),
    "missing host": ("a: {layers: [model.layers.0]}", "'a' lacks 'host'"),
    "missing layers": ("a: {host: 'h:1'}", "'a' lacks 'layers'"),
    "no port": (f"a: {node(host='h')}", "'h' is not an address; write host:port"),
    "empty port": (f"a: {node(host='h:')}", "'h:' is not an address"),
    "no host name": (f"a: {node(host=':10128')}", "':10128' is not an address"),
    "port not a number": (f"a: {node(host='h:http')}", "'h:http' is not an address"),
    "port too large": (f"a: {node(host='h:65536')}", "'h:65536' is not an address"),
    "negative port": (f"a: {node(host='h:-1')}", "'h:-1' is not an address"),
    "IPv6 without brackets": (f"a: {node(host='fe80::1:10128')}", "is not an address"),
    "no host at all": ("a: {host: ~, layers: [model.layers.0]}", "None is not an address"),
    "layers not a list": (f"a: {node('model.layers.0')}", "'a': layers must be a list"),
    "layers empty": (f"a: {node('[]')}", "'a': layers must be a list"),
    "range backwards": (f"a: {node('[model.layers.5-3]')}", "range model.layers.5-3 ends before it begins"),
    "not a layer": (f"a: {node('[model.norm]')}", "'model.norm' is not a layer; write model.layers.5"),
    "a number": (f"a: {node('[5]')}", "5 is not a layer"),
    "negative layer": (f"a: {node('[model.layers.-1]')}", "'model.layers.-1' is not a layer"),
    "endless range": (f"a: {node('[model.layers.0-99999999999]')}", "beyond any model's last block"),
    "two nodes": (
        f"a: {node('[model.layers.0-4]')}\nb: {node('[model.layers.4-9]')}",
        "nodes 'a' and 'b' both claim block 4",
    ),
    "block twice": (f"a: {node('[model.layers.0-4, model.layers.3]')}", "'a' lists block 3 twice"),
    "node twice": (f"a: {node()}\na: {node('[model.layers.1]')}", "'a' appears twice, in lines 1 and 2$"),
    "node twice, as number and text": (f"1: {node()}\n'1': {node('[model.layers.1]')}", "'1'.* twice"),
    "key twice": ("a: {host: 'h:1', host: 'h:2', layers: [model.layers.0]}", "'host' appears twice"),
    "master": (f"master: {node()}", "cannot be called 'master'"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_named_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "topology.yml"
    path.write_text(text)
    with pytest.raises(TopologyError, match=message) as raised:
        load_topology(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"none\.yml cannot be read: No such file"):
        load_topology(tmp_path / "none.yml")


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "topology.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TopologyError, match=r"topology\.yml cannot be read: .*utf-8"):
        load_topology(tmp_path / "topology.yml")


def test_which_node() -> None:
    one = parse_topology(f"a: {node()}")
    two = parse_topology(f"a: {node()}\nb: {node('[model.layers.1]')}")
    assert one.node(None).name == "a"
    assert two.node("b").name == "b"
    with pytest.raises(TopologyError, match="no node 'c' in the topology; it has: a, b"):
        two.node("c")
    with pytest.raises(TopologyError, match="say --name with one of: a, b"):
        two.node(None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("192.168.1.20:10128", ("192.168.1.20", 10128)),
        ("[fe80::1]:10128", ("fe80::1", 10128)),
        ("[::]:65535", ("::", 65535)),
        ("pc.local:80", ("pc.local", 80)),
    ],
)
def test_address_in_two_and_back(text: str, parts: tuple[str, int]) -> None:
    assert parse_address(text) == parts
    assert Node("a", *parts, (range(1),)).address == text


def test_what_is_dumped_parses_to_the_same() -> None:
    topology = Topology(
        {
            "b": Node("b", "fe80::1", 10128, (range(3, 4), range(5, 9)), "Büro: 'the' #1 \N{HOT BEVERAGE}"),
            "a": Node("a", "10.0.0.1", 1, (range(3),)),
        }
    )
    again = parse_topology(dump_topology(topology))
    assert again == topology
    assert list(again.nodes) == ["b", "a"]
    assert "- model.layers.3\n  - model.layers.5-8\n" in dump_topology(topology)


REPLICAS = """
a: {host: "h:1", layers: [model.layers.0-2]}
b: {host: "h:2", layers: [model.layers.3-5]}
c: {host: "h:3", layers: [model.layers.3-5], replica: true}
"""


def test_a_replica_stands_in_and_is_left_out_of_the_layout() -> None:
    topology = parse_topology(REPLICAS)
    layout = [(node and node.name, span) for node, span in topology.layout(6)]
    assert layout == [("a", range(0, 3)), ("b", range(3, 6))]
    assert [node.replica for node in topology.nodes.values()] == [False, False, True]
    assert parse_topology(dump_topology(topology)) == topology


def test_replicas_alone_serve_their_blocks() -> None:
    topology = parse_topology(REPLICAS.replace("3-5]}", "3-5], replica: true}"))
    assert [(node and node.name, span) for node, span in topology.layout(7)] == [
        ("a", range(0, 3)),
        ("b", range(3, 6)),
        (None, range(6, 7)),
    ]


def test_replicas_that_do_not_join_up_are_refused() -> None:
    topology = parse_topology(REPLICAS.replace("3-5], replica", "2-5], replica").replace("b:", "# b:"))
    with pytest.raises(TopologyError, match="do not join up"):
        topology.layout(6)


def test_replica_is_true_or_false() -> None:
    with pytest.raises(TopologyError, match="node 'c': replica is true or false, not 'often'"):
        parse_topology(REPLICAS.replace("replica: true", "replica: often"))
