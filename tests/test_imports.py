"""The house's rule that imports point one way, read from the code itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cake

PACKAGE = Path(cake.__file__).parent
FORBIDDEN = [  # who, whom, and who may nevertheless
    ("model", "cake.net", ()),
    ("model", "cake.protocol", ()),
    ("weights", "cake.net", ()),
    ("weights", "cake.protocol", ()),
    ("master.py", "cake.worker", ()),
    ("chat.py", "cake.worker", ()),
    ("worker.py", "cake.master", ()),
    ("worker_command.py", "cake.master", ()),
    ("model", "cake.weights", ()),
    ("protocol", "cake.model", ()),
    ("protocol", "asyncio", ()),
    ("model", "asyncio", ()),
    ("protocol", "socket", ()),
    ("protocol", "torch", ("tensors.py",)),
    ("protocol", "cake.net", ()),
    ("model", "cake.stage", ()),
    ("weights", "cake.stage", ()),
    ("weights", "cake.pipeline", ()),
    ("stage.py", "cake.net", ()),
    ("net", "cake.stage", ()),
    ("net", "cake.remote", ()),
    ("remote.py", "cake.dialling", ()),
    ("remote.py", "cake.pipeline", ()),
    ("pipeline.py", "cake.generator", ()),
    ("generator.py", "cake.master", ()),
    ("generator.py", "cake.api", ()),
    ("losses.py", "cake.scheduler", ()),
    ("figures.py", "cake.pipeline", ()),
    ("figures.py", "cake.generator", ()),
    ("cluster_view.py", "cake.api", ()),
    ("cluster_view.py", "starlette", ()),
    ("cluster_view.py", "prometheus_client", ()),
    ("api", "cake.master", ()),
    ("api", "cake.worker", ()),
    ("api/service.py", "starlette", ()),
    ("api/service.py", "cake.api.openai", ()),
    ("api/service.py", "cake.api.ollama", ()),
    ("api/service.py", "cake.api.anthropic", ()),
    ("api/openai", "cake.api.ollama", ()),
    ("api/openai", "cake.api.anthropic", ()),
    ("api/ollama", "cake.api.openai", ()),
    ("api/ollama", "cake.api.anthropic", ()),
    ("api/anthropic", "cake.api.openai", ()),
    ("api/anthropic", "cake.api.ollama", ()),
    ("net", "torch", ()),
    ("net", "cake.model", ()),
    ("", "pickle", ()),
    ("", "marshal", ()),
    ("", "shelve", ()),
]


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, those inside its functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out in full"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("who", "whom", "allowed"), FORBIDDEN)
def test_imports_point_one_way(who: str, whom: str, allowed: tuple[str, ...]) -> None:
    place = PACKAGE / who
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    for path in files:
        if path.name in allowed:
            continue
        wrong = [name for name in imported(path) if name == whom or name.startswith(f"{whom}.")]
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_nothing_is_evaluated() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # torch.load unpickles
                assert ast.unparse(node.func) != "torch.load", f"{path}:{node.lineno}"
            assert not (isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"))
