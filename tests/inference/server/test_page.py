"""The page at /, in a browser."""

import asyncio

import pytest

from . import browser
from .conftest import fake_served, serving

pytestmark = pytest.mark.skipif(
  browser.find() is None, reason="no Chromium is installed"
)


def test_a_chat_and_the_batch_are_shown(tmp_path):
  async def main():
    served = fake_served()
    served.engine.runner.seconds = 0.02
    async with (
      asyncio.timeout(50),
      serving(served, api_key="secret") as (session, _),
      browser.opened(str(session._base_url), tmp_path) as page,
    ):
      # Without a key the page says what is missing.
      state = "document.getElementById('state')?.textContent"
      await page.wait(f"{state}?.includes('API key')")
      await page.run(
        "document.getElementById('key').value = 'secret';"
        "document.getElementById('tokens').value = 60"
      )
      await page.wait("document.getElementById('model').options.length == 2")
      await page.run(
        "document.getElementById('prompt').value = '<b>Hi</b>';"
        "document.getElementById('form').requestSubmit()"
      )
      await page.wait("document.querySelectorAll('#rows tr').length == 1")
      await page.wait("document.querySelectorAll('#pool span').length == 1")
      await page.wait("document.querySelector('.assistant small') != null")
      said = await page.run(
        "[...document.querySelectorAll('.turn span')].map(s => s.textContent)"
      )
      assert said == ["<b>Hi</b>", "hello " * 10]
      await page.wait("document.querySelectorAll('#rows tr').length == 0")
      # An error is shown and the chat goes on.
      await page.run(
        "document.getElementById('tokens').value = 100000;"
        "document.getElementById('prompt').value = 'more';"
        "document.getElementById('form').requestSubmit()"
      )
      shown = await page.wait("document.querySelector('.error')?.innerText")
      assert "together at most 256 fit" in shown
      asked = [
        message["params"]["request"]["url"]
        for message in page.messages
        if message["method"] == "Network.requestWillBeSent"
      ]
      own = (str(session._base_url), "data:", "about:")
      assert all(url.startswith(own) for url in asked)
      problems = [
        message["params"]["entry"]
        for message in page.messages
        if message["method"] == "Log.entryAdded"
        and message["params"]["entry"]["source"] in ("security", "javascript")
      ]
      assert not problems
      # Labels for all that is typed into.
      assert await page.run(
        "[...document.querySelectorAll('input, select, textarea')]"
        ".every(field => field.labels.length == 1)"
      )

  asyncio.run(main())
