"""The parts of a report. Each command builds a `Report`, which `terminal` and `report_files` show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Mark = Literal["", "good", "note", "best", "warning", "problem"]
"""How a cell or a sentence is colored."""


@dataclass(frozen=True)
class Cell:
    """A value in a table.

    Attributes:
        text: The value.
        small: A note on the value, such as its interval.
        mark: How the value is colored.
    """

    text: str
    small: str = ""
    mark: Mark = ""


Row = tuple[Cell | str, ...]
"""Cells of a row. A row of one cell is a heading."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: Title of the table.
        heads: Names of the columns.
        rows: Rows of cells.
        note: A sentence on how to read the table.
        left: Number of leading columns that hold words rather than numbers.
        more: Further rows, which a page folds and the terminal leaves out.
        page_only: Whether the terminal leaves the table out.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    left: int = 1
    more: Sequence[Row] = ()
    page_only: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure of a page. svg: the `svg` element."""

    title: str
    svg: str
    note: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether the figure takes the whole width of a page."""
        return float(self.svg.partition('viewBox="')[2].split()[2]) > 700


@dataclass(frozen=True)
class Sentence:
    """A sentence, without its period.

    Attributes:
        text: The sentence. Code stands between backticks.
        mark: `warning`, `problem` and `note` stand before the sentence as a word.
        label: A word that replaces the mark on a page, such as the name of a check.
        details: Further sentences that belong to it, such as advice.
        page_only: Whether the terminal leaves the sentence out.
    """

    text: str
    mark: Mark = ""
    label: str = ""
    details: Sequence[str] = ()
    page_only: bool = False


@dataclass(frozen=True)
class Report:
    """Results of a command.

    Attributes:
        title: Title of the page.
        headline: The most important result.
        figures: Figures, which come first.
        tables: Tables.
        sentences: Verdicts, findings and notes, the most important first.
        more: Sentences that cost less, which are folded.
        mark: How the headline is colored.
        about: A sentence on what was examined.
        facts: Name -> text, such as the log and its rows.
        measures: Name -> how it is computed.
        identity: What the results depend on: `features`, fingerprint of the features; `model`, version of the model;
            `settings`, tree of the settings.
    """

    title: str
    headline: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    sentences: Sequence[Sentence] = ()
    more: Sequence[Sentence] = ()
    mark: Mark = ""
    about: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    measures: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
