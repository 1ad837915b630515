"""The parts of a report, and their form on the terminal. Each command builds a `Report`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import table as rich_table
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.text import Text

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
        page_only: Whether the terminal leaves the sentence out.
    """

    text: str
    mark: Mark = ""
    label: str = ""
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
    mark: Mark = ""
    about: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    measures: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)


# The terminal shows tables, then the headline and the sentences, so that the verdict stands last.

STYLES: dict[Mark, str] = {"good": "bold green", "best": "bold", "warning": "yellow", "problem": "bold red"}


def to_terminal(report: Report) -> Iterator[RenderableType]:
    """Yield what the terminal shows of a report."""
    yield from (to_rich(table) for table in report.tables if table.rows and not table.page_only)
    if report.headline:
        yield Text(report.headline, style=STYLES.get(report.mark, "bold"))
    for sentence in report.sentences:
        if not sentence.page_only:
            word = f"{sentence.mark}: " if sentence.mark in ("warning", "problem", "note") else ""
            yield Text.assemble((word, STYLES.get(sentence.mark, "")), sentence.text)


def to_rich(table: Table) -> rich_table.Table:
    """Return a table for the terminal."""
    shown = rich_table.Table(
        title=Text(table.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    shown.caption, shown.caption_justify = table.note or None, "left"
    for place, head in enumerate(table.heads):
        words = place < table.left
        shown.add_column(Text(head), justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in table.rows:
        if len(row) == 1:
            shown.add_row(_cell_text(row[0], "bold"))
        else:
            shown.add_row(*map(_cell_text, row))
    return shown


def _cell_text(cell: Cell | str, style: str = "") -> Text:
    if isinstance(cell, str):
        return Text(cell, style=style)
    text = Text(cell.text, style=STYLES.get(cell.mark, style))
    return text.append(f" {cell.small}", style="not bold dim") if cell.small else text
