"use strict";
// Draws the stretch in #data: one canvas of rows (actors and devices) over time, an overview of
// the whole, and the summary of the chosen group.  Times are nanoseconds from the stretch's begin.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SPAN = 5;              // numbers of a span: start, length, stage, step, count
const GAP = 3;               // of an idle gap: start, length, step behind it
const GUTTER = 128, AXIS = 26, ROW = 24, DEVICE_ROW = 34, HEAD = 24, MIN_VIEW = 2000;
const PAUSE = 6, FORWARD = 3, SAMPLE = 4;

const numbers = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
function time(ns) {
  const size = Math.abs(ns);
  if (size >= 1e9) return numbers(ns / 1e9, 3) + " s";
  if (size >= 1e6) return numbers(ns / 1e6, size >= 1e8 ? 1 : 2) + " ms";
  return numbers(ns / 1e3, size >= 1e5 || ns === 0 ? 0 : 1) + " µs";
}

// ---------------------------------------------------------------- rows and steps
const rows = data.rows.map((row) => Object.assign(row, { count: row.spans.length / SPAN, gaps: row.idle.length / GAP }));
for (const row of rows) {
  // The longest span that begins before an index: how far back a search has to look.
  row.reach = new Float64Array(row.count + 1);
  for (let i = 0; i < row.count; i++) row.reach[i + 1] = Math.max(row.reach[i], row.spans[i * SPAN] + row.spans[i * SPAN + 1]);
}
const groups = [...new Set(rows.filter((row) => row.group >= 0).map((row) => row.group))];
let group = groups[0];
const hidden = new Set();
let hovered = null, marked = null;   // {group, step}
let view = { from: 0, to: data.length };

function stepsOf(number) {
  // Begin and end of each step on the group's first device.
  const row = rows.find((each) => each.device && each.group === number && !each.ended);
  const steps = new Map();
  if (row) for (let i = 0; i < row.spans.length; i += SPAN) {
    const [start, length, , step] = row.spans.slice(i, i + SPAN);
    const known = steps.get(step);
    if (known) { known.from = Math.min(known.from, start); known.to = Math.max(known.to, start + length); }
    else steps.set(step, { step, from: start, to: start + length });
  }
  return [...steps.values()].sort((a, b) => a.from - b.from);
}
const steps = new Map(groups.map((number) => [number, stepsOf(number)]));

function firstVisible(row, at) {
  // The first span that may reach beyond `at`: reach is ascending.
  let low = 0, high = row.count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (row.reach[middle + 1] < at) low = middle + 1; else high = middle;
  }
  return low;
}

// ---------------------------------------------------------------- summary
const TASKS = [["schedule", 1], ["input", 2], ["forward", 3], ["sample", 4], ["output", 5]];
const us = (value) => (value >= 1000 ? numbers(value / 1000, 2) + " ms" : numbers(value, value >= 100 || value === 0 ? 0 : 1) + " µs");

function tile(value, unit, text, first) {
  return `<div class="tile${first ? " first" : ""}"><b>${value}<small>${unit}</small></b><span>${text}</span></div>`;
}
function split(text) { const [value, unit] = text.split(" "); return [value, unit]; }

function summary() {
  const stats = data.stats[group];
  byId("summary").hidden = !stats;
  if (!stats) return;
  byId("tiles").innerHTML =
    tile(numbers(stats.serial_fraction * 100, 2), "%", "serial fraction: the step without its forward pass", true) +
    tile(...split(us(stats.step_us_mean)), `a step · P99 ${us(stats.step_us_p99)} · ${stats.steps} steps`) +
    tile(...split(us(stats.idle_us_mean)), `device idle in a step · P99 ${us(stats.idle_us_p99)}`) +
    tile(numbers(stats.planned_ahead * 100, 1), "%", "of the plans were there before the step before had ended");
  const exposed = TASKS.map(([name, task]) => [task, data.tasks[task], stats[name].exposed_us]);
  exposed.push([0, "none of them", stats.other_exposed_us]);
  byId("bar").innerHTML = exposed.sort((a, b) => (b[0] === FORWARD) - (a[0] === FORWARD))
    .map(([task, name, value]) => `<i style="flex:${value} 0 0;background:var(--t${task})" title="${name}: ${us(value)}"></i>`).join("");
  const line = (task, name, mean, p99, value) =>
    `<tr><td><i style="background:var(--t${task})"></i>${name}</td><td>${mean}</td><td>${p99}</td><td class="${value < 0.05 ? "zero" : ""}">${us(value)}</td></tr>`;
  byId("tasks").innerHTML = TASKS.map(([name, task]) =>
    line(task, data.tasks[task], us(stats[name].mean_us), us(stats[name].p99_us), stats[name].exposed_us)).join("") +
    line(0, "none of them", "", "", stats.other_exposed_us);
}

// ---------------------------------------------------------------- drawing
const timeline = byId("timeline"), overview = byId("overview");
let colours = {};
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  colours = { tasks: [0, 1, 2, 3, 4, 5, 6].map((task) => of("--t" + task)) };
  for (const name of ["panel", "ink", "faint", "line", "row", "idle", "on"]) colours[name] = of("--" + name);
}

let layout = [];             // {row, top, height} or {title, top}
function lay() {
  layout = [];
  let top = AXIS, last = null;
  for (const row of rows) {
    if (row.group !== last) { layout.push({ title: row.group < 0 ? "node" : `group ${row.group}`, top }); top += HEAD; last = row.group; }
    const height = row.device ? DEVICE_ROW : ROW;
    layout.push({ row, top, height });
    top += height + 3;
  }
  timeline.style.height = top + 8 + "px";
}

function fit(canvas) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "11px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
  context.textBaseline = "middle";
  return [context, width, height];
}
const toX = (ns, width) => GUTTER + ((ns - view.from) / (view.to - view.from)) * (width - GUTTER);
const toNs = (x, width) => view.from + ((x - GUTTER) / (width - GUTTER)) * (view.to - view.from);

function drawAxis(context, width, height) {
  const rough = (view.to - view.from) / Math.max(2, (width - GUTTER) / 110);
  const power = 10 ** Math.floor(Math.log10(rough));
  const every = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  context.textAlign = "center";
  for (let at = Math.ceil(view.from / every) * every; at <= view.to; at += every) {
    const x = Math.round(toX(at, width)) + 0.5;
    context.strokeStyle = colours.line;
    context.beginPath(); context.moveTo(x, AXIS - 6); context.lineTo(x, height); context.stroke();
    context.fillStyle = colours.faint;
    if (x > GUTTER + 24) context.fillText(time(at), x, 10);
  }
}

function drawStepEnds(context, width, height) {
  const list = steps.get(group) || [];
  if (list.length < 2) return;
  const shown = list.filter((step) => step.to >= view.from && step.from <= view.to);
  if (!shown.length || (width - GUTTER) / shown.length < 34) return;
  context.save();
  context.setLineDash([2, 3]);
  context.strokeStyle = colours.faint;
  context.globalAlpha = 0.55;
  for (const step of shown) {
    const x = Math.round(toX(step.to, width)) + 0.5;
    if (x > GUTTER) { context.beginPath(); context.moveTo(x, AXIS); context.lineTo(x, height); context.stroke(); }
  }
  context.restore();
}

function drawSpans(context, place, width) {
  const { row, top, height } = place;
  const spans = row.spans, focus = marked || hovered;
  const scale = (width - GUTTER) / (view.to - view.from);
  let edge = -1, edgeTask = -1;
  for (let i = firstVisible(row, view.from); i < row.count; i++) {
    const at = i * SPAN, start = spans[at];
    if (start > view.to) break;
    const [name, task] = data.stages[spans[at + 2]];
    if (hidden.has(task)) continue;
    const x = Math.max(GUTTER, GUTTER + (start - view.from) * scale);
    const end = Math.min(width, GUTTER + (start + spans[at + 1] - view.from) * scale);
    if (end < GUTTER || spans[at + 1] === 0) continue;
    if (end <= edge && task === edgeTask) continue;      // below a pixel, and drawn already
    const wide = Math.max(end - x, 1);
    const other = focus && (spans[at + 3] !== focus.step || row.group !== focus.group);
    context.globalAlpha = (task === PAUSE ? 0.55 : 1) * (other ? 0.28 : 1);
    context.fillStyle = colours.tasks[task];
    const inset = task === PAUSE ? height / 2 - 2 : 2;
    if (wide > 5 && task !== PAUSE) { context.beginPath(); context.roundRect(x, top + inset, wide, height - 2 * inset, 3); context.fill(); }
    else context.fillRect(x, top + inset, wide, height - 2 * inset);
    edge = x + wide; edgeTask = task;
    if (wide > 46 && task !== PAUSE) {
      const text = spans[at + 3] >= 0 ? `${name} ${spans[at + 3]}` : name;
      context.fillStyle = other ? colours.ink : colours.on;
      context.textAlign = "left";
      if (context.measureText(text).width < wide - 10) context.fillText(text, x + 6, top + height / 2 + 0.5);
      else if (context.measureText(name).width < wide - 10) context.fillText(name, x + 6, top + height / 2 + 0.5);
    }
  }
  context.globalAlpha = 1;
}

function drawIdle(context, place, width) {
  const { row, top, height } = place;
  for (let i = 0; i < row.idle.length; i += GAP) {
    const start = row.idle[i], length = row.idle[i + 1];
    if (start + length < view.from || start > view.to) continue;
    const x = Math.max(GUTTER, toX(start, width)), end = Math.min(width, toX(start + length, width)), wide = Math.max(end - x, 1.5);
    context.fillStyle = colours.idle;
    context.globalAlpha = 0.16;
    context.fillRect(x, top + 2, wide, height - 4);
    context.globalAlpha = 1;
    context.fillRect(x, top + height - 3, wide, 3);
    const text = wide > 92 ? `idle ${time(length)}` : time(length);
    context.textAlign = "center";
    if (wide > context.measureText(text).width + 8) context.fillText(text, x + wide / 2, top + height / 2 - 1);
  }
}

function draw() {
  const [context, width, height] = fit(timeline);
  for (const place of layout) if (place.row) {
    context.fillStyle = colours.row;
    context.fillRect(GUTTER, place.top, width - GUTTER, place.height);
  }
  drawAxis(context, width, height);
  for (const place of layout) if (place.row) {
    drawSpans(context, place, width);
    if (place.row.device) drawIdle(context, place, width);
  }
  drawStepEnds(context, width, height);
  context.fillStyle = colours.panel;
  context.fillRect(0, 0, GUTTER - 6, height);
  for (const place of layout) {
    context.textAlign = place.row ? "right" : "left";
    context.fillStyle = place.row ? (place.row.device ? colours.ink : colours.faint) : colours.ink;
    if (place.row) {
      const short = place.row.name.replace(/^g\d+\./, "") + (place.row.ended ? " †" : "");
      context.font = `${place.row.device ? "600 " : ""}11.5px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif`;
      context.fillText(short, GUTTER - 12, place.top + place.height / 2 + 0.5);
    } else {
      context.font = "600 11.5px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
      context.fillText(place.title, 16, place.top + HEAD / 2 + 1);
    }
  }
  drawOverview();
}

function drawOverview() {
  const [context, width, height] = fit(overview);
  const scale = (width - GUTTER) / data.length;
  const devices = rows.filter((row) => row.device);
  const each = Math.max(3, (height - 14) / Math.max(1, devices.length));
  devices.forEach((row, index) => {
    const top = 7 + index * each, tall = Math.max(2, each - 2);
    for (let i = 0; i < row.spans.length; i += SPAN) {
      const task = data.stages[row.spans[i + 2]][1];
      if (!row.spans[i + 1]) continue;
      context.fillStyle = colours.tasks[task];
      context.fillRect(GUTTER + row.spans[i] * scale, top, Math.max(row.spans[i + 1] * scale, 0.5), tall);
    }
    context.fillStyle = colours.idle;
    for (let i = 0; i < row.idle.length; i += GAP) {
      const wide = row.idle[i + 1] * scale;
      if (wide > 0.4) context.fillRect(GUTTER + row.idle[i] * scale, top, Math.max(wide, 1), tall);
    }
  });
  const left = GUTTER + view.from * scale, right = GUTTER + view.to * scale;
  context.fillStyle = colours.panel;
  context.globalAlpha = 0.66;
  context.fillRect(GUTTER, 0, left - GUTTER, height);
  context.fillRect(right, 0, width - right, height);
  context.globalAlpha = 1;
  context.strokeStyle = colours.ink;
  context.strokeRect(Math.round(left) + 0.5, 2.5, Math.max(2, Math.round(right - left) - 1), height - 5);
  context.fillStyle = colours.faint;
  context.textAlign = "right";
  context.fillText(time(view.to - view.from), GUTTER - 12, height / 2);
}

// ---------------------------------------------------------------- moving
let due = false;
function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; draw(); });
}
function look(from, to) {
  let length = Math.min(Math.max(to - from, MIN_VIEW), data.length);
  if (to - from < MIN_VIEW) from = (from + to - length) / 2;
  from = Math.min(Math.max(from, 0), data.length - length);
  view = { from, to: from + length };
  redraw();
}
function zoom(factor, at = (view.from + view.to) / 2) {
  look(at - (at - view.from) * factor, at + (view.to - at) * factor);
}
function pan(share) { const by = (view.to - view.from) * share; look(view.from + by, view.to + by); }
function showStep(step) {
  const margin = (step.to - step.from) * 0.6;
  marked = { group, step: step.step };
  look(step.from - margin, step.to + margin);
}
function nextStep(by) {
  const list = steps.get(group) || [];
  if (!list.length) return;
  const middle = (view.from + view.to) / 2;
  let index = marked && marked.group === group ? list.findIndex((step) => step.step === marked.step) : -1;
  if (index < 0) index = Math.max(0, list.findIndex((step) => step.to >= middle)) - by;
  showStep(list[Math.min(Math.max(index + by, 0), list.length - 1)]);
}
let gapsSeen = 0;
function nextIdle() {
  const row = rows.find((each) => each.device && each.group === group);
  if (!row || !row.gaps) return;
  const order = [...Array(row.gaps).keys()].sort((a, b) => row.idle[b * GAP + 1] - row.idle[a * GAP + 1]);
  const at = order[gapsSeen++ % order.length] * GAP, middle = row.idle[at] + row.idle[at + 1] / 2;
  const half = Math.max(row.idle[at + 1] * 2, 20000);
  marked = null;
  look(middle - half, middle + half);
}
const actions = {
  previous: () => nextStep(-1), next: () => nextStep(1), idle: nextIdle,
  in: () => zoom(0.6), out: () => zoom(1 / 0.6), all: () => { marked = null; look(0, data.length); },
};

function spanAt(event) {
  const box = timeline.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const place = layout.find((each) => each.row && y >= each.top && y < each.top + each.height);
  if (!place || x < GUTTER) return null;
  const { row } = place, at = toNs(x, box.width), near = ((view.to - view.from) / (box.width - GUTTER)) * 2;
  let best = null;
  for (let i = firstVisible(row, at - near); i < row.count && row.spans[i * SPAN] <= at + near; i++) {
    const [start, length, stage, step, count] = row.spans.slice(i * SPAN, i * SPAN + SPAN);
    if (start + length < at - near || hidden.has(data.stages[stage][1]) || !length) continue;
    if (!best || length <= best.length) best = { row, start, length, stage, step, count };
  }
  for (let i = 0; !best && i < row.idle.length; i += GAP)
    if (row.idle[i] <= at + near && row.idle[i] + row.idle[i + 1] >= at - near)
      best = { row, start: row.idle[i], length: row.idle[i + 1], stage: null, step: row.idle[i + 2] };
  return best;
}
function showTip(found, event) {
  const tip = byId("tip");
  tip.hidden = !found;
  if (!found) return;
  const [name, task] = found.stage === null ? ["idle", null] : data.stages[found.stage];
  const title = task === null ? `idle before step ${found.step}` : `${name}${found.step >= 0 ? ` · step ${found.step}` : ""}`;
  const facts = [["row", found.row.name], ["task", task === null ? "none" : data.tasks[task]], ["takes", time(found.length)], ["begins", time(found.start)]];
  if (found.count !== undefined && task !== PAUSE) facts.push(["count", found.count.toLocaleString("en")]);
  tip.textContent = "";
  const head = document.createElement("b"), list = document.createElement("dl");
  head.textContent = title;
  for (const [key, value] of facts) {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = key; text.textContent = value;
    list.append(term, text);
  }
  tip.append(head, list);
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 10) + "px";
  tip.style.top = Math.min(event.clientY + 16, innerHeight - box.height - 10) + "px";
}

let drag = null;
timeline.addEventListener("wheel", (event) => {
  event.preventDefault();
  const width = timeline.clientWidth;
  if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan((event.deltaX || event.deltaY) / 900);
  else zoom(Math.exp(Math.max(-240, Math.min(240, event.deltaY)) * 0.0022), toNs(Math.max(event.offsetX, GUTTER), width));
}, { passive: false });
timeline.addEventListener("pointerdown", (event) => {
  drag = { x: event.clientX, from: view.from, to: view.to, moved: false };
  timeline.setPointerCapture(event.pointerId);
  timeline.classList.add("drag");
});
timeline.addEventListener("pointermove", (event) => {
  if (drag) {
    const by = ((drag.x - event.clientX) / (timeline.clientWidth - GUTTER)) * (drag.to - drag.from);
    drag.moved = drag.moved || Math.abs(drag.x - event.clientX) > 3;
    if (drag.moved) look(drag.from + by, drag.to + by);
    byId("tip").hidden = true;
    return;
  }
  const found = spanAt(event);
  const before = hovered && `${hovered.group} ${hovered.step}`;
  hovered = found && found.step >= 0 && found.stage !== null ? { group: found.row.group, step: found.step } : null;
  if ((hovered && `${hovered.group} ${hovered.step}`) !== before) redraw();
  showTip(found, event);
});
timeline.addEventListener("pointerup", (event) => {
  if (drag && !drag.moved) {
    const found = spanAt(event), same = found && marked && found.step === marked.step && found.row.group === marked.group;
    marked = found && found.step >= 0 && !same ? { group: found.row.group, step: found.step } : null;
    redraw();
  }
  drag = null;
  timeline.classList.remove("drag");
});
timeline.addEventListener("pointerleave", () => { hovered = null; byId("tip").hidden = true; redraw(); });
timeline.addEventListener("dblclick", (event) => {
  const found = spanAt(event);
  const step = found && (steps.get(found.row.group) || []).find((each) => each.step === found.step);
  if (step) showStep(step);
});
let slide = false;
function slideTo(event) {
  const box = overview.getBoundingClientRect(), half = (view.to - view.from) / 2;
  const at = ((event.clientX - box.left - GUTTER) / (box.width - GUTTER)) * data.length;
  look(at - half, at + half);
}
overview.addEventListener("pointerdown", (event) => { slide = true; overview.setPointerCapture(event.pointerId); slideTo(event); });
overview.addEventListener("pointermove", (event) => { if (slide) slideTo(event); });
overview.addEventListener("pointerup", () => { slide = false; });
const KEYS = { ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2), "+": actions.in, "=": actions.in, "-": actions.out, 0: actions.all, Escape: () => { marked = null; redraw(); }, "[": actions.previous, "]": actions.next, i: actions.idle };
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});
byId("buttons").addEventListener("click", (event) => { const act = actions[event.target.dataset.do]; if (act) act(); });

// ---------------------------------------------------------------- beginning
function legend() {
  const order = [1, 2, 3, 4, 5, 0, 6];
  byId("legend").innerHTML = order.map((task) =>
    `<button type="button" data-task="${task}" class="${hidden.has(task) ? "off" : ""}"><i style="background:var(--t${task})"></i>${data.tasks[task]}</button>`).join("");
}
byId("legend").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const task = Number(button.dataset.task);
  if (!hidden.delete(task)) hidden.add(task);
  legend(); redraw();
});
function choose(number) {
  group = number; gapsSeen = 0;
  byId("groups").innerHTML = groups.length < 2 ? "" : groups.map((each) =>
    `<button type="button" data-group="${each}" aria-pressed="${each === group}">group ${each}</button>`).join("");
  summary(); redraw();
}
byId("groups").addEventListener("click", (event) => { if (event.target.dataset.group) choose(Number(event.target.dataset.group)); });
byId("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  readColours(); redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); redraw(); });
addEventListener("resize", redraw);

byId("about").textContent = `node ${data.node} · ${data.steps} steps in ${time(data.length)} · ${data.made}`;
document.title = `Albireo timeline · ${data.node}`;
readColours(); lay(); legend(); choose(group);
{
  // First a handful of steps from the middle, on which the overlap can be seen.
  const list = steps.get(group) || [], middle = list.length >> 1;
  if (list.length > 8) look(list[middle - 2].from, list[middle + 2].to);
  else look(0, data.length);
}
