// The chat: POST /v1/chat/completions with "stream": true; text is drawn as it comes.

const conversation = [];       // {role, content}
let streaming = null;          // the AbortController of the answer that is coming
const log = byId("log"), message = byId("message"), settings = byId("ask");
log.dataset.hint = "Ask something. The conversation stays in this tab.";

// ---------------------------------------------------------------- settings
const chosen = (name) => settings.elements[name].value.trim();

function parameters() {
  const found = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (chosen(name) !== "") found[name] = Number(chosen(name));
  return found;
}

function sayChosen() {
  const texts = [];
  if (chosen("temperature")) texts.push(`temperature ${chosen("temperature")}`);
  if (chosen("top_p")) texts.push(`top-p ${chosen("top_p")}`);
  if (chosen("max_tokens")) texts.push(`${chosen("max_tokens")} tokens`);
  if (chosen("seed")) texts.push(`seed ${chosen("seed")}`);
  if (chosen("system")) texts.push("system prompt");
  say(byId("chosen"), texts.length ? `· ${texts.join(", ")}` : "");
}
settings.addEventListener("input", sayChosen);
sayChosen();

// ---------------------------------------------------------------- text
// Blocks and pieces of code are set apart, bold is bold, all else is shown as it is.
function setText(element, text) {
  const parts = text.split(/```(?:[\w+-]*\n)?/), nodes = [];
  parts.forEach((part, i) => {
    if (i % 2) nodes.push(make("pre", "", make("code", "", part.replace(/\n$/, ""))));
    else nodes.push(...inline(i ? part.replace(/^\n/, "") : part));
  });
  element.replaceChildren(...nodes);
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part) => {
    if (/^`.+`$/.test(part)) return make("code", "", part.slice(1, -1));
    if (/^\*\*.+\*\*$/.test(part)) return make("strong", "", part.slice(2, -2));
    return part;
  });
}

function bubble(role, text) {
  const shown = make("div", "text"), facts = make("div", "facts");
  const element = make("div", `said ${role}`, shown, ...(role === "user" ? [] : [facts]));
  setText(shown, text);
  log.append(element);
  log.scrollTop = log.scrollHeight;
  return { element, shown, facts };
}

// ---------------------------------------------------------------- an answer
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer() {
  const { element, shown, facts } = bubble("assistant", "");
  const began = performance.now(), abort = new AbortController();
  let text = "", first = 0, usage = null, reason = "", drawing = 0;
  const show = () => {
    drawing = 0;
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    setText(shown, text);
    if (follows) log.scrollTop = log.scrollHeight;
  };
  setStreaming(abort);
  element.classList.add("busy");
  try {
    const system = chosen("system");
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation];
    const response = await ask("/v1/chat/completions", {
      method: "POST", signal: abort.signal, headers: { "content-type": "application/json" },
      body: JSON.stringify({ messages, stream: true, stream_options: { include_usage: true }, ...parameters() }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of eventsOf(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      for (const choice of event.choices) {
        if (choice.delta.content) {
          first = first || performance.now();
          text += choice.delta.content;
          drawing = drawing || requestAnimationFrame(show);
        }
        reason = choice.finish_reason || reason;
      }
    }
    if (!reason) throw new Error("the answer broke off");
  } catch (error) {
    if (abort.signal.aborted) reason = "stopped";
    else element.append(make("div", "error", error.message));
  }
  cancelAnimationFrame(drawing);
  show();
  element.classList.remove("busy");
  if (streaming === abort) setStreaming(null);
  if (text && conversation.at(-1)?.role === "user" && element.isConnected) conversation.push({ role: "assistant", content: text });
  say(facts, factsOf(began, first, usage, reason));
}

function factsOf(began, first, usage, reason) {
  const texts = [];
  if (first) texts.push(`first token after ${ms(first - began)}`);
  if (usage) {
    texts.unshift(plural(usage.completion_tokens, "token"));
    const seconds = (performance.now() - first) / 1000;
    if (first && usage.completion_tokens > 1) texts.push(`${numbers((usage.completion_tokens - 1) / seconds)} a second`);
  }
  if (reason === "length") texts.push("cut off: most tokens reached");
  if (reason === "stopped") texts.push("stopped");
  return texts.join(" · ");
}

function setStreaming(abort) {
  streaming = abort;
  say(byId("send"), abort ? "Stop" : "Send");
  byId("send").classList.toggle("stop", Boolean(abort));
}

// ---------------------------------------------------------------- asking
settings.addEventListener("submit", (event) => {
  event.preventDefault();
  if (streaming) { streaming.abort(); return; }
  const text = message.value.trim();
  if (!text) return;
  message.value = "";
  fit();
  // After an error or a stop before the first word the question stands alone: it is asked again.
  if (conversation.at(-1)?.role === "user") conversation.pop();
  conversation.push({ role: "user", content: text });
  bubble("user", text);
  answer();
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!streaming) settings.requestSubmit();
  }
  if (event.key === "Escape" && streaming) streaming.abort();
});
function fit() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}
message.addEventListener("input", fit);
byId("new").addEventListener("click", () => {
  if (streaming) streaming.abort();
  conversation.length = 0;
  log.replaceChildren();
  message.focus();
});
