"""python -m tests.benchmarks.judge [--comparisons 1000]

How often does the judge err? Each comparison is of two models on the rows of 250 users of its own, some 3,000 of two
tasks, by the rule that promotes: of equal models, and of models of which one is truly better by the size that the
reports of the former call detectable (the mean over them). What is true is measured on 48,000 other users.

promoted_equal, promoted_gain    share of the comparisons in which the first model is better, and nothing holds it back
shown_equal, shown_gain          the same without guardrails
detectable                       that size, of the mean AUC of both tasks
margin                           of the guardrails
promoted_equal_sliced            of equal models with 20 slices, each a fifth of the users
held_back_by_slices              of those that are better by that, with these slices: by a slice alone
promoted_broken                  of models that are far better, and rank one of these slices at random
broken_but_for_slices            of these, those that no other guardrail would hold back

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json

from mmoe_rec.settings.sections import Evaluation
from tests.evaluation.judged_models import NOISE, noise_of_gain, verdicts

USERS, RESAMPLES, SLICED = 250, 200, 200


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=1000)
    number = parser.parse_args().comparisons
    equal, size = verdicts(NOISE, number, USERS, RESAMPLES)
    print(f"equal models: {dict(equal)}; detectable is {size:.4f}", flush=True)
    gain, _ = verdicts(noise_of_gain(size), number, USERS, RESAMPLES)
    print(f"better by that: {dict(gain)}", flush=True)
    found = {"detectable": round(size, 5), "margin": Evaluation().margin}
    few = min(number, SLICED)
    sliced, better, broken = (
        verdicts(noise, few, USERS, RESAMPLES, slices=True, broken=noise == 0)[0]
        for noise in (NOISE, noise_of_gain(size), 0.0)
    )
    print(f"{few} with slices: equal {dict(sliced)}; better {dict(better)}; broken {dict(broken)}", flush=True)
    found |= {"promoted_equal_sliced": sliced["better"] / few, "held_back_by_slices": better["only slices"] / few}
    found |= {"promoted_broken": broken["better"] / few, "broken_but_for_slices": broken["only slices"] / few}
    for name, counts in (("equal", equal), ("gain", gain)):
        found[f"promoted_{name}"] = counts["better"] / number
        found[f"shown_{name}"] = (counts["better"] + counts["held back"]) / number
    print(json.dumps(found))


if __name__ == "__main__":
    main()
