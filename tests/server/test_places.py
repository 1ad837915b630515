"""Rankings and events have places of their own: neither can crowd out the other."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mmoe_rec.live.journal import Journal
from mmoe_rec.server.app import Application
from mmoe_rec.server.limits import Limits
from mmoe_rec.server.models import Models, Source
from mmoe_rec.settings.help import describe
from tests.inference.small_model import SmallModel
from tests.server.asking import element, reply
from tests.server.test_events import as_json, later_log


@pytest.mark.parametrize("full", ["/invocations", "/events"])
def test_a_page_that_is_full_leaves_the_other_one_its_places(small: SmallModel, tmp_path: Path, full: str) -> None:
    Journal(tmp_path / "journal.db").close()
    models = Models(Limits(), tmp_path / "journal.db")
    models.load(Source(small.folder, "models:/small/7"))
    app = Application(models, Limits(max_waiting=2))
    assert app.events is not None
    places = {"/invocations": app.calls.places, "/events": app.events.places}
    bodies = {"/invocations": {"inputs": [element()]}, "/events": {"events": as_json(later_log(3, rows=2))}}

    async def asked() -> dict[str, int]:
        end = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"{"
            await end.wait()

        held = [asyncio.ensure_future(reply(app, page=full, parts=slow())) for _ in range(2)]
        while places[full].taken < 2:
            await asyncio.sleep(0)
        found = {page: (await reply(app, body, page=page)).status for page, body in bodies.items()}
        end.set()
        await asyncio.gather(*held)
        return found

    assert asyncio.run(asked()) == {page: 503 if page == full else 200 for page in bodies}
    assert [each.taken for each in places.values()] == [0, 0]


def test_the_setting_says_that_both_have_as_many() -> None:
    (told,) = [each for each in describe("serving").split("--serving.") if each.startswith("max_waiting")]
    assert "as many of /events" in told
