"""What the columns and findings of the page mean, and what to do about them."""

from mmoe_rec.inspection.findings import LEAK_AUC, LEAST_COVERAGE, NEVER_SEEN, RATE_CHANGE, STRONG_DRIFT, UNKNOWN
from mmoe_rec.inspection.inputs import FREQUENT
from mmoe_rec.inspection.statistics import RATE_SMOOTHING

CHECKS = {
    "leak": (
        "Possible leakage",
        f"A feature that alone ranks a task with an AUC above {LEAK_AUC} usually holds the outcome itself, or "
        "something written after it. Find out when its column is filled; leave it out if that is after the "
        "request.",
    ),
    "files": (
        "Files left out",
        "What is in these files is in neither training nor evaluation. Write them again, or take them out of the log.",
    ),
    "labels": (
        "Tasks without labels",
        "Labels that mature late are unobserved until then: move the ends of the splits back, or wait.",
    ),
    "users": (
        "Users in training and test rows",
        "What is measured then tells nothing of how users that training has not seen are predicted. Give all rows of a "
        "user one split, or split by time.",
    ),
    "rate": (
        "Label rates that change",
        f"More than {RATE_CHANGE:g} times between splits. Look at the rates by week: a step is often a change "
        "in logging; a slope towards the end, labels that have not matured.",
    ),
    "constant": ("Constant inputs", "They cost space and teach nothing. Take them out, or check the column."),
    "coverage": (
        "Hardly any values",
        f"Present in less than {LEAST_COVERAGE:.0%} of the rows. For a counter's recency this means that it "
        "rarely happened before, which may be fine.",
    ),
    "unknown": (
        "Ids that training does not know",
        f"More than {UNKNOWN:.0%} of the test rows' ids share the vocabulary's hashed rows. Train on later "
        "rows or more often, lower `min_count`, or describe such users and candidates by other features too.",
    ),
    "drift": (
        "Strong drift from training to test",
        f"PSI above {STRONG_DRIFT} beyond chance. Counters and histories drift where the log begins with an "
        "empty past: start training later (`split.train_start`) or count over windows (`window_days`). "
        "Otherwise something has changed in the world or in the logging; train on later rows.",
    ),
    "empty table": (
        "Tables that are mostly empty",
        f"More than {NEVER_SEEN:.0%} of the rows are never looked up in training: wasted memory.",
    ),
}

COLUMNS = {
    "role": "What the feature describes: the user, the candidate, the context of the request, or the placement.",
    "has value": (
        "Share of training rows, then of test rows, in which the feature has a value. A number without a "
        "missing-indicator always had one in training; whether test rows lack it cannot be seen in encoded "
        "rows."
    ),
    "distinct": (
        "Different values in training rows: of an id, those with a table row of their own, of all if there are more; "
        "of a cross, buckets in use. ~ is an estimate, good to 2%."
    ),
    "unknown": (
        "Share of the ids in training rows, then in test rows, that have no table row of their own and share "
        "a hashed one (out of the vocabulary)."
    ),
    "PSI": (
        "Population stability index between training and test rows: below .1 stable, .1 to .25 some drift, "
        "above .25 strong drift."
    ),
    "AUC": (
        "How well the feature alone ranks the validation rows of a task: .5 is chance, 1 is perfect. Above "
        ".98 is suspicious."
    ),
}

MEASURES = {
    "PSI": (
        "Sum over bins of (q - p) ln(q / p), p and q being the shares of training and test rows; half a row "
        "is added to each bin. Numbers: between the quantiles at which the model may bend, or else about 20 "
        f"bins of equal training mass, and missing values. Ids: the {FREQUENT} most frequent in training, "
        "unknown, missing, and all others. A finding first subtracts (bins - 1) (1 / N + 1 / M), what N and "
        "M rows have by chance."
    ),
    "AUC alone": (
        "Numbers: over a histogram of about 1,000 quantiles, whichever way round, missing values below or "
        "above all others. Ids: by the rate of each table row in training rows, mixed with "
        f"{RATE_SMOOTHING:g} rows of the overall rate; of a list the mean of its ids' rates. All on "
        "validation rows. A regression's label counts as positive above its mean in training."
    ),
    "Order of findings": (
        "Problems first. Warnings by their rough cost: the share of the test rows that they spoil times how well "
        "the feature alone ranks validation rows (2 AUC - 1). Unknown ids of users and candidates count in full; of a "
        "drift, only the rows where training had less than half as many."
    ),
    "Units": (
        "Numbers are standardised as the model reads them: in standard deviations from the mean of training rows "
        "(after a logarithm, for counts and recencies)."
    ),
    "Counts": "Users, candidates and requests are exact below 65,536 and estimated beyond, good to 0.4%.",
    "Weeks": (
        "Of request time, from Monday 00:00 UTC. Training labels that matured after the training's end are "
        "unobserved, as the model may not know them."
    ),
    "Tables": "float32: 4 bytes a number. Row-wise Adagrad keeps 4 bytes more for each row.",
}

EVALUATION = {
    "Intervals": (
        "95%, from redrawing whole users, as rows of one user are alike; of more than 4,096 users, groups of users "
        "are redrawn. Of a metric they are percentiles, or Student's where few users tell; of a difference Student's, "
        "as models see the same redrawn users. Where few have most of the rows, the weight, the positive labels or the "
        "influence, degrees of freedom are those of the effective number of users."
    ),
    "Verdict": (
        "A model is better where the interval of `evaluation.decide_by` lies above that of the other model, and no "
        "task may have lost more than `evaluation.margin`, nor are probabilities off by more than "
        "`evaluation.calibration`. A size that nine of ten evaluations like this one would show is 3.24 standard "
        "errors."
    ),
    "Many differences": (
        "Of twenty differences by chance alone, one is outside of its interval. So p-values are corrected by Holm's "
        "method: the chance that any of the coloured ones is none is below 5%."
    ),
    "AUC, average precision": (
        "Exact, over all rows with an observed label. GAUC is the mean AUC within users, or requests."
    ),
    "normalised_entropy": "The logloss over the entropy of the base rate: 1 is a model that knows the base rate alone.",
    "calibration, ece": (
        "The sum of the predictions over that of the labels; the mean distance of observed rates from predictions, in "
        "ten bins of equal mass."
    ),
    "NDCG, MRR, MAP, recall, hit rate": (
        "Means over requests whose rows differ in relevance; rows of equal scores count by the mean over their "
        "orders. Of the score a row's relevance is the sum of `score_weight` x label."
    ),
    "coverage, Gini, novelty": (
        "Of the first rows of all requests: which share of the candidates is shown at all, how unevenly, and how "
        "little known these are, in bits."
    ),
    "Slices": (
        "A slice's AUC may be low because its rows are alike, not because the model is worse there: between models, "
        "the difference on the same slice tells more. Where slices hold parts of requests, their NDCG is that of these "
        "shorter lists, and is compared between models alone. A range (1, 2] holds what is above 1 and at most 2."
    ),
}

_OF_REQUESTS = ("NDCG, MRR, MAP, recall, hit rate", "coverage, Gini, novelty")
EVALUATION_OF_ROWS = {name: text for name, text in EVALUATION.items() if name not in _OF_REQUESTS} | {
    "Intervals": (
        "95%, from redrawing rows; of more than 4,096, groups of rows are redrawn. Of a metric they are percentiles; "
        "of a difference Student's, as models see the same redrawn rows."
    ),
    "AUC, average precision": "Exact, over all rows with an observed label.",
}
"""Where each row is a user and a request of its own, as in a plain table."""

TRAININGS = {  # in which UNITS are users, or rows
    "Mean and interval": (
        "The mean over trainings, on the same rows. It errs by the seeds, with the variance of the trainings / their "
        "number, and by the UNITS, with that of the mean when UNITS are redrawn; the interval is Student's, with "
        "degrees of freedom by Welch and Satterthwaite."
    ),
    "Between trainings": "Their standard deviation: how far one training is from the mean of many, typically.",
    "Between UNITS": "The standard error of the mean from the choice of UNITS, by redrawing them.",
    "Other settings": (
        "The difference of the means: its variance is that of either's trainings / their number, and that of the "
        "difference when the same UNITS are redrawn for both. `evaluation.decide_by`, which was chosen before, decides "
        "by its p-value, corrected for the number of other settings. Other differences are coloured if they are "
        "significant after Holm's correction; intervals are not corrected."
    ),
}
