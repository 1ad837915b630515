"""An evaluation of two models with everything that a page can show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from mmoe_rec.evaluation.comparison import Rule, compare
from mmoe_rec.evaluation.slices import SlicedModel, sliced
from mmoe_rec.evaluation.summary import summarise
from mmoe_rec.evaluation.sums import MeasuredTask, close_sums, measure
from mmoe_rec.evaluation.tradeoffs import Lists, Sweep, grid, told_of_sweep
from mmoe_rec.report.findings import findings


def evaluation(first: str = "new", second: str = "old", tasks: tuple[str, str] = ("bought", "spent")) -> dict[str, Any]:
    """The report of two models, of which the first is worse for some users; tasks: a binary one and a regression."""
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(300), 12)
    request, candidate = np.arange(len(user)) // 6, np.arange(len(user)) % 6
    logit = random.normal(size=len(user)) - 0.5
    label = (random.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(float)
    measured = [MeasuredTask(tasks[0], "binary"), MeasuredTask(tasks[1], "regression", 0.1)]
    kind = np.where(user < 60, "few & far", "many")
    models, sums = {}, {}
    for name, noise in ((first, np.where(user < 60, 3.0, 0.1)), (second, 0.5)):
        predicted = 1 / (1 + np.exp(-logit - noise * random.normal(size=len(user))))

        def of(rows: np.ndarray, predicted: np.ndarray = predicted) -> Any:
            predictions = {tasks[0]: predicted[rows], tasks[1]: 3 * predicted[rows]}
            labels = {tasks[0]: label[rows], tasks[1]: 3 * label[rows] + logit[rows]}
            ids = {"score": predicted[rows], "candidates": candidate[rows]}
            return close_sums(measure(measured, user[rows], request[rows], predictions, labels, **ids))

        sums[name] = SlicedModel(
            of(np.arange(len(user))),
            {("kind", each): of(np.flatnonzero(kind == each)) for each in ("few & far", "many")},
        )
        gates = {task: [0.25, 0.75] for task in tasks}
        models[name] = {"address": f"models:/{name}", "summary": summarise(sums[name].whole, 50), "gates": gates}
    logs = np.log(np.stack([1 / (1 + np.exp(-logit)), random.random(len(user))], 1))
    ids = pa.array(user), pa.array(request)
    labels = np.stack([label, random.integers(2, size=len(user))], 1).astype(float)
    sweep = Sweep(tasks, Lists(*ids, logs, labels), grid(2, (0.6, 0.4)))
    summaries = {name: each["summary"] for name, each in models.items()}
    whole = {name: each.whole for name, each in sums.items()}
    return {
        "title": f"Evaluation of {tasks[0]}",
        "models": models,
        "comparison": compare(whole, first, summaries, list(tasks), "auc", Rule(), 50),
        "findings": [{"model": first, **each} for each in findings(summaries[first])]
        + [{"model": second, "check": "seen", "message": f"'{second}' was trained on these rows"}],
        "slices": sliced(sums, first, 50),
        "tradeoffs": told_of_sweep(sweep, 20),
        "placement": [
            {"feature": "position", "value": value, "rows": 100, "effects": {"bought": odds, "spent": odds - 1}}
            for value, odds in (("1", 1.5), ("<2>", 0.5))
        ],
        "facts": {f"log of {tasks[0]}": "somewhere"},
    }
