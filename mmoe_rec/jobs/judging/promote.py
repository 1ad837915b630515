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

from mmoe_rec.aliases import Version, holder_of, point, replaced_by, tag, version_of
from mmoe_rec.errors import UserError
from mmoe_rec.jobs.evaluate import evaluate_found
from mmoe_rec.jobs.judging.results import Results
from mmoe_rec.registry import FoundModel, local_model
from mmoe_rec.settings import Settings

if TYPE_CHECKING:
    from mmoe_rec.serving.loaded import LoadedRanker

_CALLS, _ROUNDS = 5, 20  # of an example, of which the fastest count


@dataclass(frozen=True)
class Asked:
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


def promote_version(settings: Settings, asked: Asked, out: Path) -> Decision:
    """Decides, and moves the alias if the challenger is better; writes the report to a folder.

    Raises UserError for a version that there is not, or where the two can't be compared.
    """
    uri = settings.tracking.address
    challenger, holder = _version(asked.name, asked.challenger, uri), holder_of(asked.name, asked.alias, uri)
    if holder == challenger:
        return Decision(challenger, True, (f"version {challenger.number} holds '{asked.alias}' already",))
    mine = _loaded(challenger, uri)
    if isinstance(mine, str):
        return _refused(challenger, asked, (f"version {challenger.number} can't be served: {mine}",), uri)
    its = None if holder is None else _loaded(holder, uri)
    if holder is None or its is None or isinstance(its, str):
        gone = "" if holder is None else f"version {holder.number}, which held it, can't be served any more: {its}"
        return _promoted(challenger, holder, asked, (gone or f"no version held '{asked.alias}' before",), uri)
    names = _named(challenger), _named(holder)
    found = {_named(each): _found(each, uri) for each in (challenger, holder)}
    results = evaluate_found(settings, found, out).results
    against = _against(results, *names)
    if (ratio := _slower(mine, its, found[names[0]].folder)) > asked.slower_at_most:
        against.append(
            f"{names[0]} answers {ratio:.1f} times as slowly as {names[1]}, and {asked.slower_at_most:g} times is "
            "allowed (--slower-at-most)"
        )
    if not against and holder_of(asked.name, asked.alias, uri) != holder:
        against.append(f"'{asked.alias}' has moved meanwhile: run the command again")
    if against:
        return _refused(challenger, asked, tuple(against), uri, results)
    assert results.comparison is not None
    verdict = results.comparison["against"][names[1]]["verdict"]["sentence"]
    return _promoted(challenger, holder, asked, (verdict,), uri, results)


def roll_back(name: str, alias: str, uri: str) -> Decision:
    """Gives an alias back to the version that held it before the one that holds it now.

    Raises UserError where that is unknown, or can't be served any more.
    """
    holder = holder_of(name, alias, uri)
    if holder is None:
        raise UserError(f"no version of '{name}' holds '{alias}'")
    before = replaced_by(holder, alias, uri)
    if before is None:
        raise UserError(
            f"it is not known which version of '{name}' held '{alias}' before version {holder.number}; point the alias "
            "at it by hand"
        )
    version = version_of(name, before, uri)
    if isinstance(trouble := _loaded(version, uri), str):
        raise UserError(f"version {before}, which held '{alias}' before, can't be served any more: {trouble}")
    point(name, alias, before, uri)
    tag(holder, {"rolled_back": f"'{alias}' went back to version {before}"}, uri)
    return Decision(
        version, True, (f"'{alias}' is version {before} again, which held it before version {holder.number}",)
    )


def shadowed(asked: Asked, source: str, uri: str) -> list[str]:
    """What the challenger and the holder of the alias answer to logged requests, in sentences.

    Raises UserError where either can't be served, or there are no requests.
    """
    from mmoe_rec.jobs.judging.shadow import shadow, told

    challenger, holder = _version(asked.name, asked.challenger, uri), holder_of(asked.name, asked.alias, uri)
    if holder is None:
        raise UserError(f"no version of '{asked.name}' holds '{asked.alias}', so there is none to compare answers with")
    sides = []
    for version in (challenger, holder):
        if isinstance(loaded := _loaded(version, uri), str):
            raise UserError(f"{_named(version)} can't be served: {loaded}")
        sides.append(loaded)
    return told(shadow(sides[0], sides[1], source))


def _version(name: str, asked: str, uri: str) -> Version:
    if asked.isdigit():
        return version_of(name, asked, uri)
    found = holder_of(name, asked, uri)
    if found is None:
        raise UserError(f"no version of '{name}' holds the alias '{asked}'; give the number of a version")
    return found


def _named(version: Version) -> str:
    return f"version {version.number}"


def _found(version: Version, uri: str) -> FoundModel:
    return FoundModel(version.address, local_model(version.address, uri), version.run_id)


def _loaded(version: Version, uri: str) -> LoadedRanker | str:
    """The ranker, whose files, format and example were checked, or why there is none."""
    from mmoe_rec.serving.ranker import Ranker

    try:
        return Ranker.load(local_model(version.address, uri))
    except (UserError, RuntimeError) as error:  # or it fails at its own example
        return " ".join(str(error).split())


def _against(results: Results, mine: str, its: str) -> list[str]:
    """What speaks against the challenger."""
    assert results.comparison is not None
    verdict = results.comparison["against"][its]["verdict"]
    found = [each["message"] for each in results.findings if each["check"] == "seen"]
    if verdict["kind"] != "better":
        found.append(verdict["sentence"])
    known = {(each["check"], each.get("task")) for each in results.findings if each["model"] == its}
    found += [
        each["message"]
        for each in results.findings
        if each["model"] == mine and each["check"] != "seen" and (each["check"], each["task"]) not in known
    ]
    return found


def _slower(mine: LoadedRanker, its: LoadedRanker, artifact: Path) -> float:
    """How many times as long the first takes to answer an example as the second, the fastest of many calls of each."""
    example = json.loads((artifact / "example_request.json").read_text(encoding="utf-8"))
    fastest: dict[int, float] = {}
    for _ in range(_ROUNDS):
        for side, ranker in enumerate((mine, its)):
            begun = time.perf_counter()
            for _ in range(_CALLS):
                ranker.rank(example["user"], example["context"], example["candidates"])
            took = time.perf_counter() - begun
            fastest[side] = min(took, fastest.get(side, took))
    return fastest[0] / fastest[1]


def _promoted(
    version: Version,
    holder: Version | None,
    asked: Asked,
    reasons: tuple[str, ...],
    uri: str,
    results: Results | None = None,
) -> Decision:
    point(asked.name, asked.alias, version.number, uri, holder)
    tag(version, {"promoted": f"'{asked.alias}' since this comparison", "compared": "; ".join(reasons)[:4000]}, uri)
    return Decision(version, True, (*reasons, f"'{asked.alias}' is version {version.number} now"), results)


def _refused(
    version: Version, asked: Asked, reasons: tuple[str, ...], uri: str, results: Results | None = None
) -> Decision:
    tag(version, {"promoted": "no", "compared": "; ".join(reasons)[:4000]}, uri)
    return Decision(version, False, (*reasons, f"'{asked.alias}' stays as it was"), results)
