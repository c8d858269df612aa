// The page: the release that answers, a search, and its neighbours in every mode side by side.
// Whatever comes from the service is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const FEW_FALSE_MATCHES = 30;
let release = null; // what GET /release says
let upload = null; // the file that was dropped, as bytes
let latest = 0; // number of the newest search: answers to older ones are dropped

function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content.filter((one) => one !== null && one !== undefined));
  return made;
}

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Refused(0, "The service cannot be reached.");
  }
  const body = response.status === 204 ? null : await response.json().catch(() => null);
  if (!response.ok) throw new Refused(response.status, body?.error ?? `The service answers ${response.status}.`);
  return body;
}

// ── the release ──

async function open() {
  try {
    release = await ask("/release");
  } catch (error) {
    if (error.status === 401) {
      $("entry").hidden = false;
      $("token").focus();
    } else {
      $("inside").hidden = false;
      say(error.message, true);
    }
    return;
  }
  $("entry").hidden = true;
  $("inside").hidden = false;
  showRelease();
  const asked = new URLSearchParams(location.search);
  for (const name of ["id", "k", "fmr", "pose", "expand", "where"]) if (asked.has(name)) $(name).value = asked.get(name);
  $("unique").checked = asked.has("unique");
  if ($("id").value) await search();
}

function showRelease() {
  $("release").textContent = release.release;
  $("made").textContent = `${new Date(release.created).toLocaleString(undefined, { dateStyle: "long", timeStyle: "short" })} · ${release.modes[0].rows.toLocaleString()} rows`;
  $("verdict").className = release.promoted ? "yes" : "no";
  $("verdict").querySelector(".badge").textContent = release.promoted ? "✓" : "✕";
  $("word").textContent = release.promoted ? "Promoted" : "Rejected";
  $("reason").textContent = release.reason;
  const links = $("links");
  links.replaceChildren();
  if (release.report) {
    const link = element("a", "", "Report of this release");
    link.href = release.report;
    links.append(link);
  }
  showTable(release.table);
  const rates = Object.keys(Object.assign({}, ...release.modes.map((mode) => mode.thresholds)));
  const chosen = $("fmr").value;
  $("fmr").replaceChildren(new Option("none", ""), ...rates.map((rate) => new Option(rate, rate)));
  $("fmr").value = rates.includes(chosen) ? chosen : rates.includes("1e-3") ? "1e-3" : rates.at(-1) ?? "";
  $("pose-field").hidden = !release.columns.includes("pose");
}

function showTable(table) {
  const figures = $("figures");
  figures.replaceChildren();
  $("rates").hidden = !table;
  if (!table) return;
  const whom = table.population === "held_out" ? "held-out subjects" : "all labelled subjects";
  for (const group of table.groups) {
    const heads = element("tr", "", ...["mode", ...table.heads].map((text) => column(text)));
    const rows = group.modes.map((mode) => {
      const name = element("th", "", mark(mode), mode.mode);
      name.scope = "row";
      return element("tr", "", name, ...mode.cells.map(figure));
    });
    const title = element("h3", "", group.title);
    const made = element("table", "", element("caption", "unseen", `Error rates in percent, ${group.title}`), element("thead", "", heads), element("tbody", "", ...rows));
    figures.append(element("div", "", title, element("p", "sizes", `${table.subjects.toLocaleString()} ${whom}; ${group.sizes}`), made));
  }
}

function column(text) {
  const made = element("th", "", text === "mode" ? text : `${text}, %`);
  made.scope = "col";
  return made;
}

function figure(cell) {
  const made = element("td", "", element("span", "value", cell.value));
  if (cell.reason) made.title = cell.reason;
  if (cell.difference) made.append(" ", element("span", cell.verdict, `${cell.difference} ${cell.verdict}`));
  if (cell.between) made.append(element("span", "between", cell.between));
  return made;
}

function mark(mode) {
  const made = element("span", `mark t-${mode.role}`, mode.mark);
  made.setAttribute("aria-hidden", "true");
  return made;
}

// ── searching ──

function condition() {
  const parts = [];
  if ($("pose").value && !$("pose-field").hidden) parts.push(`pose = '${$("pose").value}'`);
  if ($("where").value.trim()) parts.push($("where").value.trim());
  return parts.length > 1 ? `${parts[0]} and (${parts[1]})` : parts[0] ?? null;
}

function options() {
  const asked = { mode: "all", k: Number($("k").value) || 10, columns: ["pose", "yaw"].filter((one) => release.columns.includes(one)) };
  if ($("fmr").value) asked.fmr = $("fmr").value;
  if ($("expand").value) asked.expand = Number($("expand").value);
  if ($("unique").checked) asked.unique_subject = true;
  const where = condition();
  if (where) asked.where = where;
  return asked;
}

function remember() {
  const kept = new URLSearchParams();
  for (const name of ["id", "k", "fmr", "pose", "expand", "where"]) if ($(name).value) kept.set(name, $(name).value);
  if ($("unique").checked) kept.set("unique", "1");
  history.replaceState(null, "", upload ? location.pathname : `?${kept}`);
}

async function search() {
  const id = $("id").value;
  if (!upload && !id) return;
  const number = ++latest;
  document.body.classList.add("busy");
  say("Searching …");
  try {
    let found;
    if (upload) {
      const asked = new URLSearchParams();
      for (const [name, value] of Object.entries(options())) for (const one of [value].flat()) asked.append(name, one);
      found = await ask(`/search/npy?${asked}`, { method: "POST", body: upload.content, headers: { "content-type": "application/octet-stream" } });
    } else {
      found = await ask("/search", { method: "POST", body: JSON.stringify({ ...options(), ids: [id] }), headers: { "content-type": "application/json" } });
    }
    if (number !== latest) return;
    remember();
    if (found.release !== release.release) {
      release = await ask("/release");
      showRelease();
    }
    show(found);
  } catch (error) {
    if (number !== latest) return;
    if (error.status === 401) location.reload();
    $("answer").hidden = true;
    say(error.message, true);
  } finally {
    if (number === latest) document.body.classList.remove("busy");
  }
}

function show(found) {
  const first = Object.values(found.answers)[0];
  const count = first.results.length;
  $("which").hidden = count < 2;
  $("row").replaceChildren(...(count > 1 ? first.results.map((one, at) => new Option(String(one.query), String(at))) : []));
  $("row").onchange = () => showQuery(found, Number($("row").value));
  $("answer").hidden = false;
  showQuery(found, 0);
}

function showQuery(found, at) {
  const answers = Object.values(found.answers);
  const query = answers[0].results[at];
  const title = $("answer-title");
  title.replaceChildren("Nearest to ", element("span", "code", upload ? `${upload.name}, row ${query.query}` : String(query.query)));
  const key = $("key");
  key.replaceChildren();
  if (query.subject !== null) key.append("Subject ", element("b", "", query.subject), ". ");
  const fmr = answers[0].fmr;
  if (fmr) key.append(`The line is the threshold for FMR ${fmr}: among ${answers[0].compared.toLocaleString()} rows expect up to ${plain(answers[0].compared * Number(fmr))} strangers above it. `);
  if (answers[0].fmr_unknown) key.append(`${answers[0].fmr_unknown}. `);
  if (answers[0].expand) key.append(`Ordered by the query expanded with ${answers[0].expand} rows. `);
  $("modes").replaceChildren(...answers.map((answer) => column_of(answer, at)));
  const firsts = answers.map((answer) => `${answer.mode}: ${inWords(answer, at)}`);
  say(`${found.release}. ${firsts.join(" ")}`);
  $("status").classList.add("unseen");
}

function inWords(answer, at) {
  const { subject, neighbours } = answer.results[at];
  const matches = neighbours.filter((one) => one.match).length;
  const above = answer.threshold === null ? "" : ` ${matches} of ${neighbours.length} reach the threshold.`;
  if (subject === null) return `${neighbours.length} neighbours.${above}`;
  const own = neighbours.find((one) => one.subject === subject);
  return (own ? `own subject first at rank ${own.rank}.` : `own subject not among ${neighbours.length}.`) + above;
}

function column_of(answer, at) {
  const mode = release.modes.find((one) => one.mode === answer.mode) ?? { mode: answer.mode, role: "raw", mark: "◆" };
  const { subject, neighbours } = answer.results[at];
  const title = element("h3", "", mark(mode), mode.mode);
  const list = element("ol", `t-${mode.role}`, ...neighbours.map((one) => hit(one, subject, answer)));
  const made = element("section", `mode b-${mode.role}`, title, sum(answer, at), list);
  title.id = `mode-${answer.mode}`;
  made.setAttribute("aria-labelledby", title.id);
  if (!neighbours.length) made.append(element("p", "none", "No row passes."));
  return made;
}

function sum(answer, at) {
  const { subject, neighbours } = answer.results[at];
  const made = element("p", "sum");
  if (subject !== null) {
    const own = neighbours.find((one) => one.subject === subject);
    made.append(own ? "own subject at rank " : "own subject not found", own ? element("b", "", String(own.rank)) : "");
  }
  if (answer.threshold !== null) {
    const strangers = neighbours.filter((one) => one.match && subject !== null && one.subject !== null && one.subject !== subject).length;
    made.append(subject === null ? "" : " · ", `${neighbours.filter((one) => one.match).length} above ${answer.threshold.toFixed(3)}`);
    if (strangers) made.append(", ", element("span", "worse", `${strangers} ${strangers === 1 ? "stranger" : "strangers"}`));
  }
  return made;
}

function hit(one, subject, answer) {
  const known = subject !== null && one.subject !== null;
  const kind = !known ? "unknown" : one.subject === subject ? "same" : "other";
  const said = { same: "✓ same subject", other: "✕ other subject", unknown: one.subject === null ? "subject unknown" : one.subject }[kind];
  const jump = element("button", "code", String(one.id));
  jump.type = "button";
  jump.title = "Search for this row";
  jump.addEventListener("click", () => searchFor(String(one.id)));
  const bar = element("div", "bar", element("div", "fill"));
  bar.firstChild.style.width = `${100 * Math.min(1, Math.max(0, one.score))}%`;
  if (answer.threshold !== null) {
    const line = element("div", "line");
    line.style.left = `${100 * Math.min(1, Math.max(0, answer.threshold))}%`;
    bar.append(line);
  }
  bar.setAttribute("aria-hidden", "true");
  const facts = element("div", "facts", element("span", "who", said));
  if (one.fmr !== null) facts.append(element("span", "", `FMR ${rate(one.fmr, answer.impostor_pairs)}`));
  if (one.expanded !== null) facts.append(element("span", "", `expanded ${one.expanded.toFixed(3)}`));
  if (one.columns.pose !== null && one.columns.pose !== undefined) facts.append(element("span", "", String(one.columns.pose)));
  if (typeof one.columns.yaw === "number") facts.append(element("span", "", `yaw ${Math.round(one.columns.yaw)}°`.replace("-", "−")));
  if (answer.threshold !== null) facts.append(element("span", "unseen", one.match ? "above the threshold" : "below the threshold"));
  const made = element("li", `hit ${kind}${one.match ? " match" : ""}`);
  made.append(element("span", "rank", String(one.rank)), element("span", "", jump), element("span", "score", one.score.toFixed(4).replace("-", "−")), bar, facts);
  return made;
}

function searchFor(id) {
  $("id").value = id;
  forget();
  search().then(() => $("answer-title").focus());
}

const plain = (number) => (number >= 10 ? Math.round(number).toLocaleString() : String(Number(number.toPrecision(2))));

function rate(fmr, pairs) {
  if (!fmr) return `< ${(1 / pairs).toExponential(1)}`;
  const text = fmr < 0.1 ? fmr.toExponential(1) : fmr.toFixed(2);
  return fmr * pairs < FEW_FALSE_MATCHES ? `${text} (few)` : text;
}

function say(text, isProblem = false) {
  $("status").className = isProblem ? "problem" : "";
  $("status").textContent = text;
}

// ── the form ──

function forget() {
  upload = null;
  $("file").value = "";
  $("dropped").textContent = "Drop a .npy file, or choose one";
}

async function take(file) {
  if (!file) return;
  if (file.size > release.limits.body) {
    say(`${file.name} is larger than ${release.limits.body.toLocaleString()} bytes.`, true);
    return;
  }
  upload = { name: file.name, content: await file.arrayBuffer() };
  $("dropped").textContent = `${file.name} (${file.size.toLocaleString()} bytes)`;
  $("id").value = "";
  await search();
}

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("id").value) forget();
  search();
});
for (const name of ["fmr", "k", "pose", "expand", "unique", "where"]) $(name).addEventListener("change", () => search());
$("file").addEventListener("change", () => take($("file").files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
$("entry").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await ask("/session", { method: "POST", body: JSON.stringify({ token: $("token").value }), headers: { "content-type": "application/json" } });
    $("token").value = "";
    $("entry-problem").textContent = "";
    await open();
  } catch (error) {
    $("entry-problem").textContent = error.message;
  }
});
if (matchMedia("(max-width: 44rem)").matches) $("rates").open = false; // the search comes first on a phone
open();
