"""The error of a request that the caller has to change, HTTP 400 in the model server; and that of a model elsewhere."""

from mmoe_rec.errors import UserError


class RequestError(UserError):
    """One sentence for the caller: which column or option, what was expected, what was found."""


class OtherScoresError(UserError):
    """A model that is as it was written computes something else here: the fault of this machine or its packages."""


LONGEST_QUOTE = 60


def quoted(value: object) -> str:
    """A name or value of the caller's as a sentence gives it, in quotes if it is text: enough of it to find it by."""
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."
    return repr(text) if isinstance(value, str) else text
