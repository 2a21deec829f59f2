"""Put the figures of the demo into README.md, from the JSON that `examples/repvgg.py` writes.

    make demo ARGS='--json benchmarks/results/repvgg.json'     on an idle machine
    python benchmarks/figures.py                               fills the block
    python benchmarks/figures.py --check                       fails if the block is not what the file says

Without the file the block says how to get the figures.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.marks import filled  # noqa: E402 (the path comes first)

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "repvgg.json"
BLOCK = "figures: examples/repvgg.py"
ABSENT = "Run `make demo`.\n"


def block(results: Path = RESULTS) -> str:
    """The text between the marks."""
    if not results.is_file():
        return ABSENT
    run: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
    from demo.comparison import Comparison, Figures  # the example's own rows, so that README and terminal agree
    from demo.showing import rows

    fields = {name: run[name] for name in Comparison.__dataclass_fields__}
    forms = {name: Figures(**fields[name]) for name in ("before", "after")}
    result = Comparison(**{**fields, **forms})
    data, machine = run["data"], run["machine"]
    lines = ["| | before `fuse` | after `fuse` | change |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(result)]
    lines += [
        "",
        f"Largest difference between logits {result.largest_difference:.1e} (largest logit {result.largest_logit:.1f});"
        f" {result.predictions_changed} of {result.predictions:,} predictions changed. Net `{run['arch']}`,"
        f" {data['name']} at {data['size']}×{data['size']}, {data['train']:,} images to train on,"
        f" {data['test']:,} to test on.",
        f"Machine: {machine['name']}, device {machine['device']}, {machine['threads']} threads,"
        f" torch {machine['torch']}, Python {machine['python']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="default benchmarks/results/repvgg.json")
    add("--check", action="store_true", help="write nothing; fail if the block is not current")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    text = block(args.json)
    new = filled(old, BLOCK, text)
    if args.check:
        print(f"the figures in README.md are {'current' if new == old else 'not current'}")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
