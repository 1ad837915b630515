"""An evaluation of two models with everything that a page can show."""

import numpy as np

from mmoe_rec.evaluation.comparison import Results
from mmoe_rec.evaluation.summary import MeasuredModel, summarize
from mmoe_rec.evaluation.sums import EvaluationSums, MeasuredTask
from mmoe_rec.settings.sections import Evaluation
from tests.evaluation.trees import measure


def evaluation(first: str = "new", second: str = "old", tasks: tuple[str, str] = ("bought", "spent")) -> Results:
    """The report of two models, of which the first is worse for some users; tasks: a binary one and a regression."""
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(300), 12)
    request, candidate = np.arange(len(user)) // 6, np.arange(len(user)) % 6
    logit = random.normal(size=len(user)) - 0.5
    label = (random.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(float)
    measured = [MeasuredTask(tasks[0], "binary"), MeasuredTask(tasks[1], "regression", 0.1)]
    kind = np.where(user < 60, "few & far", "many")
    models = {}
    for name, noise in ((first, np.where(user < 60, 3.0, 0.1)), (second, 0.5)):
        predicted = 1 / (1 + np.exp(-logit - noise * random.normal(size=len(user))))

        def of(rows: np.ndarray, predicted: np.ndarray = predicted) -> EvaluationSums:
            predictions = {tasks[0]: predicted[rows], tasks[1]: 3 * predicted[rows]}
            labels = {tasks[0]: label[rows], tasks[1]: 3 * label[rows] + logit[rows]}
            ids = {"score": predicted[rows], "candidates": candidate[rows]}
            return measure(measured, user[rows], request[rows], predictions, labels, **ids)

        whole = of(np.arange(len(user)))
        models[name] = MeasuredModel(
            whole,
            summarize(whole, 50),
            f"models:/{name}",
            training_overlap=[f"was trained on rows of '{name}'"] if name == second else [],
            slices={("kind", item): of(np.flatnonzero(kind == item)) for item in ("few & far", "many")},
        )
    facts = {f"log of {tasks[0]}": "somewhere"}
    return Results(models, tasks, Evaluation(primary_metric="auc"), f"Evaluation of {tasks[0]}", facts)
