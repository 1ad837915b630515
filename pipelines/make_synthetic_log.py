"""python -m pipelines.make_synthetic_log --out data/synthetic/log --rows 1000000

Write an interaction log of any size with known probabilities, in one or more files a day: `OUT/day-001.parquet` and so
on. The memory doesn't depend on the number of rows.

A request draws 12 candidates by popularity and shows the best 8 to 12 (10 on average) by quality and chance. Better
candidates thus have higher positions, as in the log of a ranking system. The probabilities and labels:

true_click  sigmoid(-1.6 + affinity + quality - 0.4 log(price / 20) + device + evening): the probability of a click at
            the top of the list.
clicked     1 with probability sigmoid(logit(true_click) - 0.6 log(position)); position 1 is the top (engagement).
true_like   sigmoid(0.2 + 0.7 affinity + craft): the probability that the user likes a clicked candidate.
liked       1 with probability true_like (satisfaction). The label is available 3 days after the request. It is null
            without a click, and in the log's last 3 days.

affinity    dot product of the user's taste and the category's style, four numbers each. A taste is the sum of a value
            of the country and a value of the user.
quality     sum of a value of the candidate's brand and a value of the candidate. Craft is similar, and correlated with
            quality.
price       price of the candidate on that day. One in five has a discount of 20%. The price is null in 3% of rows, and
            then has no effect.
device      phone 0, desktop -0.2, tablet 0.1, tv -0.6.
evening     0.3 cos(2 pi (hour - 20) / 24), UTC.

The command prints the AUC of true_click and of true_like at the end. A model that learns the truth approaches the AUC
of true_click. A model that confuses the truth with positions may exceed it by 0.005 at most.

Popularity is skewed: the busiest user makes fifty times as many requests as the average user. A fifth of the users and
candidates appear for the first time during the log, at evenly spread times. All values depend only on the seed and the
row number.
"""

import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmoe_rec.atomic import atomic_folder
from mmoe_rec.auc import auc_of_counts
from mmoe_rec.errors import UserError, exit_with_message
from mmoe_rec.progress import bar
from pipelines.data_sets.ingest_common import IntArray, command_parser, non_negative, print_summary
from pipelines.data_sets.synthetic_rows import DAYS, LOG, START, Catalog, Plan, make_rows, position_bias

DEFAULT_OUT = Path("data/synthetic/log")
REQUESTS_AT_A_TIME = 8_192


class _BinnedAuc:
    """AUC of scores in [0, 1]. Labels are counted in 10,001 bins of scores, so the memory is bounded."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, 10_001), np.int64)

    def add(self, score: npt.NDArray[np.floating], label: IntArray) -> None:
        """Count (N,) scores and labels. Labels other than 0 and 1 are ignored."""
        bins = np.round(score * 10_000).astype(np.int64)
        for value in (0, 1):
            self.counts[value] += np.bincount(bins[label == value], minlength=10_001)

    def auc(self) -> float:
        """Return the AUC, NaN if no label is 0 or no label is 1."""
        negatives, positives = self.counts
        return float(auc_of_counts(positives, negatives))


class Oracle:
    """AUCs of the true probabilities on the test rows of the split."""

    def __init__(self) -> None:
        self.click, self.click_at_position, self.like = _BinnedAuc(), _BinnedAuc(), _BinnedAuc()

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table."""
        names = ("true_click", "true_like", "position", "clicked")
        true_click, true_like, position, clicked = (table[name].to_numpy() for name in names)
        self.click.add(true_click, clicked)
        odds = true_click / (1 - true_click) * np.exp(position_bias(position))
        self.click_at_position.add(odds / (1 + odds), clicked)
        self.like.add(true_like, table["liked"].fill_null(-1).to_numpy())

    def lines(self) -> list[str]:
        """Return lines with the label, the score and the AUC."""
        return [
            f"  clicked, by true_click               {self.click.auc():.4f}  (without positions, like a model)",
            f"  clicked, by true_click and position  {self.click_at_position.auc():.4f}  (upper bound)",
            f"  liked if clicked, by true_like       {self.like.auc():.4f}",
        ]


def generate(plan: Plan, requests_at_a_time: int = REQUESTS_AT_A_TIME) -> Iterator[tuple[int, pa.Table]]:
    """Yield pairs of a day and a table of rows of this day, in the order of time.

    Args:
        plan: Size and seed of the log.
        requests_at_a_time: Maximum number of requests in a table. It doesn't change the rows.
    """
    catalog, edges, left = Catalog.of(plan), plan.first_requests(), plan.rows
    for day in range(plan.days):
        for begin in range(edges[day], edges[day + 1], requests_at_a_time):
            table = make_rows(plan, catalog, day, begin, min(begin + requests_at_a_time, edges[day + 1]))
            table = table.slice(0, left)
            left -= table.num_rows
            if table.num_rows:
                yield day, table


def make_log(plan: Plan, out: Path, files_per_day: int = 1) -> Oracle:
    """Write the log to a folder, replacing an existing log. Return the oracle of the test rows.

    Args:
        plan: Size and seed of the log.
        out: Folder for the log.
        files_per_day: Number of files for a day's requests, of about the same size. Empty files are not written.

    Raises:
        UserError: `out` is a file, or can't be created.
    """
    oracle, edges = Oracle(), plan.first_requests()
    _, test_start, test_end = plan.split_days()
    with atomic_folder(out) as folder, bar() as progress, ExitStack() as open_file:
        task, path = progress.add_task("writing", total=plan.rows), None
        for day, table in generate(plan):
            if test_start <= day < test_end:
                oracle.add(table)
            part = (table["request_id"].to_numpy() - edges[day]) * files_per_day // (edges[day + 1] - edges[day])
            for number in np.unique(part):
                suffix = f"-{number + 1:03d}" if files_per_day > 1 else ""
                name = folder / f"day-{day + 1:03d}{suffix}.parquet"
                if name != path:
                    open_file.close()
                    writer, path = open_file.enter_context(_open(name)), name
                begin, end = np.searchsorted(part, [number, number + 1])
                writer.write_table(table.slice(begin, end - begin))
            progress.advance(task, table.num_rows)
    return oracle


def _open(path: Path) -> pq.ParquetWriter:
    repeated = [name for name in LOG.names if not name.startswith("true_")]
    return pq.ParquetWriter(path, LOG, compression="zstd", compression_level=1, use_dictionary=repeated)


def next_command(plan: Plan, out: Path) -> str:
    """Return the command that trains on the log, with the settings that differ from configs/synthetic.yaml.

    Args:
        plan: Size and seed of the log.
        out: Folder of the log.
    """
    command = ["mmoe-rec", "train", "--config", "configs/synthetic.yaml"]
    if out != DEFAULT_OUT:
        command += ["--data.log", str(out), "--data.work_dir", str(out.with_name(f"{out.name}-work"))]
    if plan.days != DAYS:
        for name, day in zip(("train_end", "validation_end", "test_end"), plan.split_days(), strict=True):
            command += [f"--split.{name}", str((START + np.timedelta64(day, "D")).astype("datetime64[D]"))]
    return shlex.join(command)


@exit_with_message()
def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments`. None stands for the arguments of the process."""
    parser = command_parser("python -m pipelines.make_synthetic_log", __doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the log (default: %(default)s)")
    for name, default, text in (
        ("--rows", 1_000_000, "number of rows"),
        ("--users", Plan.users, "number of users to draw from"),
        ("--candidates", Plan.candidates, "number of candidates to draw from"),
        ("--days", DAYS, "number of days, from 2024-01-01 on"),
        ("--files-per-day", 1, "number of files for a day's rows"),
        ("--seed", Plan.seed, "seed of all random values"),
    ):
        parser.add_argument(name, type=non_negative, default=default, metavar="N", help=f"{text} (default: {default})")
    options = parser.parse_args(arguments)
    if options.files_per_day < 1:
        raise UserError("--files-per-day must be at least 1, found 0")
    plan = Plan(options.rows, options.users, options.candidates, options.days, options.seed)
    started = time.perf_counter()
    oracle = make_log(plan, options.out, options.files_per_day)
    seconds = time.perf_counter() - started
    print_summary("Synthetic log", {"rows": plan.rows, "days": plan.days, "seconds": seconds}, log=options.out)
    _, begin, end = plan.split_days()
    print(
        f"AUC on days {begin + 1} to {end}, the test rows, of an oracle with the true probabilities:",
        *oracle.lines(),
        sep="\n",
    )
    print(f"next: {next_command(plan, options.out)}")


if __name__ == "__main__":
    main()
