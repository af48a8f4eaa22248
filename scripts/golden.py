"""Renews tests/golden/models.json: exact counts of every registered model. Run: python -m scripts.golden"""

import json
from pathlib import Path

from flyweight.costs import cost
from flyweight.zoo import list_models, spec_of

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "models.json"


def counts(name: str) -> dict[str, int]:
    """Parameters and multiply-accumulates at 1000 classes and the model's usual input, and its peak of activations."""
    counted = cost(spec_of(name))
    return {"params": counted.params, "macs": counted.macs, "peak_values": counted.peak_values}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: counts(name) for name in list_models()}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN}")
