// Sliders show what the library computed for each position; the last station reads a formula.
const sliders = read("sliders");
const OWN_POINTS = [.99, .9, .5, .1, .01, 1e-3, 1e-6];
const show = (x, digits = 7) => typeof x !== "number" ? x ?? "–"
  : x !== 0 && (Math.abs(x) >= 1e7 || Math.abs(x) < 1e-4) ? (+x.toPrecision(Math.min(digits, 5))).toExponential() : String(+x.toPrecision(digits));
const brief = x => show(x, Number.isInteger(x) ? 7 : 4);
const chosen = {};

function cell(tag, content, scope) {
  const element = document.createElement(tag);
  if (typeof content === "string" && content.length > 2) element.className = "what";
  element.textContent = show(content);
  if (typeof content === "number") element.dataset.value = content;
  if (scope) element.scope = scope;
  return element;
}

function fillTable(body, rows) {
  body.replaceChildren(...rows.map(row => {
    const line = document.createElement("tr");
    line.append(...row.map((each, i) => i ? cell("td", each) : cell("th", each, "row")));
    return line;
  }));
}

for (const [figure, slider] of Object.entries(sliders)) {
  const box = document.getElementById(figure), input = box.querySelector("input");
  const move = async () => {
    const at = Number(input.value), rows = slider.rows[at];
    chosen[figure] = at;
    box.querySelector("output").textContent = input.ariaValueText = brief(slider.names[at]);
    fillTable(box.querySelector("tbody"), rows);
    await Promise.all(slider.charts.filter(id => views.has(id)).map(id => views.get(id).signal("at", at).runAsync()));
  };
  input.addEventListener("input", move);
  move();
}

function profile(tree, points) {
  return points.map(p => {
    const [value, slope] = evaluate(tree, p);
    return {p, value, dp: slope, dz: slope * p * (1 - p)};
  });
}

const CROSS_ENTROPY = parse("-log(p)");
const CURVE = [...Array.from({length: 61}, (_, i) => 10 ** (-6 + i / 12)).slice(0, -1), ...Array.from({length: 34}, (_, i) => .1 + i * .027)];
let own = CROSS_ENTROPY;

const LOW = [1e-8, 1e-16, 1e-64];  // not less: p^4 is still a number there

// What becomes of the pull as p goes to 0. A trend is read off in -log p, where the slowest are powers: one that grows or
// falls for good keeps its exponent, one that nears a limit loses it.
function limit(tree) {
  const [a, b, c] = LOW.map(p => Math.abs(profile(tree, [p])[0].dz));
  const at = `${+c.toPrecision(3)} at p = ${LOW[2]}`;
  if (![a, b, c].every(Number.isFinite)) return "its pull in the logit is no number at small p";
  if (c === 0 && b === 0 && a === 0) return `its pull in the logit is 0 at p = ${LOW[0]} and less: a confident mistake teaches nothing`;
  if (Math.abs(c - b) <= .01 * b && Math.abs(b - a) <= .01 * a) return "its pull in the logit holds as p goes to 0, near " + +c.toPrecision(3) + " (cross entropy: 1)";
  const size = LOW.map(p => Math.log(-Math.log(p)));
  const [first, last] = [Math.log(b / a) / (size[1] - size[0]), Math.log(c / b) / (size[2] - size[1])];
  if (first * last > 0 && Math.abs(last) < .7 * Math.abs(first)) return `its pull in the logit settles as p goes to 0: ${at} (cross entropy: 1)`;
  if (last > 0) return `its pull in the logit grows as p goes to 0: ${at} (cross entropy: 1)`;
  return `its pull in the logit vanishes as p goes to 0 (${at}): the surer the mistake, the less it teaches`;
}

// What has no place on a logarithmic axis is left out.
const drawn = x => Math.abs(x) > 1e-9 && Number.isFinite(x) ? Math.abs(x) : null;

function curves() {
  return [["cross entropy", CROSS_ENTROPY], ["yours", own]].flatMap(([loss, tree]) => profile(tree, CURVE).map(row => ({
    loss, p: row.p, value: Number.isFinite(row.value) ? row.value : null, dp: drawn(row.dp), dz: drawn(row.dz),
  })));
}

async function feed(view, id) {
  for (const [figure, slider] of Object.entries(sliders)) {
    if (slider.charts.includes(id)) await view.signal("at", chosen[figure]).runAsync();
  }
}

async function readFormula() {
  const input = document.getElementById("formula"), said = document.getElementById("said");
  try {
    own = parse(input.value);
  } catch (error) {
    if (!(error instanceof FormulaError)) throw error;
    said.textContent = error.message;
    said.className = "wrong";
    input.ariaInvalid = "true";
    return;
  }
  input.ariaInvalid = "false";
  const rows = profile(own, OWN_POINTS), both = profile(CROSS_ENTROPY, OWN_POINTS);
  const broken = rows.find(row => ![row.value, row.dp].every(Number.isFinite));
  const low = rows.at(-3), high = both.at(-3);
  said.className = broken ? "wrong" : "";
  said.textContent = broken ? `At p = ${show(broken.p)} this is no finite number.`
    : `At p = 0.01 it pulls with ${show(Math.abs(low.dz), 3)} in the logit, cross entropy with ${show(Math.abs(high.dz), 3)}; ${limit(own)}.`
      + (rows.some(row => row.dp > 0) ? " Somewhere it rises with p: there it pulls away from the right token." : "");
  fillTable(document.querySelector("#own-table tbody"), rows.map((row, i) =>
    [row.p, row.value, row.dp, row.dz, both[i].value, both[i].dp, both[i].dz].map(x => Number.isNaN(x) ? null : Math.abs(x) === Infinity ? (x > 0 ? "∞" : "-∞") : x)));
  const body = python(own);
  document.getElementById("own-code").textContent = "import jax\nimport jax.numpy as jnp\nfrom xentlab import at_target\n\n\n"
    // The logarithm first: of a p below the least float there is none.
    + "def mine(logits, targets):\n    log_p = at_target(jax.nn.log_softmax(logits), targets)\n"
    + (/\bp\b/.test(body) ? "    p = jnp.exp(log_p)\n" : "") + "    return " + body + (/\b(log_)?p\b/.test(body) ? "" : " + 0 * log_p") + "\n";
  const lines = curves();
  await Promise.all(Object.keys(specs).filter(id => id.startsWith("own-")).map(id => {
    specs[id].datasets = {own: lines};  // for when it is drawn again
    return views.get(id)?.data("own", lines).runAsync();
  }));
}

document.getElementById("formula").addEventListener("input", readFormula);
for (const button of document.querySelectorAll(".examples button")) {
  button.onclick = () => { document.getElementById("formula").value = button.textContent; readFormula(); };
}
readFormula();
// A legend has as many columns as its names leave room for.
function fit(spec, width) {
  if (!spec || typeof spec !== "object") return;
  if (spec.legend?.columns) {
    const longest = Math.max(0, ...(spec.scale?.domain ?? []).map(name => String(name).length));
    spec.legend.columns = Math.max(1, Math.min(spec.legend.columns, Math.floor(width / (45 + 6.5 * longest))));
  }
  Object.values(spec).forEach(each => fit(each, width));
}
for (const [id, spec] of Object.entries(specs)) {
  const width = document.getElementById(id).clientWidth;
  fit(spec.encoding, width);
  fit(spec.layer, width);
  if (width < 480) spec.config = {...spec.config, legend: {...spec.config?.legend, columns: 2}};
}
drawAlways(feed);

// The table of contents: folded where it would fill a small screen; the station in view is marked.
const contents = document.querySelector("nav details");
if (innerWidth < 1000) contents.open = false;
const seen = new IntersectionObserver(entries => {
  for (const entry of entries.filter(each => each.isIntersecting)) {
    document.querySelector("nav a[aria-current]")?.removeAttribute("aria-current");
    document.querySelector(`nav a[href="#${entry.target.id}"]`)?.setAttribute("aria-current", "true");
  }
}, {rootMargin: "-10% 0px -75% 0px"});
document.querySelectorAll("section.station[id]").forEach(section => seen.observe(section));
