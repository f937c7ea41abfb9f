// The charts of a page: each spec is drawn into the figure of its name, again when the reader's light changes.
"use strict";
const read = id => JSON.parse(document.getElementById(id).textContent);
const specs = read("specs");
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = new Map();

function theme() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), soft = style.getPropertyValue("--soft"), line = style.getPropertyValue("--line");
  return {
    background: "transparent", view: {stroke: line}, font: "system-ui, sans-serif", range: {category: read("hues")},
    axis: {labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: "normal"},
    legend: {labelColor: soft, titleColor: soft, orient: "bottom"},
    title: {color: ink, subtitleColor: soft, anchor: "start", fontSize: 14, subtitleFontSize: 12},
  };
}

// after(view, id) sets what the reader has chosen; a page gives it.
async function draw(after) {
  for (const [id, spec] of Object.entries(specs)) {
    views.get(id)?.finalize();
    const result = await vegaEmbed("#" + CSS.escape(id), spec, {
      renderer: "svg", config: theme(), tooltip: {theme: dark.matches ? "dark" : "light"},
      actions: {export: true, source: false, compiled: false, editor: false},
    });
    views.set(id, result.view);
    document.querySelector("#" + CSS.escape(id) + " summary")?.setAttribute("aria-label", "Save this chart");
    await after(result.view, id);
  }
  document.body.dataset.drawn = "yes";
}

function drawAlways(after) {
  draw(after);
  dark.addEventListener("change", () => draw(after));
}
