"use strict";

const PERIOD = 500;
const get = (id) => document.getElementById(id);
const turns = [];
let running = null;

function headers() {
  const key = get("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/* The chat. */

function addTurn(who, text) {
  const turn = element("p", undefined, `turn ${who}`);
  turn.append(element("b", who), element("span", text));
  get("log").append(turn);
  get("log").scrollTop = get("log").scrollHeight;
  return turn;
}

function body(text) {
  const chat = get("mode").value === "chat";
  const asked = {
    model: get("model").value || undefined,
    temperature: Number(get("temperature").value),
    max_tokens: Number(get("tokens").value) || 256,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (!chat) return ["/v1/completions", { ...asked, prompt: text }];
  const system = get("system").value.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  return ["/v1/chat/completions", { ...asked, messages: [...before, ...turns] }];
}

async function* events(response) {
  const reader = response.body
    .pipeThrough(new TextDecoderStream())
    .getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(path, asked, turn, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(asked),
    signal,
  });
  if (!response.ok) throw new Error(await failure(response));
  const shown = turn.querySelector("span");
  const log = get("log");
  const began = performance.now();
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    const piece = choice && (choice.delta ? choice.delta.content : choice.text);
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    if (piece) shown.textContent += piece;
    if (event.usage) {
      const seconds = (performance.now() - began) / 1000;
      const { prompt_tokens: before, completion_tokens: made } = event.usage;
      const text = `${before} + ${made} tokens in ${seconds.toFixed(1)} s`;
      turn.append(element("small", text));
    }
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
  return shown.textContent;
}

async function send(text) {
  const chat = get("mode").value === "chat";
  addTurn("user", text);
  if (chat) turns.push({ role: "user", content: text });
  const [path, asked] = body(text);
  const turn = addTurn("assistant", "");
  running = new AbortController();
  get("stop").hidden = false;
  get("send").disabled = true;
  try {
    const said = await answer(path, asked, turn, running.signal);
    if (chat) turns.push({ role: "assistant", content: said });
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (!turn.isConnected) {
      // A new chat has begun.
    } else if (chat && stopped) {
      const said = turn.querySelector("span").textContent;
      turns.push({ role: "assistant", content: said });
    } else if (chat) {
      turns.pop();
    }
    if (!stopped) addTurn("error", error.message);
  }
  running = null;
  get("stop").hidden = true;
  get("send").disabled = false;
}

/* The batch. */

/* Of each sequence, for as long as it runs; neighbours differ. */
const colors = new Map();
const nameOf = (sequence) => `${sequence.id}.${sequence.index}`;

function giveColors(sequences) {
  const names = new Set(sequences.map(nameOf));
  for (const name of colors.keys()) if (!names.has(name)) colors.delete(name);
  const taken = new Set(colors.values());
  let number = 0;
  for (const name of names) {
    if (colors.has(name)) continue;
    while (taken.has(number)) number += 1;
    colors.set(name, number);
    taken.add(number);
  }
}

function color(sequence) {
  const hue = (20 + 137.5 * colors.get(nameOf(sequence))) % 360;
  return `hsl(${hue} 62% 52%)`;
}

function bar(share, paint) {
  const outer = element("div", undefined, "bar");
  const inner = element("span");
  inner.style.width = `${100 * share}%`;
  inner.style.background = paint;
  outer.append(inner);
  return outer;
}

function rowOf(sequence, most) {
  const row = element("tr");
  const name = `${sequence.id.split("-")[1].slice(0, 6)}.${sequence.index}`;
  const key = element("span", undefined, "key");
  key.style.background = color(sequence);
  const first = element("td");
  first.append(key, name);
  const pages = element("td");
  const picture = bar(sequence.pages / most, color(sequence));
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", `${sequence.pages} pages`);
  pages.append(picture);
  row.append(
    first,
    element("td", sequence.status),
    element("td", sequence.prompt_tokens, "number"),
    element("td", sequence.new_tokens, "number"),
    pages,
  );
  return row;
}

function show(batch) {
  const { held, total, size } = batch.pages;
  giveColors(batch.running);
  // A page that several hold counts once.
  const every = batch.running.reduce((sum, s) => sum + s.pages, 0) || 1;
  get("running").textContent = `${batch.running.length}/${batch.max_sequences}`;
  get("waiting").textContent = batch.waiting;
  get("speed").textContent = batch.tokens_per_second.toFixed(0);
  get("steps").textContent = batch.steps.toLocaleString();
  get("pages").textContent =
    `${held.toLocaleString()} of ${total.toLocaleString()} held, ` +
    `${size} tokens each`;
  get("pool").replaceChildren(
    ...batch.running.map((sequence) => {
      const part = element("span");
      part.style.width = `${(100 * held * sequence.pages) / (total * every)}%`;
      part.style.background = color(sequence);
      return part;
    }),
  );
  const most = Math.max(1, ...batch.running.map((s) => s.pages));
  get("rows").replaceChildren(...batch.running.map((s) => rowOf(s, most)));
  get("nothing").hidden = batch.running.length > 0;
  get("state").textContent = batch.state;
}

async function watch() {
  if (!document.hidden) {
    try {
      const response = await fetch("/batch", { headers: headers() });
      if (response.ok) {
        show(await response.json());
        if (!get("model").options.length) await listModels();
      } else {
        get("state").textContent = await failure(response);
        if (response.status === 401) get("settings").open = true;
      }
    } catch {
      get("state").textContent = "The server cannot be reached.";
    }
  }
  setTimeout(watch, PERIOD);
}

async function listModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) return;
  const { data } = await response.json();
  get("model").replaceChildren(...data.map(({ id }) => new Option(id)));
}

get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = get("prompt").value;
  if (!text || running) return;
  get("prompt").value = "";
  send(text);
});
get("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  get("form").requestSubmit();
});
get("stop").addEventListener("click", () => running && running.abort());
get("clear").addEventListener("click", () => {
  if (running) running.abort();
  turns.length = 0;
  get("log").replaceChildren();
});
get("key").value = sessionStorage.getItem("key") || "";
get("key").addEventListener("change", () => {
  sessionStorage.setItem("key", get("key").value);
});
watch();
