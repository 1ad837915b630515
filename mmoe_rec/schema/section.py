"""What all sections of a settings file have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A strict, immutable part of the settings: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
