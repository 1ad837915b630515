"""Commands as they are typed, run in this process."""

from __future__ import annotations

from mmoe_rec.cli.main import main


def run(*words: object) -> None:
    """Runs `mmoe-rec WORDS`. Raises SystemExit with a code that is not 0."""
    main([str(word) for word in words])
