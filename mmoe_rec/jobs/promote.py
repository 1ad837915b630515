"""Whether a version of the registry takes an alias from the one that holds it, and the way back.

Both are measured on the settings' test rows, by the rule of every comparison. A version is refused where it is not
shown to be better, where a guardrail holds it back, where either has seen the rows before, where something is
suspicious about it that is not about the holder, where it can't be served, or where it answers more slowly. What was
decided, and why, is kept with the version and with its run.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmoe_rec.errors import UserError
from mmoe_rec.evaluation.comparison import BETTER
from mmoe_rec.evaluation.results import Results
from mmoe_rec.evaluation.scoring import NotFiniteError
from mmoe_rec.jobs.evaluate import PROMOTION, evaluate_found
from mmoe_rec.report.findings import find_all
from mmoe_rec.report.sentences import describe_verdict
from mmoe_rec.settings.sections import Settings
from mmoe_rec.tracking.registry import (
    FoundModel,
    Version,
    fetch_model,
    find_holder,
    forget_replaced,
    get_replaced,
    get_version,
    list_aliases,
    move_alias,
    tag_version,
)

if TYPE_CHECKING:
    from mmoe_rec.inference.ranker import Ranker


_CALLS, _ROUNDS, _CANDIDATES = 5, 20, 200  # of an example; the fastest round counts


@dataclass(frozen=True)
class PromotionRequest:
    """name: of the registered model; challenger: number of a version, or an alias; alias: that it is to take;
    slower_at_most: largest ratio of the times in which both answer."""

    name: str
    challenger: str
    alias: str
    slower_at_most: float = 1.5


@dataclass(frozen=True)
class Decision:
    """promoted: whether the version holds the alias now; reasons: sentences; results: where both were measured."""

    version: Version
    promoted: bool
    reasons: tuple[str, ...]
    results: Results | None = None


def promote_version(settings: Settings, asked: PromotionRequest, out: Path) -> Decision:
    """Decides, and moves the alias if the challenger is better; writes the report to a folder.

    Raises UserError for a version that there is not, or where the two can't be compared.
    """
    uri = settings.tracking.address
    challenger, holder = _version(asked.name, asked.challenger, uri), find_holder(asked.name, asked.alias, uri)
    if holder == challenger:
        return Decision(challenger, True, (f"version {challenger.number} holds '{asked.alias}' already",))
    mine = _loaded(challenger, uri)
    if isinstance(mine, Trouble):
        return _refused(challenger, asked, (f"version {challenger.number} can't be served: {mine.why}",), uri)
    if holder is None:
        return _moved(challenger, None, asked, (f"no version held '{asked.alias}' before",), uri)
    its = _loaded(holder, uri)
    if isinstance(its, Trouble):
        told = f"version {holder.number}, which holds '{asked.alias}', can't be served: {its.why}"
        if its.for_good:
            return _moved(challenger, holder, asked, (told,), uri)
        return _refused(challenger, asked, (f"{told}; so the two can't be compared here",), uri)
    return _judged(settings, asked, out, (challenger, mine), (holder, its))


def _judged(
    settings: Settings,
    asked: PromotionRequest,
    out: Path,
    one: tuple[Version, Ranker],
    other: tuple[Version, Ranker],
) -> Decision:
    """Decides by the test rows between two versions, of which the second holds the alias."""
    uri, (challenger, mine), (holder, its) = settings.tracking.address, one, other
    names = _named(challenger), _named(holder)
    found = {_named(each): _found(each, uri) for each in (challenger, holder)}
    try:
        results = evaluate_found(settings, found, out, PROMOTION).results
    except NotFiniteError as error:
        if error.name == names[0]:
            return _refused(challenger, asked, (str(error),), uri)
        return _moved(challenger, holder, asked, (str(error),), uri)
    against = _against(results, *names)
    if (ratio := _slower(mine, its, found[names[0]].folder)) > asked.slower_at_most:
        against.append(
            f"{names[0]} answers {ratio:.1f} times as slowly as {names[1]}, and {asked.slower_at_most:g} times is "
            "allowed (--slower-at-most)"
        )
    if against:
        return _refused(challenger, asked, tuple(against), uri, results)
    assert results.comparison is not None
    sentence = describe_verdict(results.comparison, names[1], results.first.summary)
    return _moved(challenger, holder, asked, (sentence,), uri, results)


def roll_back(name: str, alias: str, uri: str) -> Decision:
    """Gives an alias back to the version that held it before the one that holds it now.

    Raises UserError where that is unknown, or can't be served any more, or the alias moves meanwhile.
    """
    holder = find_holder(name, alias, uri)
    if holder is None:
        raise UserError(f"no version of '{name}' holds '{alias}'")
    before = get_replaced(holder, alias, uri)
    if before is None:
        raise UserError(
            f"it is not known which version of '{name}' held '{alias}' before version {holder.number}; point the alias "
            "at it by hand"
        )
    version = get_version(name, before, uri)
    if isinstance(trouble := _loaded(version, uri), Trouble):
        raise UserError(f"version {before}, which held '{alias}' before, can't be served: {trouble.why}")
    if find_holder(name, alias, uri) != holder:
        raise UserError(f"'{alias}' has moved meanwhile: run the command again")
    move_alias(name, alias, before, uri)
    forget_replaced(holder, alias, uri)
    tag_version(holder, {"promoted": f"no more: '{alias}' went back to version {before}"}, uri)
    tag_version(version, {"promoted": f"'{alias}' again, after version {holder.number}"}, uri)
    return Decision(
        version, True, (f"'{alias}' is version {before} again, which held it before version {holder.number}",)
    )


def _version(name: str, asked: str, uri: str) -> Version:
    asked = asked.removeprefix(f"models:/{name}/").removeprefix(f"models:/{name}@")
    if asked.isdigit():
        return get_version(name, asked, uri)
    found = find_holder(name, asked, uri)
    if found is None:
        held = ", ".join(f"'{alias}' ({number})" for alias, number in sorted(list_aliases(name, uri).items()))
        others = f"those that are held are {held}" if held else "none is held"
        raise UserError(f"no version of '{name}' holds the alias '{asked}': {others}; or give the number of a version")
    return found


def _named(version: Version) -> str:
    return f"version {version.number}"


def _found(version: Version, uri: str) -> FoundModel:
    return FoundModel(version.address, fetch_model(version.address, uri), version.run_id)


@dataclass(frozen=True)
class Trouble:
    """Why a version can't be served; for_good: its files are damaged, or of another format, wherever it is loaded."""

    why: str
    for_good: bool


def _loaded(version: Version, uri: str) -> Ranker | Trouble:
    """The ranker, whose files, format and example were checked, or why there is none here.

    Raises UserError where its files can't be fetched, which says nothing about it.
    """
    from mmoe_rec.inference.ranker import OtherScoresError, Ranker

    folder = fetch_model(version.address, uri)
    try:
        return Ranker.load(folder)
    except (UserError, RuntimeError) as error:  # or it fails at its own example, or for want of memory
        for_good = isinstance(error, UserError) and not isinstance(error, OtherScoresError)
        return Trouble(" ".join(str(error).split()), for_good)


def _against(results: Results, mine: str, its: str) -> list[str]:
    """What speaks against the challenger."""
    assert results.comparison is not None
    verdict, findings = results.comparison.against[its].verdict, find_all(results)
    found = [f"{name} {seen}" for name, each in results.models.items() for seen in each.seen]
    if verdict is None or verdict.kind != BETTER:
        found.append(describe_verdict(results.comparison, its, results.first.summary))
    known = {(each.check, each.task) for each in findings if each.model == its}
    found += [
        each.message
        for each in findings
        if each.model == mine and each.task is not None and (each.check, each.task) not in known
    ]
    return found


def _slower(mine: Ranker, its: Ranker, artifact: Path) -> float:
    """How many times as long the first takes to answer an example as the second, the fastest of many calls of each."""
    example = json.loads((artifact / "example_request.json").read_text(encoding="utf-8"))
    # As many candidates as lists have in practice, of which the example has few.
    times = max(1, _CANDIDATES // len(next(iter(example["candidates"].values()))))
    candidates = {name: values * times for name, values in example["candidates"].items()}
    fastest: dict[int, float] = {}
    for _ in range(_ROUNDS):
        for side, ranker in enumerate((mine, its)):
            begun = time.perf_counter()
            for _ in range(_CALLS):
                ranker.rank(example["user"], example["context"], candidates)
            took = time.perf_counter() - begun
            fastest[side] = min(took, fastest.get(side, took))
    return fastest[0] / fastest[1]


def _moved(
    version: Version,
    holder: Version | None,
    asked: PromotionRequest,
    reasons: tuple[str, ...],
    uri: str,
    results: Results | None = None,
) -> Decision:
    """The alias moves, unless it has moved since it was looked up."""
    if find_holder(asked.name, asked.alias, uri) != holder:
        reasons = (f"'{asked.alias}' has moved meanwhile: run the command again",)
        return _refused(version, asked, reasons, uri, results)
    move_alias(asked.name, asked.alias, version.number, uri, holder)
    tag_version(
        version, {"promoted": f"'{asked.alias}' since this comparison", "compared": "; ".join(reasons)[:4000]}, uri
    )
    return Decision(version, True, (*reasons, f"'{asked.alias}' is version {version.number} now"), results)


def _refused(
    version: Version, asked: PromotionRequest, reasons: tuple[str, ...], uri: str, results: Results | None = None
) -> Decision:
    tag_version(version, {"promoted": "no", "compared": "; ".join(reasons)[:4000]}, uri)
    return Decision(version, False, (*reasons, f"'{asked.alias}' stays as it was"), results)
