"""Random interleavings of training, sampling, saving, loading, cancelling and closing, over faults.

``python tests/proofs/interleavings.py --examples 300`` prints a summary.  If work was lost or
repeated, a future was never settled, or the weights differ from those of the same steps without
faults, it exits with 1 and prints the shortest sequence of calls found.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Run the state machine."""
    from hypothesis import HealthCheck, Phase, seed, settings
    from hypothesis.stateful import run_state_machine_as_test
    from proofs.stateful.machine import Interleavings, totals

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--steps", type=int, default=40, help="at most, of each example")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-shrink", action="store_true", help="do not shorten a failure")
    options = parser.parse_args()
    phases = [Phase.generate] if options.no_shrink else [Phase.generate, Phase.shrink]
    wanted = settings(
        max_examples=options.examples,
        stateful_step_count=options.steps,
        deadline=None,
        database=None,
        phases=phases,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    began = time.monotonic()
    try:
        run_state_machine_as_test(seed(options.seed)(Interleavings), settings=wanted)
    finally:
        for name, count in sorted(totals.items()):
            print(f"{count:8}  {name}")
        print(f"{time.monotonic() - began:.0f} s, seed {options.seed}")
    print("nothing lost, nothing repeated, all futures settled, all weights equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
