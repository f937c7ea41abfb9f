// The charts of a page: each spec is drawn into the figure of its name, again when the reader's light changes.
"use strict";
const read = id => JSON.parse(document.getElementById(id).textContent);
const specs = read("specs");
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = new Map();

function theme() {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line, card] = ["--ink", "--soft", "--line", "--card"].map(name => style.getPropertyValue(name));
  return {  // not transparent: a chart that is saved takes it along
    background: card, view: {stroke: line}, font: "system-ui, sans-serif", range: {category: read("hues")},
    axis: {labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: "normal"},
    legend: {labelColor: soft, titleColor: soft, orient: "bottom"},
    text: {color: ink},
    title: {color: ink, subtitleColor: soft, anchor: "start", fontSize: 14, subtitleFontSize: 12},
  };
}

// after(view, id) sets what the reader has chosen; bare(spec) is the chart without what stands on the page already.
async function draw(after, bare) {
  for (const [id, spec] of Object.entries(specs)) {
    views.get(id)?.finalize();
    const result = await vegaEmbed("#" + CSS.escape(id), bare(spec), {
      renderer: "svg", config: theme(), tooltip: {theme: dark.matches ? "dark" : "light"},
      actions: {export: true, source: false, compiled: false, editor: false},
    });
    views.set(id, result.view);
    document.querySelector("#" + CSS.escape(id) + " summary")?.setAttribute("aria-label", "Save this chart");
    for (const link of document.querySelectorAll("#" + CSS.escape(id) + " .vega-actions a")) {
      const own = link.cloneNode(true);  // without what it listens to
      own.onclick = event => { event.preventDefault(); save(id, link.download.split(".").pop()); };
      link.replaceWith(own);
    }
    await after(result.view, id);
  }
  document.body.dataset.drawn = "yes";
}

// A chart is saved whole, with its legend, as the reader has it.
async function save(id, kind) {
  const seen = views.get(id), {view} = await vegaEmbed(document.createElement("div"),
    {...specs[id], width: seen.width(), height: seen.height()}, {config: theme(), actions: false});
  const {signals} = seen.getState({signals: name => name === "shown" || name === "at", data: () => false});
  for (const [name, value] of Object.entries(signals)) view.signal(name, value);
  await view.runAsync();
  const link = document.createElement("a");
  link.href = await view.toImageURL(kind, kind === "png" ? 2 : 1);
  link.download = `${id}.${kind}`;
  link.click();
  view.finalize();
}

function drawAlways(after, bare = spec => spec) {
  draw(after, bare);
  dark.addEventListener("change", () => draw(after, bare));
}
