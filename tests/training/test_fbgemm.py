"""fbgemm's CPU kernels know the processor, and give the same as its reference loops."""

import subprocess
import sys

import pytest

CODE = """
import sys, time
import torch
from mmoe_rec.training import fbgemm
if sys.argv[1] == "share":
    print(fbgemm.share_cpuinfo(), fbgemm.share_cpuinfo())
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
tables = SplitTableBatchedEmbeddingBagsCodegen(
    [(1000, 16, EmbeddingLocation.HOST, ComputeDevice.CPU)] * 20,
    optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.05, eps=1e-8,
)
torch.manual_seed(0)
for weights in tables.split_embedding_weights():
    weights.normal_()
seconds = []
for _ in range(5):
    ids = torch.randint(0, 1000, (20 * 4096,))
    pooled = tables(ids, torch.arange(20 * 4096 + 1))
    gradient = torch.randn_like(pooled)
    started = time.perf_counter()
    pooled.backward(gradient)
    seconds.append(time.perf_counter() - started)
torch.save(tables.split_embedding_weights(), sys.argv[2])
print(min(seconds))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries are others elsewhere")
def test_the_kernels_know_the_processor(tmp_path) -> None:
    import torch

    found = {}
    for way in ("share", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", CODE, way, str(tmp_path / way)], capture_output=True, text=True, check=True
        )
        found[way] = done.stdout.split()
    first, again, seconds = found["share"]
    assert again == "False", "there is nothing left to share"
    if first == "True":  # this build of torch has two copies
        assert float(seconds) < 0.5 * float(found["leave"][0])
    for ours, reference in zip(torch.load(tmp_path / "share"), torch.load(tmp_path / "leave"), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
