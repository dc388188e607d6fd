"""Which parameters of transformers' architectures rotate: every class in its auto mappings, built small and planned.

    python -m benchmarks.zoo_coverage            # all of them: about 10 minutes on one core
    python -m benchmarks.zoo_coverage --bare     # one class of each model type: about 3 minutes

Prints a table and writes ``benchmarks/results/zoo_coverage.json``. Exits with status 1 if an axis the plan names is
contradicted, or could not be put to the numerical test of ``tests/zoo/axis.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers

from tests.zoo.coverage import Coverage, cover
from tests.zoo.small_models import architectures

RESULTS = Path(__file__).parent / "results" / "zoo_coverage.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bare", action="store_true", help="one class of each model type only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    coverage = cover(architectures(bare=arguments.bare))
    print(report(coverage))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results(coverage), indent=1) + "\n")
    print(f"\nwritten to {RESULTS.relative_to(Path.cwd())}")
    sys.exit(bool(coverage.wrong or coverage.unproved))


def report(coverage: Coverage) -> str:
    devices = Counter(coverage.built.values())
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}",
        f"{len(coverage.built)} architectures planned ({devices['meta']} of them without weights: too big for a test)",
        f"{len(coverage.not_built)} could not be built:",
        *table(Counter(reason.partition(": ")[0] for reason in coverage.not_built.values())),
        f"{coverage.rotating.total()} parameters rotate, by module and name:",
        *table(coverage.rotating, most=20),
        f"their axes: {len(coverage.proved)} kinds proved, {len(coverage.wrong)} contradicted, "
        f"{len(coverage.unproved)} not tested",
        *(f"    {what}" for what in (*coverage.wrong.values(), *coverage.unproved.values())),
        f"{coverage.left.total()} parameters are left, by reason:",
        *table(coverage.left),
        "of these with two or more dims in a module not known:",
        *table(+coverage.unknown, most=40),
    ]
    return "\n".join(lines)


def table(counts: Counter[str], most: int | None = None) -> list[str]:
    rows = [f"  {count:7d}  {what}" for what, count in counts.most_common(most)]
    hidden = len(counts) - len(rows)
    return rows + ([f"           and {hidden} more kinds"] if hidden else [])


def results(coverage: Coverage) -> dict[str, object]:
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "built": coverage.built,
        "not_built": coverage.not_built,
        "rotating": dict(coverage.rotating.most_common()),
        "left": dict(coverage.left.most_common()),
        "unknown": dict((+coverage.unknown).most_common()),
        "axes_proved": sorted(f"{cls}.{name} {list(dims)}" for cls, name, dims, _ in coverage.proved),
        "axes_contradicted": sorted(coverage.wrong.values()),
        "axes_not_tested": sorted(coverage.unproved.values()),
    }


if __name__ == "__main__":
    main()
