// The legend: a button a loss, which hides and shows it in every chart.
const looks = read("looks"), legend = document.getElementById("legend");
let shown = Object.keys(looks);

for (const [name, look] of Object.entries(looks)) {
  const button = document.createElement("button");
  button.type = "button";
  button.ariaPressed = "true";
  button.title = "Hide or show " + name;
  const line = `<line x1="0" y1="4" x2="22" y2="4" stroke="${look.hue}" stroke-width="4" stroke-dasharray="${look.dash[1] ? look.dash : ""}"/>`;
  button.innerHTML = `<svg aria-hidden="true">${line}</svg>`;
  button.append(name);
  button.onclick = async () => {
    shown = shown.includes(name) ? shown.filter(each => each !== name) : Object.keys(looks).filter(each => each === name || shown.includes(each));
    button.ariaPressed = String(shown.includes(name));
    await Promise.all([...views.values()].map(view => view.signal("shown", shown).runAsync()));
  };
  legend.append(button);
}
// What gets the focus is not under it.
new ResizeObserver(() => { document.documentElement.style.scrollPaddingTop = `${legend.offsetHeight + 8}px`; }).observe(legend);
const withoutLegend = spec => JSON.parse(JSON.stringify(spec, (key, value) => key === "legend" ? null : value));
drawAlways(view => view.signal("shown", shown).runAsync(), withoutLegend);
