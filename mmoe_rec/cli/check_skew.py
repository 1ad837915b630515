"""mmoe-rec check-skew --config configs/shop.yaml --from 2024-05-01 --to 2024-05-08 --requests data/shop/requests

Check for training-serving skew. Score the requests logged by `serve --log-requests` again, with point-in-time features
from the log. Report each feature, prediction and score that differs. The exit code is 1 if any value differs.

The command checks requests from --from until before --to. For details, see docs/how-to/train-on-served-requests.md.
"""

from pathlib import Path

import click

from mmoe_rec.cli.main import FOLDER, Configuration, settings_command, show

SKEW_EXIT_CODE = 1
"""Exit code if a served value differs."""


@settings_command(__doc__)
@click.option("--from", "start", required=True, metavar="DAY", help="first request time to check, such as 2024-05-01")
@click.option("--to", "end", required=True, metavar="DAY", help="end of the request times to check, exclusive")
@click.option("--requests", type=FOLDER, required=True, metavar="DIR", help="folder of the request log")
@click.option("--model", metavar="M", help="models:/NAME@ALIAS, runs:/..., or a folder (default: the settings' alias)")
@click.option("--out", type=FOLDER, metavar="FOLDER", help="folder for skew.json (default: not written)")
def check_skew(
    configuration: Configuration, start: str, end: str, requests: Path, model: str | None, out: Path | None
) -> None:
    from mmoe_rec.live import skew
    from mmoe_rec.log.request_values import parse_time

    settings = configuration.settings
    model_uri = model or f"models:/{settings.registered_model}@{settings.tracking.alias}"
    report = skew.check_skew(settings, parse_time(start), parse_time(end), model_uri, requests, out)
    show(skew.describe(report))
    if report["mismatches"]:
        raise SystemExit(SKEW_EXIT_CODE)
