"""An added type of expert is served as it was trained, or refused: the fused pass does not know it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmoe_rec.errors import UserError
from mmoe_rec.inference import scorer
from mmoe_rec.inference.ranker import Ranker
from mmoe_rec.model import fused, levels
from mmoe_rec.model.levels import Experts
from tests.inference.small_model import SmallModel

OFF = r"^mmoe_rec/model/fused.py: the fused pass returns other logits .*\. The difference is 0\.\d+ of"


class Doubled(Experts):
    """Experts whose outputs count twice."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


class InFloat32(Experts):
    """The same experts, by a product that takes float32 alone."""

    def forward(self, hidden: Tensor) -> Tensor:
        torch.eye(hidden.shape[1]) @ hidden.t()
        return super().forward(hidden)


class WrongInFloat32(InFloat32):
    """Other experts, by a product that takes float32 alone."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).abs()


@pytest.mark.parametrize("added", [Doubled, WrongInFloat32])
def test_other_logits_are_refused_where_the_model_is_written_and_loaded(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: type[Experts]
) -> None:
    monkeypatch.setattr(levels, "Experts", added)
    with pytest.raises(UserError, match=OFF):
        SmallModel(tmp_path)
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match=OFF):
        Ranker.load(small.folder)


def test_what_the_refusal_advises_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "Experts", Doubled)
    monkeypatch.setattr(scorer, "build_fused_forward", lambda *_: None)
    assert Ranker.load(SmallModel(tmp_path).folder).scorer.fused is None


@pytest.mark.parametrize("added", [type("Same", (Experts,), {}), InFloat32])
def test_equal_logits_are_fused(small: SmallModel, monkeypatch: pytest.MonkeyPatch, added: type[Experts]) -> None:
    monkeypatch.setattr(levels, "Experts", added)
    assert Ranker.load(small.folder).scorer.fused is not None


def test_rounding_is_no_difference(small: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a processor whose products in float32 are those of bf16."""
    exact = fused._batched_linear

    def rounded(x: Tensor, weights: fused.Weights) -> Tensor:
        return exact(x, weights).bfloat16().to(x.dtype) if x.dtype == torch.float32 else exact(x, weights)

    monkeypatch.setattr(fused, "_batched_linear", rounded)
    off = fused._find_difference(small.model.mixture, torch.randn(8, small.model.width))
    assert off > 10 * fused._TOLERANCE
    fused.check_fused_forward(small.model)
