"""How well a latency table foretells networks that it was made without: every family, over widths and resolutions.

python -m benchmarks.profile [--engines onnxruntime,openvino] [--formats float32,int8] [--threads 1] [--time 3m]
                             [--networks 40] [--table FILE] [--out FILE]

The table's kernels come from other networks of the zoo, the factors of its kinds from 24 that are not checked. Leave
the machine alone meanwhile. Prints a table on stderr and JSON on stdout, and writes that JSON to --out.
"""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from flyweight.profiling import CHECK_NETS, profile_machine, read_request, summary
from flyweight.terminal import Progress, show_profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="")
    parser.add_argument("--formats", default="float32,int8")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--time", default="3m")
    parser.add_argument("--networks", type=int, default=CHECK_NETS)
    parser.add_argument("--table", type=Path, default=Path("profile.json"), help="where the table itself goes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    request = read_request(args.engines, args.formats, args.threads, args.time, args.networks)
    with Progress(quiet=False) as progress:
        table, checked = profile_machine(request, progress.listen)
    table.write(args.table)
    with contextlib.redirect_stdout(sys.stderr):
        show_profile(args.table, table, checked, as_json=False)
    rows = [asdict(each) | {"error": round(each.error, 4)} for each in checked]
    told = json.dumps({"environment": table.environment, "summary": summary(checked), "networks": rows}, indent=2)
    print(told)
    if args.out:
        args.out.write_text(told + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
