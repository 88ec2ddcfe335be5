// What both halves of the page share: elements, the API key, the theme, the two views.
// page_node.js draws what GET /top says, page_chat.js talks with the model.

const byId = (id) => document.getElementById(id);

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// Text of an element, written only when it is another: a selection in it survives.
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// ---------------------------------------------------------------- storage that may be forbidden
function stored(storage, name, value) {
  try {
    const found = window[storage].getItem(name);
    if (value !== undefined) window[storage].setItem(name, value);
    return found;
  } catch { return null; }
}

// ---------------------------------------------------------------- API key
let key = stored("sessionStorage", "key") || "";
let wantsKey = true;           // until somebody has said "not now"
let keyGiven = () => {};       // called when there is a new one

// Like fetch(), with the key; a missing or wrong one opens the dialog.
async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (answer.status === 401) {
    byId("key").hidden = false;
    if (wantsKey) askForKey(key ? "The node does not know this key." : "");
  }
  return answer;
}

function askForKey(why) {
  const dialog = byId("keydialog");
  say(byId("keyerror"), why);
  if (!dialog.open) { byId("keyfield").value = ""; dialog.showModal(); }
}

byId("keydialog").addEventListener("close", () => {
  const given = byId("keyfield").value.trim();
  byId("keyfield").value = "";
  wantsKey = byId("keydialog").returnValue === "use" && given !== "";
  if (!wantsKey) return;
  key = given;
  stored("sessionStorage", "key", key);
  keyGiven();
});
// Enter uses the key, although "not now" is the form's first button.
byId("keyfield").addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.preventDefault(); byId("keydialog").close("use"); }
});
byId("key").addEventListener("click", () => { wantsKey = true; askForKey(""); });

// ---------------------------------------------------------------- theme and view
const root = document.documentElement;
const theme = stored("localStorage", "theme");
if (theme) root.dataset.theme = theme;
byId("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  stored("localStorage", "theme", root.dataset.theme);
});

byId("views").addEventListener("click", (event) => {
  const view = event.target.dataset.view;
  if (view) document.body.dataset.view = view;
});
if (location.hash === "#chat") document.body.dataset.view = "chat";
