"""Registration with transformers, in fresh processes: whichever is imported first, or with no transformers at all."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitinfer.integrations import hooks, install

CHECK = """
from transformers.quantizers import auto
import bitinfer.integrations.hooks as hooks, sys
assert auto.AUTO_QUANTIZER_MAPPING["bitinfer"].__module__ == "bitinfer.integrations.transformers"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bitinfer"] is bitinfer.BitinferConfig
assert bitinfer.BitinferConfig in auto.LOADING_ATTRIBUTES_CONFIG_TYPES
assert not any(isinstance(f, hooks._PostImportFinder) for f in sys.meta_path)
"""
ORDERS = {
    "bitinfer first": "import bitinfer\nimport transformers",
    "transformers loaded": "from transformers import AutoModelForCausalLM\nimport bitinfer",
    "a model's module first": "import bitinfer\nimport transformers.models.llama.modeling_llama",
    "the config first": "from bitinfer import BitinferConfig\nimport bitinfer",
}


def run(code: str) -> str:
    """Run code in a fresh interpreter, where a warning is an error."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_registered_in_any_order(order):
    run(ORDERS[order] + CHECK)


def test_import_bitinfer_does_not_import_transformers():
    out = run(
        "import sys, json, bitinfer\n"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('transformers', 'huggingface_hub')]))"
    )
    assert json.loads(out) == []


def test_works_without_transformers():
    run(
        "import sys\n"
        "sys.modules['transformers'] = None\n"  # the import system's own way to say that there is none
        "import bitinfer, torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(40, 8))\n"
        "bitinfer.replace_linear(model)\n"
        "assert model(torch.randn(2, 40)).shape == (2, 8)\n"
        "try:\n"
        "    bitinfer.BitinferConfig\n"
        "except ImportError as error:\n"
        "    assert 'transformers' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )


# the hook itself, on a module of our own


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make the hook wait for a module of ours, and write down when it registers."""
    calls: list[str] = []
    monkeypatch.setattr(hooks, "WATCHED", "bitinfer_test_watched")
    monkeypatch.setattr(hooks, "register", lambda: calls.append("registered"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / "bitinfer_test_watched.py").write_text(
        "import os\nif 'BITINFER_TEST_FAIL' in os.environ: raise OSError\n"
    )
    yield calls
    sys.modules.pop("bitinfer_test_watched", None)


def test_the_hook_waits_and_goes_away(watched):
    before = list(sys.meta_path)
    install()
    install()
    assert len(sys.meta_path) == len(before) + 1 and not watched
    assert importlib.util.find_spec("bitinfer_test_watched") is not None  # looking is not importing
    assert not watched
    module = importlib.import_module("bitinfer_test_watched")
    assert watched == ["registered"] and sys.meta_path == before
    assert module.__spec__ is not None and module.__loader__.get_source(module.__name__).startswith("import os")
    install()  # it is there now
    assert watched == ["registered"] * 2 and sys.meta_path == before


def test_the_hook_stays_when_the_import_fails(watched, monkeypatch):
    install()
    monkeypatch.setenv("BITINFER_TEST_FAIL", "1")
    with pytest.raises(OSError):
        importlib.import_module("bitinfer_test_watched")
    assert not watched
    monkeypatch.delenv("BITINFER_TEST_FAIL")
    importlib.import_module("bitinfer_test_watched")
    assert watched == ["registered"]


def test_a_transformers_that_does_not_fit_gets_a_warning(monkeypatch):
    def fail(name: str) -> None:
        raise ImportError("cannot import name 'ConversionOps'")

    monkeypatch.setattr(hooks, "import_module", fail)
    with pytest.warns(RuntimeWarning, match="could not register with transformers .*ConversionOps.* 5.17"):
        hooks.register()
