"""python -m tests.benchmarks.judge [--comparisons 200]

How often does the judge err? Each comparison is of two models on the rows of 250 users of its own, some 3,000 of two
tasks, in 20 slices of a fifth of the users each, by the rule that promotes: of `equal` models; of those of which one
is truly better by the size that the reports of the former call detectable (the mean over them), its `gain`; and of
models of which one is far better, but for a slice that it ranks at random, on 500 users, `broken`, or but for the last
task, in which it differs for 1, 2 or 5 users alone (`few_1` ...). What is true is measured on 48,000 other users.

promoted_...         share of the comparisons in which the first model is better, and nothing holds it back
shown_...            the same without guardrails
by_slices_alone_...  share in which nothing but a slice holds it back
detectable           that size, of the mean AUC of both tasks
margin               of the guardrails

The last line is JSON.
"""

import argparse
import json

from mmoe_rec.settings.sections import Evaluation
from tests.evaluation.judged_models import NOISE, noise_of_gain, verdicts

USERS, RESAMPLES = 250, 200


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=200)
    number = parser.parse_args().comparisons
    equal, size = verdicts(NOISE, number, USERS, RESAMPLES, slices=True)
    found, counts = {"detectable": round(size, 5), "margin": Evaluation().margin}, {"equal": equal}
    counts["gain"], _ = verdicts(noise_of_gain(size), number, USERS, RESAMPLES, slices=True)
    counts["broken"], _ = verdicts(0.0, number, 2 * USERS, RESAMPLES, slices=True, broken=True)
    for few in (1, 2, 5):
        counts[f"few_{few}"], _ = verdicts(NOISE / 2, number, USERS, RESAMPLES, few=few)
    for name, each in counts.items():
        print(f"{name}: {dict(each)}", flush=True)
        found[f"promoted_{name}"] = each["better"] / number
        found[f"shown_{name}"] = (each["better"] + each["held back"]) / number
        found[f"by_slices_alone_{name}"] = each["only slices"] / number
    print(json.dumps(found))


if __name__ == "__main__":
    main()
