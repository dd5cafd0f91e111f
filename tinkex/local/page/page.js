// The page of a tinkex server: asks for the server's state once a second while the page is visible,
// and shows what has changed.  Everything from the server is inserted as text, never as markup.
import { Chart, Curve, short, spark } from "./chart.js";
import { TokenText, meanLogprob, percent } from "./tokens.js";
import { setUpPrompt } from "./prompt.js";

const POLL_MS = 1000;
const LONGEST_WAIT_MS = 15000;
const TIMEOUT_MS = 10000;
const KEY = "tinkex-key";
const FEW = 6; // rows shown of a list that is not unfolded
const COLOURS = 8;

const $ = (id) => document.getElementById(id);
const state = {
  cursor: "", paused: false, failures: 0, timer: 0, asking: null, offset: 0, retryAt: 0,
  tables: null, heartbeats: {}, queue: null, ttl: 60, server: null,
  progress: new Map(), // run id -> steps, tokens, loss, at
  curves: new Map(), // run id -> Curve
  samples: [], unfolded: new Set(), sessionStates: null,
};

/* ---- The server ---- */

/** Fetches *path*, relative to the page, with the key; an Error about a response has its *status*. */
async function fetchApi(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { "X-API-Key": key } : {}) };
  const response = await fetch(path, { cache: "no-store", ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const error = new Error(body.detail || body.error?.message || `HTTP ${response.status}`);
  error.status = response.status;
  throw error;
}

async function poll() {
  clearTimeout(state.timer);
  if (state.paused || document.hidden || state.asking) return;
  state.asking = new AbortController();
  const timeout = setTimeout(() => state.asking?.abort(), TIMEOUT_MS);
  let news = null;
  try {
    const response = await fetchApi(`page/state?since=${encodeURIComponent(state.cursor)}`, { signal: state.asking.signal });
    news = await response.json();
    state.failures = 0;
    state.retryAt = 0;
  } catch (error) {
    if (error.status === 401) {
      state.asking = null;
      return askForKey(sessionStorage.getItem(KEY) ? "This is not the server's key." : "");
    }
    state.failures += 1;
    state.retryAt = Date.now() + Math.min(LONGEST_WAIT_MS, POLL_MS * 2 ** Math.min(state.failures, 4));
    state.problem = error.status ? error.message : "";
  } finally {
    clearTimeout(timeout);
    state.asking = null;
  }
  state.timer = setTimeout(poll, state.retryAt ? state.retryAt - Date.now() : POLL_MS);
  try {
    if (news) take(news); // not in the `try` above: a bug in it must not look like a lost connection
  } finally {
    showLink();
  }
}

function showLink() {
  const link = $("link");
  const [kind, text] = state.paused ? ["paused", "Paused"]
    : state.failures > 1 ? ["lost", state.problem || "The server cannot be reached. Trying again"]
    : state.cursor ? ["live", "Live"] : ["connecting", "Connecting"];
  if (link.dataset.state !== kind) link.dataset.state = kind;
  setText($("link-text"), text);
}

/* ---- The key ---- */

function askForKey(problem) {
  state.cursor = "";
  $("main").hidden = true;
  $("forget").hidden = true;
  $("pause").hidden = true;
  $("link").hidden = true;
  $("footer").hidden = true;
  $("gate").hidden = false;
  $("gate-error").textContent = problem;
  sessionStorage.removeItem(KEY);
  $("key").value = "";
  $("key").focus();
}

function begin() {
  $("gate").hidden = true;
  $("main").hidden = $("footer").hidden = false;
  $("pause").hidden = false;
  $("link").hidden = false;
  $("forget").hidden = !sessionStorage.getItem(KEY);
  poll();
}

$("gate-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  try {
    await fetchApi("page/state");
    begin();
    $("main").focus();
  } catch (error) {
    askForKey(error.status === 401 ? "This is not the server's key." : error.status ? error.message : "The server does not respond.");
  }
});
$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

/* ---- New data ---- */

function take(news) {
  const fresh = news.fresh;
  if (fresh) {
    state.curves.forEach((curve) => { curve.steps.length = curve.losses.length = 0; curve.smoothing = -1; });
    state.progress.clear();
    for (const id of state.curves.keys()) if (!(id in news.curves)) state.curves.delete(id);
    state.samples = [];
    $("samples").replaceChildren(); // a new server numbers its samples from the start
  }
  state.cursor = news.cursor;
  state.offset = news.now - Date.now() / 1000;
  state.heartbeats = news.heartbeats;
  state.queue = news.queue;
  state.server = news.server;
  if (news.tables) state.tables = news.tables;
  // Sorted by id, so that the runs of a session get the same colours in every browser.
  const curves = Object.entries(news.curves).sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  for (const [id, run] of curves) {
    state.progress.delete(id); // moves the run to the end: the latest are last
    state.progress.set(id, run);
    if (!run.point_steps.length && !state.curves.has(id)) continue;
    const curve = curveOf(id);
    // Points are missing if the tab slept while the server was replaced: start over.
    if (!curve.put(run.start, run.point_steps, run.point_losses)) state.cursor = "";
    curve.stride = run.stride;
  }
  // Keep as many runs as the server does: a tab may be open for weeks.
  for (const id of [...state.progress.keys()].slice(0, -state.server.most_runs)) {
    state.progress.delete(id);
    state.curves.delete(id);
  }
  chart.curves = [...state.curves.values()];
  if (news.samples.length) {
    state.samples = [...news.samples.reverse(), ...state.samples].slice(0, state.server.most_samples);
    state.newSamples = true;
  }
  announce();
  showServer();
  showFigures(news.tokens);
  showRuns(Object.keys(news.curves).length > 0 || fresh);
  showSessions();
  showCheckpoints();
  showSamples();
  showTimes();
}

function curveOf(id) {
  let curve = state.curves.get(id);
  if (!curve) {
    curve = new Curve(nameOf(id), `--s${state.curves.size % COLOURS}`);
    // Only the latest few are shown; more would hide each other.
    const shown = [...state.curves.values()].filter((one) => one.shown);
    if (shown.length >= COLOURS) shown[0].shown = false;
    state.curves.set(id, curve);
  }
  return curve;
}

function nameOf(id) {
  return state.tables.runs.find((run) => run.id === id)?.name || shortId(id);
}

/** Announces to screen readers which sessions began or ended. */
function announce() {
  const states = new Map(state.tables.sessions.map((session) => [session.id, lifeOf(session)[0]]));
  if (state.sessionStates) {
    for (const [id, life] of states) {
      const before = state.sessionStates.get(id);
      if (before !== life && life !== "late") setText($("news"), `Session ${shortId(id)} ${before ? `is ${life}` : "has begun"}.`);
    }
  }
  state.sessionStates = states;
}

/* ---- Elements and texts ---- */

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

/** Makes *parent* show *items* in order, each in its own element, which is kept as long as its item. */
function keyed(parent, items, keyOf, create, update) {
  const known = new Map([...parent.children].map((element) => [element.dataset.key, element]));
  let next = parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    let element = known.get(key);
    if (!element) {
      element = create(item);
      element.dataset.key = key;
    }
    known.delete(key);
    if (element === next) next = next.nextSibling;
    else parent.insertBefore(element, next);
    update?.(element, item);
  }
  known.forEach((element) => element.remove());
}

/** Returns the rows to show of a list that can be unfolded, and updates the button for that. */
function few(name, items, count = FEW) {
  const button = $(`more-${name}`);
  const unfolded = state.unfolded.has(name);
  button.hidden = items.length <= count;
  setText(button, unfolded ? "Show fewer" : `Show all ${items.length}`);
  button.setAttribute("aria-expanded", String(unfolded));
  return unfolded ? items : items.slice(0, count);
}

const integer = new Intl.NumberFormat("en");
const compact = (value) => (value < 10000 ? integer.format(Math.round(value)) : value < 1e6 ? `${(value / 1e3).toFixed(value < 1e5 ? 1 : 0)}k` : value < 1e9 ? `${(value / 1e6).toFixed(value < 1e8 ? 1 : 0)}M` : `${(value / 1e9).toFixed(1)}B`);
const now = () => Date.now() / 1000 + state.offset;

function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  for (; size >= 1000 && place < units.length - 1; place++) size /= 1000;
  return `${size >= 100 || place === 0 ? Math.round(size) : size.toFixed(1)} ${units[place]}`;
}

function span(seconds) {
  const s = Math.max(0, seconds);
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d`;
}

/** Returns an element that shows how long ago *at* was; showTimes keeps it up to date. */
function ago(at, before = "", after = " ago") {
  const element = document.createElement("time");
  Object.assign(element.dataset, { at: String(at), before, after });
  element.dateTime = new Date(at * 1000).toISOString();
  element.title = new Date(at * 1000).toLocaleString("en-GB");
  return element;
}

function showTimes() {
  for (const time of document.querySelectorAll("time[data-at]")) {
    const { at, before, after } = time.dataset;
    setText(time, `${before}${span(now() - Number(at))}${after}`);
  }
}

/** The short form of an id: eight characters of a UUID, and the number of a run in its session. */
function shortId(id) {
  const [session, , number] = id.split(":");
  return number === undefined ? session.slice(0, 8) : `${session.slice(0, 8)}:${number}`;
}

function modelName(model) {
  return model.replace(/^tinker:\/\/([^/]*)\/(?:[^/]*\/)?/, (_, run) => `${shortId(run)}/`).replace(/^([0-9a-f]{8})[0-9a-f-]{28}:train:/, "$1:");
}

/* ---- The parts of the page ---- */

function showServer() {
  const { server } = state;
  setText($("model"), server.model);
  setText($("version"), `tinkex ${server.version}`);
  setText($("uptime"), `up ${span(now() - server.started_at)}`);
  state.ttl = server.session_ttl_s;
  prompt.update(server, state.tables.checkpoints);
}

/** The mean of the last ten seconds, since work counts only once it is done. */
const rate = (counts) => counts.slice(-10).reduce((sum, count) => sum + count, 0) / 10;

function showFigures(tokens) {
  for (const kind of ["trained", "sampled"]) {
    setText($(`rate-${kind}`), compact(rate(tokens[kind])));
    setText($(`total-${kind}`), `${compact(tokens[`total_${kind}`])} in total`);
    const smooth = tokens[kind].map((_, i, all) => {
      const near = all.slice(Math.max(0, i - 2), i + 3);
      return near.reduce((a, b) => a + b, 0) / near.length;
    });
    spark($(`spark-${kind}`), smooth);
  }
  const { runs, samples, sampling } = state.queue;
  const passes = Object.values(runs).reduce((sum, count) => sum + count, 0);
  setText($("queue"), compact(passes + samples));
  const parts = [[passes, "to train"], [samples, "to sample"], [sampling, "being sampled"]].filter(([count]) => count);
  setText($("queue-detail"), parts.map(([count, what]) => `${compact(count)} ${what}`).join(" · ") || "nothing to do");
  const live = Object.keys(state.heartbeats).length;
  setText($("live"), compact(live));
  const loaded = Object.keys(runs).length;
  setText($("live-detail"), `${loaded} ${loaded === 1 ? "run" : "runs"} loaded`);
}

function showRuns(changed) {
  const known = new Set(state.tables.runs.map((run) => run.id));
  const others = [...state.progress.keys()].filter((id) => !known.has(id));
  const runs = [...state.tables.runs, ...others.map((id) => ({ id, base_model: "", rank: null, name: null }))];
  $("runs").closest(".scroll").hidden = !runs.length;
  keyed($("runs"), runs, (run) => run.id, makeRun, updateRun);
  const any = chart.curves.some((curve) => curve.steps.length);
  $("no-curves").hidden = any;
  $("loss").classList.toggle("none-yet", !any);
  $("chart").tabIndex = any ? 0 : -1;
  if (changed) {
    chart.redraw();
    showValues();
    const shown = chart.visible();
    $("chart").setAttribute("aria-label", `Loss curves of ${shown.length} ${shown.length === 1 ? "run" : "runs"}: ${shown.map((curve) => `${curve.name} at ${short(curve.losses[curve.losses.length - 1])}`).join(", ")}`);
  }
}

function makeRun(run) {
  const row = make("tr");
  const label = make("label");
  const box = make("input");
  box.type = "checkbox";
  box.addEventListener("change", () => {
    curveOf(run.id).shown = box.checked;
    chart.redraw();
    showValues();
  });
  label.append(box, make("span", "id", shortId(run.id)));
  if (run.name) label.append(make("span", "", run.name));
  label.title = run.id;
  const cells = ["", "wide", "num", "num", "num wide", ""].map((name) => make("td", name));
  cells[0].append(label);
  cells[1].textContent = run.base_model ? `${run.base_model}, rank ${run.rank}` : "";
  cells[5].append(make("span", "badge"), make("span", "muted wide"));
  row.append(...cells);
  return row;
}

function updateRun(row, run) {
  const progress = state.progress.get(run.id);
  const curve = state.curves.get(run.id);
  const box = row.querySelector("input");
  box.disabled = !curve;
  if (curve) {
    if (box.checked !== curve.shown) box.checked = curve.shown;
    box.parentElement.className = curve.colour.slice(2);
  }
  setText(row.cells[2], progress ? integer.format(progress.steps) : "–");
  setText(row.cells[3], progress ? short(progress.loss) : "–");
  setText(row.cells[4], progress ? compact(progress.tokens) : "–");
  const waiting = state.queue.runs[run.id];
  const idle = progress ? now() - progress.at : Infinity;
  const [kind, text] = waiting === undefined ? ["", "not loaded"]
    : waiting > 0 || idle < 5 ? ["good", "training"]
    : ["", progress ? `idle ${span(idle)}` : "loaded"];
  const [badge, queued] = row.cells[5].children;
  setText(queued, waiting ? `, ${compact(waiting)} queued` : "");
  badge.className = `badge ${kind}`;
  setText(badge, text);
}

function showValues() {
  if (!$("values").open) return;
  const curves = chart.visible();
  const head = make("tr");
  head.append(make("th", "", "Step"), ...curves.map((curve) => make("th", "num", curve.name)));
  for (const cell of head.children) cell.scope = "col";
  $("values-head").replaceChildren(head);
  // Some twenty steps of each curve, over its whole range.
  const steps = [...new Set(curves.flatMap((curve) => {
    const count = curve.steps.length, by = Math.max(1, Math.floor(count / 20));
    return curve.steps.filter((_, i) => (count - 1 - i) % by === 0);
  }))].sort((a, b) => b - a).slice(0, 60);
  $("values-body").replaceChildren(...steps.map((step) => {
    const row = make("tr");
    row.append(make("td", "", integer.format(step)), ...curves.map((curve) => {
      const index = curve.near(step);
      return make("td", "num", curve.steps[index] === step ? short(curve.losses[index]) : "");
    }));
    return row;
  }));
}

/** The state of a session in one word, and the class of its badge. */
function lifeOf(session) {
  const age = state.heartbeats[session.id];
  if (age !== undefined) return age > state.ttl / 2 ? ["late", "warn"] : ["live", "good"];
  if (session.state === "finished") return ["ended", ""];
  return [session.state === "lost" ? "lost" : "expired", "bad"];
}

function showSessions() {
  const rank = (session) => (state.heartbeats[session.id] === undefined ? 1 : 0);
  const sessions = [...state.tables.sessions].sort((a, b) => rank(a) - rank(b) || b.created_at - a.created_at);
  $("no-sessions").hidden = sessions.length > 0;
  keyed($("sessions"), few("sessions", sessions, 4), (session) => session.id, makeSession, updateSession);
}

function makeSession(session) {
  const item = make("li");
  const name = make("span", "name", session.name || shortId(session.id));
  name.title = session.id;
  item.append(name, make("span", "badge"), make("span", "sub"), make("span", "side-note"));
  return item;
}

function updateSession(item, session) {
  const [life, kind] = lifeOf(session);
  item.className = kind === "good" || kind === "warn" ? "" : "over";
  const [, badge, sub, note] = item.children;
  badge.className = `badge ${kind}`;
  setText(badge, life);
  const age = state.heartbeats[session.id];
  setText(note, age === undefined ? "" : `heartbeat ${span(age)} ago`);
  const over = age === undefined;
  const shown = `${life}/${session.ended_at}`;
  if (sub.dataset.shown === shown) return;
  sub.dataset.shown = shown;
  if (over) sub.replaceChildren(session.ended_at ? ago(session.ended_at) : "", session.reason ? `, ${session.reason}` : "no heartbeat");
  else sub.replaceChildren(session.client ? `SDK ${session.client}, open for ` : "open for ", ago(session.created_at, "", ""));
}

function showCheckpoints() {
  const { checkpoints, checkpoints_count: count } = state.tables;
  const size = checkpoints.reduce((sum, checkpoint) => sum + checkpoint.size_bytes, 0);
  setText($("checkpoints-total"), count ? `${integer.format(count)} · ${count > checkpoints.length ? `latest ${checkpoints.length}: ` : ""}${bytes(size)}` : "");
  $("no-checkpoints").hidden = count > 0;
  keyed($("checkpoints"), few("checkpoints", checkpoints), (checkpoint) => `${checkpoint.path} ${checkpoint.created_at}`, makeCheckpoint);
}

const KINDS = { weights: "to train on", sampler_weights: "to sample", external_weights: "exported" };

function makeCheckpoint(checkpoint) {
  const item = make("li");
  const name = make("span", "name", `${shortId(checkpoint.run_id)}/${checkpoint.name}`);
  name.title = checkpoint.path;
  const sub = make("span", "sub", `${KINDS[checkpoint.kind] || checkpoint.kind}, ${bytes(checkpoint.size_bytes)}, `);
  sub.append(ago(checkpoint.created_at));
  if (checkpoint.expires_at) sub.append(`, expires ${new Date(checkpoint.expires_at * 1000).toLocaleString("en-GB")}`);
  if (checkpoint.public) sub.append(", public");
  item.append(name, sub);
  if (checkpoint.kind !== "external_weights") {
    const button = make("button", "small", "Try");
    button.type = "button";
    button.setAttribute("aria-label", `Try ${name.textContent}`);
    button.addEventListener("click", () => prompt.choose(checkpoint.path));
    item.append(button);
  }
  return item;
}

function showSamples(unfolded = false) {
  const list = $("samples");
  $("no-samples").hidden = state.samples.length > 0;
  if (!state.newSamples && !unfolded) return;
  // Text must not move while it is read: new samples wait while the list is pointed at, or has the focus.
  const held = list.matches(":hover") || list.contains(document.activeElement);
  if (held && !unfolded && list.children.length) return;
  state.newSamples = false;
  keyed(list, few("samples", state.samples, 4), (sample) => String(sample.id), makeSample);
}

function makeSample(sample) {
  const item = make("li");
  const about = make("div", "about");
  const name = make("span", "name", modelName(sample.model));
  name.title = sample.model;
  const mean = sample.logprobs && meanLogprob(sample.logprobs);
  about.append(name, ago(sample.at), make("span", "", `${integer.format(sample.prompt_length)} + ${integer.format(sample.length)} tokens`));
  if (mean !== null) about.append(make("span", "", `mean probability ${percent(mean)}`));
  if (sample.sequences > 1) about.append(make("span", "", `1 of ${sample.sequences}`));
  const text = make("div", "text");
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "Sample; the arrow keys move over its tokens");
  text.append(make("span", "prompt", (sample.prompt_is_cut ? "…" : "") + sample.prompt));
  const tokens = new TokenText(text);
  sample.tokens.forEach((token, i) => tokens.add(token, sample.logprobs?.[i] ?? null));
  if (sample.length > sample.tokens.length) text.append("…");
  item.append(about, text);
  return item;
}

/* ---- The chart ---- */

const chart = new Chart($("chart"), $("curves"), showReadout);

function showReadout(point) {
  const readout = $("readout");
  readout.hidden = !point || !point.rows.length;
  if (readout.hidden) return;
  const table = make("table");
  for (const { curve, loss, smooth } of point.rows) {
    const row = make("tr");
    const name = make("td");
    name.append(make("span", `swatch ${curve.colour.slice(2)}`), curve.name);
    row.append(name, make("td", "num", short(smooth)), make("td", "num muted", chart.smoothing > 0 ? short(loss) : ""));
    table.append(row);
  }
  const head = make("div", "muted", `step ${integer.format(Math.round(point.step))}`);
  const stride = Math.max(...point.rows.map(({ curve }) => curve.stride || 1));
  if (stride > 1) head.append(` (mean of ${stride})`);
  readout.replaceChildren(head, table);
  const left = point.x + 14 + readout.offsetWidth > point.area.x + point.area.width ? point.x - 14 - readout.offsetWidth : point.x + 14;
  readout.style.transform = `translateX(${Math.max(0, left)}px)`;
  if (chart.byKey) setText($("chart-live"), `Step ${point.step}: ${point.rows.map(({ curve, smooth }) => `${curve.name} ${short(smooth)}`).join(", ")}`);
}

$("smoothing").addEventListener("input", (event) => {
  chart.smoothing = Number(event.target.value);
  chart.redraw();
});
$("log").addEventListener("change", (event) => {
  chart.log = event.target.checked;
  chart.redraw();
});
$("values").addEventListener("toggle", showValues);

/* ---- The rest ---- */

for (const [name, show] of [["sessions", showSessions], ["checkpoints", showCheckpoints], ["samples", () => showSamples(true)]]) {
  $(`more-${name}`).addEventListener("click", () => {
    if (!state.unfolded.delete(name)) state.unfolded.add(name);
    show();
    showTimes();
  });
}
$("pause").addEventListener("click", () => {
  state.paused = !state.paused;
  $("pause").setAttribute("aria-pressed", String(state.paused));
  setText($("pause"), state.paused ? "Resume" : "Pause");
  showLink();
  poll();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !$("main").hidden) poll(); });
$("hint").textContent = `export TINKER_BASE_URL=${new URL(".", location.href).href.replace(/\/$/, "")}`;

const prompt = setUpPrompt(fetchApi, modelName);
if (document.documentElement.dataset.key === "needed" && !sessionStorage.getItem(KEY)) askForKey("");
else begin();
