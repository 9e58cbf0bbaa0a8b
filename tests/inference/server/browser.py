"""A headless Chromium, by its own protocol."""

import asyncio
import contextlib
import shutil

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find():
  """Where one is; `None` if there is none."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
  """A page that is open."""

  def __init__(self, socket):
    self._socket, self._number = socket, 0
    self.messages = []

  async def call(self, method, **params):
    """What a method of the protocol gives."""
    self._number += 1
    await self._socket.send_json(
      {"id": self._number, "method": method, "params": params}
    )
    while True:
      answer = await self._socket.receive_json()
      if answer.get("id") == self._number:
        return answer["result"]
      self.messages.append(answer)

  async def run(self, script):
    """What a script gives, when it has been waited for."""
    found = await self.call(
      "Runtime.evaluate",
      expression=script,
      awaitPromise=True,
      returnByValue=True,
    )
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  async def wait(self, condition):
    """Waits until a script gives something that is true."""
    while not (value := await self.run(condition)):
      await asyncio.sleep(0.05)
    return value


@contextlib.asynccontextmanager
async def opened(url, folder, *options):
  """A page in a browser of its own."""
  process = await asyncio.create_subprocess_exec(
    find(),
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-port=0",
    f"--user-data-dir={folder}",
    *options,
    "about:blank",
    stdout=asyncio.subprocess.DEVNULL,
    stderr=asyncio.subprocess.DEVNULL,
  )
  try:
    port_file = folder / "DevToolsActivePort"
    while not (port_file.exists() and "\n" in port_file.read_text()):
      assert process.returncode is None
      await asyncio.sleep(0.05)
    port = port_file.read_text().split()[0]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
      async with session.get("/json/list") as response:
        (target, *_) = await response.json()
      async with session.ws_connect(
        target["webSocketDebuggerUrl"], max_msg_size=0
      ) as socket:
        page = Page(socket)
        for domain in ("Runtime", "Log", "Network"):
          await page.call(f"{domain}.enable")
        await page.call("Page.navigate", url=url)
        yield page
  finally:
    if process.returncode is None:
      process.terminate()
    await process.wait()
