"""Plans for machines that are not there."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mmoe_rec.features.pipeline import max_layout
from mmoe_rec.settings.load import load_settings
from tests.commands import exit_code

CONFIG = "configs/cluster.yaml"


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    """Exit code, and what is printed."""
    code, said = exit_code("plan", "--config", CONFIG, *arguments), capsys.readouterr()
    return code, said.out + said.err


def test_a_terabyte_on_sixteen_cards(capsys: pytest.CaptureFixture) -> None:
    code, said = run(capsys, "--world-size", "16", "--local-world-size", "8", "--hbm-gib", "80")
    assert code == 0, said
    together = re.search(r"total: ([\d.]+) GiB", said)
    assert float(together[1]) * 2**30 > 1e12
    taken = [tuple(map(float, item)) for item in re.findall(r": ([\d.]+) of ([\d.]+) GiB", said)]
    assert all(0 < used <= offered == 64.0 for used, offered in taken)
    # What the ranks hold is what the tables take, and some activations.
    counts = [int(last) - int(first) + 1 for first, last in re.findall(r"each of ranks (\d+)-(\d+): [\d.]+ of", said)]
    total = sum(count * used for count, (used, _) in zip(counts, taken, strict=True))
    assert sum(counts) == 16
    assert float(together[1]) <= total < 1.05 * float(together[1])
    assert re.search(r"estimated time of tables in a step: [\d.]+ ms", said)
    assert "torchrun --nnodes 2 --nproc-per-node 8" in said


def test_tables_are_spread_as_the_settings_say(capsys: pytest.CaptureFixture) -> None:
    sixteen = ["--world-size", "16", "--local-world-size", "8"]
    code, said = run(capsys, *sixteen, "--training.sharding", "grid_shard", "--hbm-gib", "84")
    assert code == 0, said
    assert re.search(r"\nvideo: grid_shard \(each of ranks 0-6: [\d,]+ rows of 32 columns, rank 7: .* of 32 col", said)
    code, said = run(capsys, *sixteen, "--training.sharding", "column_wise")
    assert code == 2
    assert "with 1,024.0 GiB for tables in all. The largest table, 'viewer', has" in said
    sizes = [f"--features.{name}.max_size=400000000" for name in ("viewer", "video", "channel")]
    code, said = run(capsys, *sixteen, "--training.sharding", "column_wise", *sizes, "--features.viewer_channel.dim=4")
    assert code == 0, said
    # torchrec's estimate holds each part's own number of row-wise Adagrad.
    held = re.findall(r": ([\d.]+) of 64.00 GiB \(\d+%\) for tables \(([\d.]+)\)", said)
    assert held
    for all_of, tables in held:
        assert float(all_of) >= float(tables)
    assert re.search(r"\nviewer: column_wise \(each of ranks 0, 8: [\d,]+ rows of 32 columns\)\n", said)


def test_tables_that_do_not_fit_are_named_with_their_sizes(capsys: pytest.CaptureFixture) -> None:
    code, said = run(capsys, "--world-size", "8", "--local-world-size", "8")
    assert code == 2
    assert said.count("\n") == 1
    actual = re.search(
        r"the embedding tables take ([\d,.]+) GiB .* do not fit, .* into 8 rank\(s\) with ([\d,.]+) GiB .*\. "
        r"The largest table, 'viewer', has ([\d,]+) rows of 64 columns and takes ([\d,.]+) GiB\. Use more ranks, shard",
        said,
    )
    assert actual is not None, said
    needed, offered, rows, largest = (float(group.replace(",", "")) for group in actual.groups())
    assert offered == 8 * 64
    assert needed > offered
    assert largest == pytest.approx(rows * 65 * 4 / 2**30, abs=0.05)
    code, said = run(capsys, "--world-size", "16", "--local-world-size", "8")
    assert code == 0, said


def test_the_sizes_of_built_features_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    built = max_layout(load_settings(CONFIG).schema_)
    built = replace(built, tables=tuple(replace(table, rows=200) for table in built.tables))
    (tmp_path / "features" / "encoded").mkdir(parents=True)
    (tmp_path / "features" / "encoded" / "layout.json").write_text(built.to_json())
    work = ["--data.work_dir", str(tmp_path)]
    code, said = run(capsys, "--world-size", "2", "--local-world-size", "2", "--device", "cpu", *work)
    assert code == 0, said
    assert f"from the features in '{tmp_path / 'features'}'" in said
    assert re.search(r"video: table_wise \(rank [01]: 200 rows\)", said)


def test_half_of_the_bits_take_less_of_a_step(capsys: pytest.CaptureFixture) -> None:
    left = ["--world-size", "16", "--local-world-size", "4", "--host-gib", "256", "--training.batch_size", "32768"]
    times = []
    for arguments in (left, [*left, "--training.communication_dtype", "bf16"]):
        code, said = run(capsys, *arguments)
        assert code == 0, said
        times.append(float(re.search(r"tables in a step: ([\d.]+)", said)[1]))
    assert times[1] < 0.6 * times[0], "half as much is sent"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "16", "--features.video.max_size=null"], "video can have any number of ids"),
        (["--world-size", "12"], "--world-size 12 is not a multiple of --local-world-size 8"),
        (
            ["--world-size", "16", "--device", "cpu", "--training.sharding", "row_wise"],
            "training.sharding is row_wise, which torchrec supports only on GPUs. On CPUs, set it to auto, table_",
        ),
        (["--world-size", "8192"], "--world-size 8192 exceeds the limit of 4,096 ranks"),
        *[
            (["--world-size", "16", f"--{name}={value}"], f"invalid value for '--{name}': ")
            for name in ("hbm-gib", "host-gib")
            for value in ("0", "-80", "nan", "inf", "1e308", "much")
        ],
        (["--world-size", "16", "--hbm-gib", "0.01"], "into 16 rank(s) with"),
        (["--world-size", "128", "--training.batch_size", str(10**12)], "or lower `training.batch_size` or"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    local = [] if "--local-world-size" in arguments else ["--local-world-size", "8"]
    code, said = run(capsys, *arguments, *local)
    assert code == 2
    assert said.count("\n") == 1
    assert message in said
