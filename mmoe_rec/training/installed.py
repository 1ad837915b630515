"""Whether torchrec, with fbgemm, is there; where it is not, one process trains on plain PyTorch tables."""

from __future__ import annotations

import functools
import importlib

from mmoe_rec.errors import UserError
from mmoe_rec.program import spelled

_PARTS = ("torchrec", "fbgemm_gpu")


@functools.cache
def torchrec_installed() -> bool:
    """Whether torchrec can be imported. Raises UserError where it is installed, but does not load."""
    try:
        for name in _PARTS:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _PARTS:
            return False
        raise _does_not_load(error) from error
    except (ImportError, OSError, AttributeError) as error:
        raise _does_not_load(error) from error
    return True


def require_torchrec(what: str, instead: str = "") -> None:
    """Raises UserError where torchrec is not installed. what: what needs it, such as "a plan"; instead: of it."""
    if not torchrec_installed():
        raise UserError(
            f"{what} needs torchrec and fbgemm, which are not installed; they come with the extra cpu or cuda, and "
            f"`{spelled('python -m pipelines.doctor')}` says what to type{instead and f'; or {instead}'}"
        )


def note() -> str:
    """What a training without torchrec says of its tables."""
    return (
        "tables are trained by plain PyTorch in one process, since torchrec (fbgemm) is not installed: "
        f"`{spelled('python -m pipelines.doctor')}` says what to type for sharded tables"
    )


def _does_not_load(error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return UserError(
        f"torchrec and fbgemm are installed, but do not load ({reason}): "
        f"{spelled('python -m pipelines.doctor')} says what to type"
    )
