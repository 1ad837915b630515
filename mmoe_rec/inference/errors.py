"""The error of a request that the caller has to change, HTTP 400 in the model server; and that of a model elsewhere."""

from mmoe_rec.errors import LONGEST_QUOTE, RequestError, UserError, quoted

__all__ = ["LONGEST_QUOTE", "OtherScoresError", "RequestError", "quoted"]


class OtherScoresError(UserError):
    """A model that is as it was written computes something else here: the fault of this machine or its packages."""
