"""The error of a request that the caller has to change: HTTP 400 in the model server."""

from mmoe_rec.errors import UserError


class RequestError(UserError):
    """One sentence for the caller: which column or option, what was expected, what was found."""
