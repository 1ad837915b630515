"""The parts of a report and their form on the terminal. Each command builds a `Report`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import table as rich_table
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.text import Text

Mark = Literal["", "good", "note", "best", "warning", "problem"]
"""Color of a cell or a sentence."""


@dataclass(frozen=True)
class Cell:
    """A value in a table.

    Attributes:
        text: The value.
        detail: A note on the value, such as its interval.
        mark: Meaning of the value, which determines its color.
    """

    text: str
    detail: str = ""
    mark: Mark = ""


Row = tuple[Cell | str, ...]
"""Cells of a row. A row with one cell is a heading."""


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: Title of the table.
        header: Names of the columns.
        rows: Rows to show.
        note: A sentence on how to read the table.
        text_columns: Number of leading columns with text. The columns after them have numbers.
        folded: Further rows, which the page hides until a reader unfolds them and the terminal omits.
        page_only: Whether the terminal omits the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Row]
    note: str = ""
    text_columns: int = 1
    folded: Sequence[Row] = ()
    page_only: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure of an HTML report.

    Attributes:
        title: Title above the figure.
        svg: The `svg` element.
        note: A sentence below the figure.
    """

    title: str
    svg: str
    note: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether the figure takes the full width of the page."""
        return float(self.svg.partition('viewBox="')[2].split()[2]) > 700


@dataclass(frozen=True)
class Sentence:
    """A sentence of a report.

    Attributes:
        text: The sentence without its period, with code between backticks.
        mark: Color of the sentence. `warning`, `problem` and `note` also precede the sentence as a word.
        label: Text before the sentence in the HTML report, such as the name of a check. It replaces the word of `mark`.
        page_only: Whether the terminal omits the sentence.
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
        figures: Figures, which the page shows before the tables.
        tables: Tables.
        sentences: Verdicts, findings and notes, the most important first.
        mark: Color of the headline.
        about: A sentence on the data or model behind the results.
        facts: Name -> text about the rows behind the results, such as the log and its number of rows.
        measures: Name of a measure -> its definition.
        identity: Inputs of the results by name: `features` (fingerprint), `model` (version), `settings` (dictionary).
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


_STYLES: dict[Mark, str] = {"good": "bold green", "best": "bold", "warning": "yellow", "problem": "bold red"}


def to_terminal(report: Report) -> Iterator[RenderableType]:
    """Yield the terminal output of a report: tables, then headline and sentences, so that the verdict is last."""
    yield from (to_rich(table) for table in report.tables if table.rows and not table.page_only)
    if report.headline:
        yield Text(report.headline, style=_STYLES.get(report.mark, "bold"))
    for sentence in report.sentences:
        if not sentence.page_only:
            word = f"{sentence.mark}: " if sentence.mark in ("warning", "problem", "note") else ""
            yield Text.assemble((word, _STYLES.get(sentence.mark, "")), sentence.text)


def to_rich(table: Table) -> rich_table.Table:
    """Return a table as a Rich table for the terminal."""
    rich = rich_table.Table(
        title=Text(table.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    rich.caption, rich.caption_justify = table.note or None, "left"
    for index, name in enumerate(table.header):
        is_text = index < table.text_columns
        rich.add_column(Text(name), justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in table.rows:
        if len(row) == 1:
            rich.add_row(_cell_text(row[0], "bold"))
        else:
            rich.add_row(*map(_cell_text, row))
    return rich


def _cell_text(cell: Cell | str, style: str = "") -> Text:
    if isinstance(cell, str):
        return Text(cell, style=style)
    text = Text(cell.text, style=_STYLES.get(cell.mark, style))
    return text.append(f" {cell.detail}", style="not bold dim") if cell.detail else text
