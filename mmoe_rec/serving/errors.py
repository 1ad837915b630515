"""The error of a request that the caller has to change, HTTP 400 in the model server; and that of a model elsewhere."""

from mmoe_rec.errors import UserError


class RequestError(UserError):
    """One sentence for the caller: which column or option, what was expected, what was found."""


class OtherScoresError(UserError):
    """A model that is as it was written computes something else here: the fault of this machine or its packages."""
