"""The packages' public names: all there, and none of them costs anything before it is used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PACKAGES = ("gemma_edge", "gemma_edge.runtime", "gemma_edge.export")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_listed(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"{package}.*no attribute 'nothing'"):
        _ = importlib.import_module(package).nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_neither_numpy_nor_an_engine(package: str) -> None:
    heavy = "{'numpy', 'onnx', 'onnxruntime', 'sentencepiece', 'jinja2'}"
    code = f"import sys, {package}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert result.stdout.strip() == "[]"
