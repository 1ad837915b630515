"""Simulated clicks on ranked lists, in a world whose true relevance is known.

A request shows LIST candidates to a user who has not been seen before. What the world's parts are, and why:

relevance  a logit: half of its variance within a request a quality of each item, half a match of user and item that
           bends; besides, how active a user is. A model is given numbers of user and item and the item's id, so nothing
           of relevance is hidden from it, but it cannot write the formula down. Its mean is `base`.
policy     sorts by strength x relevance + sqrt(1 - strength^2) x mistake, both with deviation 1, so that `strength` is
           their correlation. The mistake is made like relevance, and it lasts: it stands for an older model that is
           wrong about the same items every day. Mistakes drawn anew for each row would average out, and position bias
           would not harm a model that is given all of relevance.
swaps      each row is chosen with this probability, and the chosen rows of a request exchange positions at random.
shelves    False: a request's candidates are drawn from all items, so that chance company moves an item up and down even
           without swaps. True: items stand on shelves of LIST, a request shows one shelf, and the policy knows items
           but not users, as on a category page sorted by popularity. Without swaps position then follows from the item,
           and nothing in the log tells bias from quality.
form       additive: P(click) = sigmoid(relevance + bias), bias = -BIAS x log(rank) with mean 0 over positions.
           multiplicative: P(click) = examined x sigmoid(relevance), examined = rank^-BIAS, the examination hypothesis
           (Joachims et al., WSDM 2017), for which an added logit is the wrong form.

Clicks without bias come from the same rows and random numbers: bias is 0, or examination its mean over positions, so
that there are about as many clicks and they do not tell more by their number alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import expit

ITEMS = 1000
LIST = 20
NUMBERS = 6
SPREAD, ACTIVITY, BIAS = 1.2, 0.5, 1.0

Form = Literal["additive", "multiplicative"]


@dataclass(frozen=True)
class World:
    """How clicks come about; see the module."""

    form: Form = "additive"
    strength: float = 0.5
    swaps: float = 0.1
    shelves: bool = False
    base: float = -1.5


@dataclass(frozen=True)
class Requests:
    """R requests of LIST candidates each, in an order that means nothing.

    numbers: (R, LIST, 2 x NUMBERS) float32, of user and item; item, position: (R, LIST) int64, position from 0;
    relevance, policy: (R, LIST) float64, the true logit and what the policy sorted by; clicks, fair_clicks: (R, LIST)
    bool, with position bias and without.
    """

    numbers: np.ndarray
    item: np.ndarray
    position: np.ndarray
    relevance: np.ndarray
    policy: np.ndarray
    clicks: np.ndarray
    fair_clicks: np.ndarray


def simulate(world: World, requests: int, seed: int, draw: int = 0) -> Requests:
    """Requests of a world; `seed` draws items and tastes, `draw` users, lists, swaps and clicks."""
    lasting, passing = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1, draw])
    item_numbers = lasting.normal(size=(ITEMS, NUMBERS))
    quality, mistaken_quality = lasting.normal(size=(2, ITEMS))
    taste, mistaken_taste = lasting.normal(size=(2, NUMBERS, NUMBERS))
    activity = lasting.normal(size=NUMBERS) / NUMBERS**0.5

    user = passing.normal(size=(requests, NUMBERS))
    item = _lists(requests, world.shelves, passing)
    shown = item_numbers[item]
    liking = (quality[item] + _match(user, taste, shown)) / 2**0.5
    relevance = world.base + SPREAD * liking + ACTIVITY * (user @ activity)[:, None]
    if world.shelves:
        known, mistake = quality[item], mistaken_quality[item]
    else:
        known, mistake = liking, (mistaken_quality[item] + _match(user, mistaken_taste, shown)) / 2**0.5
    policy = world.strength * known + (1 - world.strength**2) ** 0.5 * mistake
    position = swapped(sorted_by(policy), world.swaps, passing)

    probability, fair = click_probability(world.form, relevance, position)
    chance = passing.random(item.shape)
    numbers = np.concatenate([np.broadcast_to(user[:, None], shown.shape), shown], axis=2).astype(np.float32)
    return Requests(numbers, item, position, relevance, policy, chance < probability, chance < fair)


def sorted_by(score: np.ndarray) -> np.ndarray:
    """(R, LIST) scores -> (R, LIST) int64 positions from 0, the highest score first."""
    return np.argsort(np.argsort(-score, axis=1), axis=1)


def swapped(position: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """(R, LIST) positions, of which a share, drawn row by row, is permuted at random within each request."""
    chosen = np.flatnonzero(random.random(position.shape) < share)
    shuffled = chosen[np.lexsort((random.random(len(chosen)), chosen // position.shape[1]))]
    result = position.copy()
    result.flat[shuffled] = position.flat[chosen]
    return result


def click_probability(form: Form, relevance: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(click) with position bias, and with its effect replaced by the mean over positions, both (R, LIST) float64."""
    log_rank = np.log(np.arange(LIST) + 1)
    if form == "multiplicative":
        examined = np.exp(-BIAS * log_rank)
        return examined[position] * expit(relevance), examined.mean() * expit(relevance)
    bias = -BIAS * (log_rank - log_rank.mean())
    return expit(relevance + bias[position]), expit(relevance)


def _lists(requests: int, shelves: bool, random: np.random.Generator) -> np.ndarray:
    """(R, LIST) int64 items, none of them twice in a request."""
    if shelves:
        return random.integers(ITEMS // LIST, size=(requests, 1)) * LIST + random.permuted(
            np.broadcast_to(np.arange(LIST), (requests, LIST)), axis=1
        )
    return np.argpartition(random.random((requests, ITEMS)), LIST, axis=1)[:, :LIST]


def _match(user: np.ndarray, taste: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """(R, LIST) how well user and item fit, with deviation 1: a bilinear form that is bent at both ends."""
    bilinear = np.einsum("rk,rlk->rl", user @ taste / NUMBERS, shown)
    return np.tanh(bilinear) / 0.6
