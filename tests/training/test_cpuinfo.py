"""fbgemm's CPU kernels know the processor, and give the same as its reference loops."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import torch
from mmoe_rec.training import fbgemm
if sys.argv[1] == "share":
    print(fbgemm.share_cpuinfo(), fbgemm.share_cpuinfo())
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
def has_avx2():
    # What fbgemm's kernels ask before they choose.
    import ctypes, pathlib, fbgemm_gpu
    ask = ctypes.CDLL(str(pathlib.Path(fbgemm_gpu.__file__).with_name("fbgemm.so")))._ZN6fbgemm20fbgemmHasAvx2SupportEv
    ask.restype = ctypes.c_bool
    return ask()
tables = SplitTableBatchedEmbeddingBagsCodegen(
    [(1000, 16, EmbeddingLocation.HOST, ComputeDevice.CPU)] * 20,
    optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.05, eps=1e-8,
)
torch.manual_seed(0)
for weights in tables.split_embedding_weights():
    weights.normal_()
for _ in range(5):
    ids = torch.randint(0, 1000, (20 * 4096,))
    pooled = tables(ids, torch.arange(20 * 4096 + 1))
    gradient = torch.randn_like(pooled)
    pooled.backward(gradient)
torch.save(tables.split_embedding_weights(), sys.argv[2])
print(has_avx2())
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the libraries are others elsewhere")
def test_the_kernels_know_the_processor(tmp_path) -> None:
    import torch

    found = {}
    for way in ("share", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", CODE, way, str(tmp_path / way)], capture_output=True, text=True, check=True
        )
        found[way] = done.stdout.split()
    shared, again, known = found["share"]
    assert again == "False", "there is nothing left to share"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert known == str("avx2" in flags)
    if shared == "True":  # this build of torch has two copies
        assert found["leave"] == ["False"]
    for ours, reference in zip(torch.load(tmp_path / "share"), torch.load(tmp_path / "leave"), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
