"""python -m pipelines.make_synthetic_log --out data/synthetic/log --rows 1000000

Write an interaction log of any size whose truth is known, one file or more a day, `OUT/day-001.parquet` and so on. It
takes the same memory for a thousand rows and for a billion.

A request draws 12 candidates by popularity and shows the best 8 to 12 (10 on average) by quality and chance, so that
better candidates stand higher, as in a log that a ranking system left behind. What then happens:

true_click  sigmoid(-1.6 + affinity + quality - 0.4 log(price / 20) + device + evening): the probability of a click at
            the top of the list.
clicked     1 with probability sigmoid(logit(true_click) - 0.6 log(position)); position 1 is the top (engagement).
true_like   sigmoid(0.2 + 0.7 affinity + craft): the probability that the user likes what was clicked.
liked       1 with probability true_like (satisfaction). It is known 3 days after the request: null where not clicked,
            and in the log's last 3 days.

affinity    taste of the user . style of the category, four numbers each. A taste is the country's plus the user's own.
quality     of the candidate, its brand's plus its own; craft likewise, and correlated with quality.
price       of the candidate on that day, one in five at 20% off; null in 3% of rows, and then it has no effect.
device      phone 0, desktop -0.2, tablet 0.1, tv -0.6.
evening     0.3 cos(2 pi (hour - 20) / 24), UTC.

The command prints the AUC of true_click and of true_like at the end. A model that learns the truth approaches the AUC
of true_click. A model that confuses the truth with positions may exceed it by 0.005 at most.

Popularity is skewed: the busiest user makes fifty times as many requests as the average one. A fifth of users and
candidates come late, evenly over the log. Each value is a function of the seed and of its row's number alone.
"""

import shlex
import time
from collections.abc import Iterator
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


class BinnedAuc:
    """AUC of scores in [0, 1] in bounded memory: counts of labels by score, to 1 in 10,000."""

    def __init__(self) -> None:
        self.counts = np.zeros((2, 10_001), np.int64)

    def add(self, score: npt.NDArray[np.floating], label: IntArray) -> None:
        """Count (N,) scores with their labels, 0 or 1."""
        bins = np.round(score * 10_000).astype(np.int64)
        for value in (0, 1):
            self.counts[value] += np.bincount(bins[label == value], minlength=10_001)

    def auc(self) -> float:
        """Share of pairs of a 0 and a 1 whose scores are in that order; ties count half; NaN without such a pair."""
        negatives, positives = self.counts
        return float(auc_of_counts(positives, negatives))


class Oracle:
    """What an oracle, who knows the truth, would reach on the test rows of the split."""

    def __init__(self) -> None:
        self.click, self.click_at_position, self.like = BinnedAuc(), BinnedAuc(), BinnedAuc()

    def add(self, table: pa.Table) -> None:
        """Count rows."""
        names = ("true_click", "true_like", "position", "clicked")
        true_click, true_like, position, clicked = (table[name].to_numpy() for name in names)
        self.click.add(true_click, clicked)
        odds = true_click / (1 - true_click) * np.exp(position_bias(position))
        self.click_at_position.add(odds / (1 + odds), clicked)
        liked = table["liked"].fill_null(-1).to_numpy()
        self.like.add(true_like, liked)

    def lines(self) -> list[str]:
        """What is compared with what, and the AUC."""
        return [
            f"  clicked, by true_click               {self.click.auc():.4f}  (the positions unknown, as to a model)",
            f"  clicked, by true_click and position  {self.click_at_position.auc():.4f}  (the most that "
            "anything can reach)",
            f"  liked of the clicked, by true_like   {self.like.auc():.4f}",
        ]


# The job


def generate(plan: Plan, requests_at_a_time: int = REQUESTS_AT_A_TIME) -> Iterator[tuple[int, pa.Table]]:
    """Yield (day, rows) in the order of time; how many requests come at a time changes no row."""
    catalog, edges, left = Catalog.of(plan), plan.first_requests(), plan.rows
    for day in range(plan.days):
        for begin in range(edges[day], edges[day + 1], requests_at_a_time):
            table = make_rows(plan, catalog, day, begin, min(begin + requests_at_a_time, edges[day + 1]))
            table = table.slice(0, left)
            left -= table.num_rows
            if table.num_rows:
                yield day, table


def make_log(plan: Plan, out: Path, files_per_day: int = 1) -> Oracle:
    """Write the log to the folder `out`, replacing one that is there.

    Args:
        files_per_day: each day's requests are cut into so many files of the same size; none of them is empty.

    Raises:
        UserError: `out` is a file, or cannot be made.
    """
    oracle, edges = Oracle(), plan.first_requests()
    _, test_start, test_end = plan.split_days()
    with atomic_folder(out) as folder, bar() as progress:
        task = progress.add_task("writing", total=plan.rows)
        writer: pq.ParquetWriter | None = None
        path = None
        for day, table in generate(plan):
            if test_start <= day < test_end:
                oracle.add(table)
            part = (table["request_id"].to_numpy() - edges[day]) * files_per_day // (edges[day + 1] - edges[day])
            for number in np.unique(part):
                suffix = f"-{number + 1:03d}" if files_per_day > 1 else ""
                name = folder / f"day-{day + 1:03d}{suffix}.parquet"
                if writer is None or name != path:
                    if writer is not None:
                        writer.close()
                    writer, path = _open(name), name
                begin, end = np.searchsorted(part, [number, number + 1])
                writer.write_table(table.slice(begin, end - begin))
            progress.advance(task, table.num_rows)
        if writer is not None:
            writer.close()
    return oracle


def _open(path: Path) -> pq.ParquetWriter:
    repeated = [name for name in LOG.names if not name.startswith("true_")]
    return pq.ParquetWriter(path, LOG, compression="zstd", compression_level=1, use_dictionary=repeated)


def next_command(plan: Plan, out: Path) -> str:
    """What to type to train on the log, with the settings in which it differs from configs/synthetic.yaml."""
    command = ["mmoe-rec", "train", "--config", "configs/synthetic.yaml"]
    if out != DEFAULT_OUT:
        command += ["--data.log", str(out), "--data.work_dir", str(out.with_name(f"{out.name}-work"))]
    if plan.days != DAYS:
        for name, day in zip(("train_end", "validation_end", "test_end"), plan.split_days(), strict=True):
            command += [f"--split.{name}", str((START + np.timedelta64(day, "D")).astype("datetime64[D]"))]
    return shlex.join(command)


@exit_with_message()
def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` are those of the command line."""
    parser = command_parser("python -m pipelines.make_synthetic_log", __doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the log (default: %(default)s)")
    for name, default, what in (
        ("--rows", 1_000_000, "rows of the log"),
        ("--users", Plan.users, "users that the log draws from"),
        ("--candidates", Plan.candidates, "candidates that the log draws from"),
        ("--days", DAYS, "days of the log, from 2024-01-01 on"),
        ("--files-per-day", 1, "files that a day's rows are cut into"),
        ("--seed", Plan.seed, "seed of all that is drawn"),
    ):
        parser.add_argument(name, type=non_negative, default=default, metavar="N", help=f"{what} (default: {default})")
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
        f"AUC on days {begin + 1} to {end}, the test rows, of an oracle that knows the truth:",
        *oracle.lines(),
        sep="\n",
    )
    print(f"next: {next_command(plan, options.out)}")


if __name__ == "__main__":
    main()
