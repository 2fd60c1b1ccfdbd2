"use strict";
document.documentElement.classList.add("scripted");
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const body = document.querySelector("tbody");
const rows = [...body.rows];
const numberOf = (part) => Number(part.dataset.row ?? part.dataset.shows);
const MINUS = "\u2212", MISSING = "\u2013";

// Paired differences, as flowkit.eval.intervals.paired: the jackknife of the differences chunk by chunk.
let baseline = data.baseline;

function difference(row, key) {
  const [one, other] = [data.figures[key].rows[row], data.figures[key].rows[baseline]];
  const pairs = data.pairs[row];
  if (!one || !other || !pairs || pairs !== data.pairs[baseline] || one[2].length !== other[2].length) return null;
  const left = one[2].map((value, k) => value - other[2][k]);
  const mean = left.reduce((sum, value) => sum + value, 0) / left.length;
  const squares = left.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  const se = Math.sqrt((left.length - 1) / left.length * squares);
  const value = one[0] - other[0], half = data.students[left.length] * se;
  const places = Math.min(8, se > 0 ? Math.max(0, 1 - Math.floor(Math.log10(se))) : 8, one[1] + 1);
  const [shown, low, high] = [value, value - half, value + half].map((number) => signed(number, places));
  const clear = low[0] === high[0] && (low[0] === "+" || low[0] === MINUS);
  const mark = clear ? ((low[0] === MINUS) === data.figures[key].lower ? "better" : "worse") : "";
  return { raw: [value, value - half, value + half], text: shown + (clear ? "*" : ""), interval: `(${low}, ${high})`, mark };
}

function signed(value, places) {
  const text = Math.abs(value).toFixed(places);
  return Number(text) === 0 ? text : (value > 0 ? "+" : MINUS) + text;
}

function compare(number) {
  baseline = number;
  all(".against").forEach((part) => { part.textContent = rows.find((r) => numberOf(r) === number + 1).querySelector(".name").textContent; });
  all("td.difference").forEach((cell) => {
    const row = numberOf(cell.parentElement) - 1;
    const found = difference(row, cell.dataset.of);
    const own = row === baseline;
    cell.className = `metric difference ${own || !found ? "" : found.mark}`;
    cell.dataset.key = own ? 0 : found ? found.raw[0] : "";
    const parts = [["value", own ? "baseline" : found ? found.text : MISSING]];
    if (found && !own) parts.push(["interval", found.interval]);
    cell.replaceChildren(...parts.flatMap(([name, text], i) => {
      const span = document.createElement("span");
      span.className = name;
      span.textContent = text;
      return i ? [" ", span] : [span];
    }));
  });
  write();
}
all("input[name=baseline]").forEach((input) => input.addEventListener("change", () => compare(Number(input.value))));

// Sorting: failed rows last, then missing values, whatever the direction.
const heads = all("th");
const figures = all("[data-shows]").filter((part) => part.matches("figure"));
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => row.cells[column].dataset.key, failed = (row) => row.classList.contains("failed");
  rows.sort((a, b) => failed(a) - failed(b) || (key(a) === "") - (key(b) === "")
    || (up ? 1 : -1) * (key(a) - key(b)) || numberOf(a) - numberOf(b));
  body.append(...rows);
  const place = new Map(rows.map((row, i) => [numberOf(row), i]));
  figures.sort((a, b) => place.get(numberOf(a)) - place.get(numberOf(b)));
  if (figures.length) figures[0].parentElement.append(...figures);
  write();
}));

// Filters.
const tools = document.querySelector(".tools");
const texts = new Map(rows.map((row) => [row, [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase()]));
const numbers = new Map(rows.map((row) => [row, new Set(texts.get(row).split(/[^\w.]+/))]));
// A number is looked for as a whole, a word in any part of a text.
const holds = (row, word) => /^[\d.]+$/.test(word) ? numbers.get(row).has(word) : texts.get(row).includes(word);

function filter() {
  const asked = tools.querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = all("select", tools).filter((select) => select.value);
  const fits = (row) => asked.every((word) => holds(row, word))
    && chosen.every((select) => (row.cells[select.dataset.column].dataset.key || "missing") === select.value);
  rows.forEach((row) => { row.hidden = !fits(row); });
  const shown = new Set(rows.filter((row) => !row.hidden).map(numberOf));
  all("[data-shows]").forEach((part) => { part.hidden = !shown.has(numberOf(part)); });
  all(".point").forEach((point) => point.classList.toggle("off", !shown.has(numberOf(point))));
  tools.querySelector("output").textContent = `${shown.size} of ${rows.length} rows`;
  rove();
  write();
}
if (tools) {
  tools.addEventListener("input", filter);
  tools.addEventListener("submit", (event) => event.preventDefault());
  // The event "reset" comes before the fields are empty, so the button's own click does both, in turn.
  const showAll = () => {
    tools.reset();
    filter();
  };
  tools.querySelector("button").addEventListener("click", showAll);
  // A link to a row that is filtered out shows all rows again.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link && document.getElementById(link.getAttribute("href").slice(1))?.hidden) showAll();
  });
}

// Export: lines made in Python, joined here; see flowkit/eval/tables.py.
const fold = document.querySelector(".export"), area = fold.querySelector("textarea");

function table(format) {
  const parts = data.exports[format], name = parts.names[baseline ?? 0];
  const tail = (row) => {
    const found = parts.keys.map((key) => difference(row, key));
    if (parts.raw) return found.length ? [found.map((d) => (d ? d.raw : ["", "", ""]).join(",")).join(","), name] : [];
    return found.map((d) => row === baseline ? "baseline"
      : [...(d ? `${d.text} ${d.interval}` : MISSING)].map((c) => parts.marks[c] ?? c).join(""));
  };
  const line = (cells) => cells.join(parts.separator) + parts.end;
  const shown = rows.filter((row) => !row.hidden).map((row) => numberOf(row) - 1);
  return parts.start + line([parts.head, ...parts.against.map((text) => text + name)]) + parts.rule
    + shown.map((row) => line([parts.rows[row], ...tail(row)])).join("") + parts.close;
}

const format = () => fold.querySelector("input:checked").value;
function write() {
  area.value = table(format());
}
write();
function say(text) {
  const output = fold.querySelector("output");
  output.textContent = text;
  setTimeout(() => { output.textContent = ""; }, 4000);
}
all("input", fold).forEach((input) => input.addEventListener("change", write));
fold.querySelector(".copy").addEventListener("click", () => {
  area.select();
  say(document.execCommand("copy") ? "Copied" : "Press Ctrl+C");
});
fold.querySelector(".download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([table(format())], { type: "text/plain" }));
  link.download = `table.${data.exports[format()].file}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

// Plots: a card beside the point, arrow keys from point to point, one stop of the tab key a plot.
const card = document.getElementById("card");
const element = (name, text, parent) => {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
};

function show(point) {
  const row = rows.find((r) => numberOf(r) === numberOf(point));
  card.replaceChildren();
  const picture = document.querySelector(`figure[data-row="${numberOf(point)}"] img`);
  if (picture) element("img", "", card).src = picture.src;
  element("strong", row.querySelector(".name").textContent, card).dir = "auto";
  const list = element("dl", "", card);
  [...row.cells].slice(1).filter((cell) => cell.dataset.key !== "").forEach((cell) => {
    element("dt", cell.dataset.label, list);
    element("dd", cell.textContent.trim(), list);
  });
  card.hidden = false;
  const at = point.querySelector("circle").getBoundingClientRect(), size = card.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left + at.width / 2 - size.width / 2, document.documentElement.clientWidth - size.width - 8));
  const above = at.top - size.height - 10;
  card.style.left = `${left + scrollX}px`;
  card.style.top = `${(above > 8 ? above : at.bottom + 10) + scrollY}px`;
}
const hide = () => { card.hidden = true; };
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

const plots = all(".charts svg").map((svg) => {
  const left = (point) => Number(point.querySelector("circle").getAttribute("cx"));
  return all(".point", svg).sort((a, b) => left(a) - left(b));
});
function rove() {
  plots.forEach((points) => {
    const visible = points.filter((point) => !point.classList.contains("off"));
    points.forEach((point) => point.setAttribute("tabindex", point === visible[0] ? 0 : -1));
  });
}
plots.forEach((points) => points.forEach((point) => {
  const title = point.querySelector("title");
  point.setAttribute("aria-label", title.textContent);
  title.remove();
  point.addEventListener("pointerenter", () => show(point));
  point.addEventListener("pointerleave", hide);
  point.addEventListener("focus", () => show(point));
  point.addEventListener("blur", hide);
  point.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const visible = points.filter((other) => !other.classList.contains("off"));
    const next = visible[visible.indexOf(point) + by];
    if (next) {
      visible.forEach((other) => other.setAttribute("tabindex", other === next ? 0 : -1));
      next.focus();
    }
  });
}));
rove();

const same = new Map();
all("[data-row]").forEach((part) => same.set(numberOf(part), [...(same.get(numberOf(part)) ?? []), part]));
all("[data-row]").forEach((part) => ["pointerenter", "pointerleave"].forEach((event) => part.addEventListener(event, () =>
  same.get(numberOf(part)).forEach((other) => other.classList.toggle("on", event === "pointerenter")))));
addEventListener("beforeprint", () => all("details.provenance").forEach((part) => { part.open = true; }));
