// Sliders show what the library computed for each position; the last station reads a formula.
const sliders = read("sliders");
const OWN_POINTS = [.99, .9, .5, .1, .01, 1e-3, 1e-6];
const show = x => typeof x !== "number" ? x ?? "–" : x !== 0 && (Math.abs(x) >= 1e7 || Math.abs(x) < 1e-4) ? x.toExponential(4) : String(+x.toPrecision(7));
const brief = x => show(typeof x === "number" && !Number.isInteger(x) ? +x.toPrecision(4) : x);
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
const CURVE = [...Array.from({length: 61}, (_, i) => 10 ** (-6 + i / 12)).slice(0, -12), ...Array.from({length: 34}, (_, i) => .1 + i * .027)];
let own = CROSS_ENTROPY;

function limit(tree) {
  const [a, b] = [1e-4, 1e-8].map(p => Math.abs(profile(tree, [p])[0].dz));
  if (!(Number.isFinite(a) && Number.isFinite(b))) return "its pull in the logit is no number at small p";
  if (b < 1e-3 && b < .5 * a) return "its pull in the logit vanishes as p goes to 0: a confident mistake teaches nothing";
  if (b > 1.5 * a) return "its pull in the logit grows as p goes to 0";
  return "its pull in the logit holds as p goes to 0, near " + show(+b.toPrecision(3)) + " (cross entropy: 1)";
}

function curves() {
  const rows = [["cross entropy", CROSS_ENTROPY], ["yours", own]].flatMap(([loss, tree]) => profile(tree, CURVE).map(row => ({
    loss, p: row.p, value: row.value, dp: Math.abs(row.dp), dz: Math.abs(row.dz),
  })));
  // What has no place on a logarithmic axis is left out.
  return rows.filter(row => Number.isFinite(row.value) && row.dp > 1e-9 && row.dz > 1e-9 && Number.isFinite(row.dp));
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
    : `At p = 0.01 it pulls with ${show(+Math.abs(low.dz).toPrecision(3))} in the logit, cross entropy with ${show(+Math.abs(high.dz).toPrecision(3))}; ${limit(own)}.`
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
