// The node: GET /top once a second while the page is seen, into elements that are kept.

const LOOK_MS = 1000, PATIENCE_MS = 5000, SPEEDS = 90;
const TASKS = [["schedule", 1], ["input", 2], ["forward", 3], ["sample", 4], ["output", 5]];
const NONE = "–";

const numbers = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const amount = (value) => (value === null ? NONE : numbers(value, value >= 100 || value === 0 ? 0 : 1));
// Small shares with a digit more: 0.4 % is not nothing.
const share = (value, digits = value > 0 && value < 0.1 ? 1 : 0) => (value === null ? NONE : numbers(value * 100, digits) + " %");
function ms(value) {
  if (value >= 1000) return numbers(value / 1000, 2) + " s";
  return numbers(value, value >= 10 ? 0 : 1) + " ms";
}
function us(value) {
  if (value >= 1000) return numbers(value / 1000, value >= 1e5 ? 0 : value >= 1e4 ? 1 : 2) + " ms";
  return numbers(value, value >= 100 || value < 0.05 ? 0 : 1) + " µs";
}
function duration(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (hours >= 24) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}
const plural = (count, word) => `${numbers(count)} ${word}${count === 1 ? "" : "s"}`;

// ---------------------------------------------------------------- pieces that are kept
// A bar of parts; set([share, ...]) with shares of the whole.
function meter(...colours) {
  const parts = colours.map(([colour, opacity]) => {
    const part = make("i");
    part.style.background = colour;
    part.style.opacity = opacity ?? 1;
    return part;
  });
  const element = make("div", "meter", ...parts);
  const set = (...shares) => parts.forEach((part, i) => {
    part.style.width = `${Math.max(0, Math.min(1, shares[i] || 0)) * 100}%`;
  });
  return { element, parts, set };
}
const fullness = (value) => (value < 0.75 ? "var(--t4)" : value < 0.92 ? "var(--t2)" : "var(--bad)");

function tile(name) {
  const value = make("b"), below = make("span");
  const element = make("div", "card tile", make("span", "", name), value, below);
  const set = (text, unit, note) => {
    if (value.dataset.shown !== `${text} ${unit}`) {
      value.replaceChildren(text, ...(unit ? [make("small", "", unit)] : []));
      value.dataset.shown = `${text} ${unit}`;
    }
    say(below, note);
  };
  return { element, set };
}

function spark() {
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
  const area = document.createElementNS(space, "polygon"), line = document.createElementNS(space, "polyline");
  svg.setAttribute("viewBox", `0 0 ${SPEEDS - 1} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.append(area, line);
  const set = (values) => {
    const most = Math.max(1, ...values), first = SPEEDS - values.length;
    const points = values.map((value, i) => `${first + i},${(96 - (value / most) * 90).toFixed(1)}`);
    line.setAttribute("points", points.join(" "));
    area.setAttribute("points", points.length ? `${first},100 ${points.join(" ")} ${SPEEDS - 1},100` : "");
  };
  return { element: svg, set };
}

// ---------------------------------------------------------------- tiles
const tiles = {
  speed: tile("tokens a second"), running: tile("running"), ttft: tile("first token after"),
  itl: tile("between tokens"), serial: tile("serial fraction"), power: tile("power"),
};
const speeds = [], speedLine = spark();
tiles.speed.element.prepend(speedLine.element);
byId("tiles").append(...Object.values(tiles).map((each) => each.element));

function drawTiles(picture) {
  const { rates, requests, energy, groups } = picture;
  speeds.push(rates.tokens_per_s || 0);
  if (speeds.length > SPEEDS) speeds.shift();
  speedLine.set(speeds);
  const prompts = rates.prompt_tokens_per_s;
  tiles.speed.set(amount(rates.tokens_per_s), "", prompts === null ? "" : `+ ${amount(prompts)} of prompts`);
  const sum = (name) => groups.reduce((total, group) => total + (group[name] || 0), 0);
  const waiting = sum("waiting") + requests.waiting_for_group + requests.tokenizing;
  tiles.running.set(numbers(sum("running")), "", `${numbers(waiting)} waiting`);
  for (const name of ["ttft", "itl"]) {
    const found = rates[name];
    if (found) tiles[name].set(...ms(found.p50_ms).split(" "), `P99 ${ms(found.p99_ms)}`);
    else tiles[name].set(NONE, "", "no tokens in 30 s");
  }
  const measured = groups.filter((group) => group.stages);
  const serial = measured.reduce((total, group) => total + group.stages.serial_fraction, 0) / measured.length;
  tiles.serial.set(...(measured.length ? share(serial, 1).split(" ") : [NONE, ""]), "of a step, not T3");
  tiles.power.element.hidden = !energy;
  if (energy) {
    tiles.power.set(numbers(energy.power_w), "W", energy.j_per_token === null ? "no tokens" : `${numbers(energy.j_per_token, 2)} J a token`);
  }
}

// ---------------------------------------------------------------- groups
const cards = new Map();

function groupCard(number) {
  const refs = {};
  const text = (name, tag = "span", className = "") => (refs[name] = make(tag, className));
  const kv = (refs.kv = meter(["var(--t4)"]));
  const rows = ["ttft", "itl"].map((name) => make("tr", "",
    make("td", "", name === "ttft" ? "TTFT" : "ITL"), ...["p50_ms", "p95_ms", "p99_ms"].map((p) => text(name + p, "td"))));
  const head = make("tr", "", ...["latency", "P50", "P95", "P99"].map((each) => make("th", "", each)));
  refs.tasks = TASKS.map(([name, task]) => {
    const colour = `var(--t${task})`, bar = meter([colour], [colour, 0.32]);
    const title = make("span", "", make("span", "number", `T${task}`), name);
    title.firstChild.style.color = colour;
    const took = make("span"), waited = make("span");
    return { name, bar, took, waited, element: make("div", "task", title, bar.element, took, waited) };
  });
  refs.idle = meter(["var(--idle)"]);
  const idle = make("div", "task", make("span", "", "idle"), refs.idle.element, text("idleTime"), make("span"));
  refs.step = make("div", "step",
    make("div", "bar", make("span", "", "Step ", text("stepTime", "b"), text("stepP99")), make("span", "", "serial fraction ", text("serial", "b"))),
    make("div", "task head", make("span", "", "task"), make("span"), make("span", "", "time"), make("span", "", "waited for")),
    ...refs.tasks.map((each) => each.element), idle,
    make("p", "hint", "full colour: the device waits for it · pale: beside the forward pass"));
  refs.gpus = make("div");
  refs.element = make("article", "card group",
    make("div", "bar", make("h2", "", `Group ${number}`, text("state", "span", "pill")),
      make("span", "queue", text("running", "b"), " running · ", text("waiting", "b"), " waiting")),
    make("div", "figures", ...[["speed", "tokens/s"], ["prompts", "prompt tokens/s"], ["cached", "prompts cached"]].map(
      ([name, label]) => make("div", "", text(name, "b"), make("span", "", label)))),
    make("div", "line", make("span", "label", "KV cache"), kv.element, text("kvText")),
    make("table", "", make("thead", "", head), make("tbody", "", ...rows)),
    refs.step, refs.gpus);
  return refs;
}

function drawGroup(group) {
  if (!cards.has(group.group)) {
    cards.set(group.group, groupCard(group.group));
    byId("groups").append(cards.get(group.group).element);
  }
  const refs = cards.get(group.group), { rates, stages } = group;
  say(refs.state, group.state);
  refs.state.className = `pill ${group.state === "ready" ? "good" : group.state === "failed" ? "bad" : "warn"}`;
  say(refs.running, group.running === null ? NONE : numbers(group.running));
  say(refs.waiting, group.waiting === null ? NONE : numbers(group.waiting));
  refs.kv.set(group.kv_usage || 0);
  refs.kv.parts[0].style.background = fullness(group.kv_usage || 0);
  say(refs.kvText, group.kv_usage === null ? NONE : `${share(group.kv_usage)} of ${numbers(group.kv_tokens_total)} tokens`);
  say(refs.speed, amount(rates.tokens_per_s));
  say(refs.prompts, amount(rates.prompt_tokens_per_s));
  say(refs.cached, share(group.prefix_hit_rate));
  for (const name of ["ttft", "itl"])
    for (const p of ["p50_ms", "p95_ms", "p99_ms"]) say(refs[name + p], rates[name] ? ms(rates[name][p]) : NONE);
  refs.step.hidden = !stages;
  if (stages) drawStages(refs, stages);
  refs.gpus.replaceChildren(...group.gpus.map((gpu) => gpuLine(gpu)));
  if (group.energy && group.energy.j_per_token !== null)
    refs.gpus.append(make("p", "hint", `${numbers(group.energy.power_w)} W together · ${numbers(group.energy.j_per_token, 3)} J a token`));
}

function drawStages(refs, stages) {
  const whole = Math.max(stages.step_us_mean, 0.1);
  say(refs.stepTime, us(stages.step_us_mean));
  say(refs.stepP99, ` · P99 ${us(stages.step_us_p99)}`);
  say(refs.serial, share(stages.serial_fraction, 1));
  for (const { name, bar, took, waited } of refs.tasks) {
    const { mean_us, exposed_us } = stages[name], exposed = Math.min(1, exposed_us / whole);
    bar.set(exposed, Math.min(1, mean_us / whole) - exposed);
    say(took, us(mean_us));
    say(waited, us(exposed_us));
    waited.className = exposed_us < 0.05 ? "zero" : "";
  }
  refs.idle.set(stages.idle_us_mean / whole);
  say(refs.idleTime, us(stages.idle_us_mean));
}

function gpuLine(gpu) {
  const busy = meter(["var(--t3)"]);
  busy.set(gpu.utilization || 0);
  const facts = [`${share(gpu.utilization)}`];
  if (gpu.power_w !== null) facts.push(`${numbers(gpu.power_w)} W`);
  if (gpu.memory_total_bytes) facts.push(`${share(gpu.memory_used_bytes / gpu.memory_total_bytes)} memory`);
  const line = make("div", "line gpu", make("span", "label", gpu.name.replace(/^NVIDIA /, "")), busy.element, make("span", "", facts.join(" · ")));
  line.title = `${gpu.name}, ${gpu.uuid}` + (gpu.temperature_c === null ? "" : `, ${numbers(gpu.temperature_c)} °C`);
  return line;
}

// ---------------------------------------------------------------- processes
const actors = new Map();

function drawActors(found) {
  for (const [name, refs] of actors) {
    if (!found.some((each) => each.name === name)) { refs.element.remove(); actors.delete(name); }
  }
  for (const actor of found) {
    if (!actors.has(actor.name)) {
      const bar = meter(["var(--t3)"]), name = make("span", "", actor.name), cpu = make("span");
      actors.set(actor.name, { bar, name, cpu, element: make("div", "actor", name, bar.element, cpu) });
      byId("actors").append(actors.get(actor.name).element);
    }
    const refs = actors.get(actor.name);
    refs.element.classList.toggle("dead", actor.state === "dead");
    refs.element.title = `${actor.name}: ${actor.state}, pid ${actor.pid}, ${plural(actor.restarts, "restart")}`;
    say(refs.name, actor.restarts ? `${actor.name} ↻${actor.restarts}` : actor.name);
    refs.bar.set((actor.cpu || 0) / actor.threads);
    say(refs.cpu, share(actor.cpu));
    refs.cpu.className = actor.cpu ? "" : "zero";
  }
}

// ---------------------------------------------------------------- the whole
function draw(picture) {
  const { model, groups } = picture;
  const parameters = model.parameters >= 1e9 ? `${numbers(model.parameters / 1e9, 1)} B` : `${numbers(model.parameters / 1e6)} M`;
  say(byId("about"), `${model.id} · ${parameters} parameters, ${model.dtype} on ${model.device} · ${plural(groups.length, "group")} · node ${picture.node}, up ${duration(picture.uptime_s)}`);
  say(byId("model"), model.id);
  document.title = `${amount(picture.rates.tokens_per_s)} tokens/s · ${picture.node} · Albireo`;
  const ready = groups.filter((group) => group.state === "ready").length;
  if (picture.draining) setState("stopping", "warn");
  else if (ready === groups.length) setState("ready", "good");
  else setState(`${ready} of ${plural(groups.length, "group")} ready`, ready ? "warn" : "bad");
  drawTiles(picture);
  groups.forEach(drawGroup);
  drawActors(picture.actors);
  say(byId("footnote"), [picture.no_gpu, `Rates: last ${numbers(picture.span_s)} s. Latencies: last 30 s. Albireo ${picture.version}`].filter(Boolean).join(" · "));
}

function setState(text, kind) {
  say(byId("state"), text);
  byId("state").className = `pill ${kind}`;
}

function notice(text) {
  byId("notice").hidden = !text;
  say(byId("notice"), text);
}

let looking = 0;
async function look() {
  clearTimeout(looking);
  if (!document.hidden) {
    try {
      const answer = await ask("/top", { signal: AbortSignal.timeout(PATIENCE_MS) });
      if (answer.ok) { draw(await answer.json()); notice(""); }
      else if (answer.status === 401) { setState("needs a key", "warn"); notice("This node asks for an API key."); }
      else { setState("not ready", "warn"); notice((await answer.json()).error.message); }
    } catch {
      setState("no answer", "bad");
      notice("The node does not answer. It may be starting again; this page goes on when it is back.");
    }
  }
  looking = setTimeout(look, LOOK_MS);
}
keyGiven = look;
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
look();
