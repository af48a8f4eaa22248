"""Runs timm's own tests of models on the zoo, as `register()` brings it there. Needs timm's sources, which hold them.

pip install --editable . torch==2.14.1 torchvision==0.29.1 timm==1.0.31 pytest
pip download timm==1.0.31 --no-deps --no-binary timm && tar xzf timm-1.0.31.tar.gz
Run: python -m scripts.timm_tests timm-1.0.31/tests/test_models.py [options of pytest]
"""

import sys

import pytest

from flyweight.timm_models import PREFIX, register

SCRIPT = "TorchScript compiles neither the properties that describe a net nor functions of any number of tensors (Cat)"
VALID = "windows without padding leave less of 96 pixels than the stride tells; timm exempts its own by their names"
# Test → part of a network's name → why the test does not fit it. An exception that passes is a failure.
EXCEPTIONS = {
    "test_model_forward_torchscript": {"": SCRIPT},
    "test_model_forward_fx_torchscript": {"inception_v2": "TorchScript does not compile the pool with SAME padding"},
    "test_model_forward_features": dict.fromkeys(("inception_v3", "inception_v4", "inception_resnet"), VALID),
}


class Ours:
    """Keeps the tests of our networks, and expects the exceptions to fail."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        ours = [item for item in items if model_name(item).startswith(PREFIX)]
        for item in ours:
            for part, reason in EXCEPTIONS.get(item.name.split("[")[0], {}).items():
                if part in model_name(item):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        items[:] = ours


def model_name(item: pytest.Item) -> str:
    """The network that a test is about, or ""."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return str(params.get("model_name", ""))


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    register()
    sys.exit(pytest.main([*sys.argv[1:], "-p", "no:cacheprovider"], plugins=[Ours()]))
