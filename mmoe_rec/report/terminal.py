"""Reports on the terminal: tables, then the headline and the sentences, so that the verdict stands last."""

from collections import Counter
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from mmoe_rec.report.parts import Cell, Mark, Report, Sentence, Table

STYLES: dict[Mark, str] = {"good": "bold green", "best": "bold", "warning": "yellow", "problem": "bold red"}


def to_terminal(report: Report) -> Iterator[RenderableType]:
    """Yield what the terminal shows of a report."""
    yield from (to_rich(table) for table in report.tables if table.rows and not table.page_only)
    if report.headline:
        yield Text(report.headline, style=STYLES.get(report.mark, "bold"))
    for sentence in report.sentences:
        if not sentence.page_only:
            yield from _lines(sentence)
    if report.more:
        kinds = Counter(each.label or each.mark for each in report.more)
        named = ", ".join(f"{name} ({number})" for name, number in kinds.most_common())
        yield Text(f"{len(report.more)} more, which cost less: {named}. The page has them.", style="dim")


def _lines(sentence: Sentence) -> Iterator[Text]:
    if sentence.mark in ("warning", "problem", "note"):
        yield Text.assemble((f"{sentence.mark}: ", STYLES.get(sentence.mark, "")), sentence.text)
    else:
        yield Text(sentence.text)
    yield from (Text(f"  {each.replace('`', '')}") for each in sentence.details)  # So that a command can be copied.


def to_rich(table: Table) -> RichTable:
    """Return a table for the terminal."""
    shown = RichTable(
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
