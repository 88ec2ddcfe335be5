"""Nothing that is given to the node can become code: no pickle, no eval, no code of a model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [path for name in ("albireo", "ipc", "workers") for path in (ROOT / name).rglob("*.py")]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load"}
WORDS = ("trust_remote_code", "allow_pickle", "recv_pyobj", "send_pyobj", "weights_only")


def faults(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (n.name for n in node.names if n.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] in MODULES:
                yield str(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                yield called
    yield from (word for word in WORDS if word in source)


def test_the_check_sees_what_it_looks_for() -> None:
    for source in ("import pickle", "from marshal import loads", "eval('1')", "torch.load('x')",
                   "f(trust_remote_code=True)"):  # fmt: skip
        assert list(faults(source)), source
    assert not list(faults("import re; re.compile('x')"))


def test_no_file_of_the_package_has_any() -> None:
    assert len(FILES) > 200
    found = {str(path.relative_to(ROOT)): list(faults(path.read_text())) for path in FILES}
    assert {name: each for name, each in found.items() if each} == {}


def test_chat_templates_are_sandboxed() -> None:
    users = [path.name for path in FILES if "Environment(" in path.read_text()]
    assert users == ["chat_template.py"]
    assert (
        "ImmutableSandboxedEnvironment" in (ROOT / "workers/tokenizer/chat_template.py").read_text()
    )
