"""The main job from Python, on the data that comes along, and the classifier that it leaves.

python examples/fit_and_predict.py    (about a minute)
"""

import numpy as np

import flyweight
from flyweight.data import open_source

run = flyweight.fit("demo", budget="latency<=1ms, size<=150KB", time="1m")

result = run.result
print(f"{result['winner']['name']}: {100 * result['test']['top1']:.1f} % of {result['test']['n']} test pictures")
for limit in result["budget"]:
    print(f"  {limit['name']} {limit['op']} {limit['limit']:g}: {limit['measured']:g}")

# Pictures may be paths, Pillow images, encoded bytes or uint8 arrays.
pictures = open_source("demo").images
assert isinstance(pictures, np.ndarray)
for name, probabilities in zip(run.predict(pictures[:3]), run.predict_proba(pictures[:3]), strict=True):
    print(f"{name} ({100 * probabilities.max():.0f} %)")
print(f"open {run.folder / 'report.html'}")
