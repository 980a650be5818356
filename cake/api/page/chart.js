// A small line chart of the last minutes.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300, HEIGHT = 100;
const N_STYLES = 4;

/** Lines by name, each of points (seconds before now, value), over a time of so many seconds. */
export function chart(seconds, lines) {
  const most = Math.max(1e-9, ...Object.values(lines).flat().map(([, value]) => value));
  const drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${Object.keys(lines).join(", ")}: up to ${most.toPrecision(3)}` });
  drawing.append(shape("line", { class: "frame", x1: 0, y1: HEIGHT, x2: WIDTH, y2: HEIGHT }));
  Object.values(lines).forEach((points, i) => {
    const path = points.map(([at, value]) => `${(1 + at / seconds) * WIDTH},${HEIGHT - (value / most) * (HEIGHT - 2)}`);
    drawing.append(shape("polyline", { class: `series-${i % N_STYLES}`, points: path.join(" ") }));
  });
  const box = document.createElement("div");
  box.className = "chart";
  box.append(row("scale", [`up to ${most < 0.001 ? 0 : most.toPrecision(3)}`]), drawing,
    row("scale", [`${seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} minutes`} ago`, "now"]), row("legend", Object.keys(lines), true));
  return box;
}

function row(name, texts, coloured = false) {
  const made = document.createElement("div");
  made.className = name;
  texts.forEach((text, i) => {
    const each = document.createElement("span");
    each.textContent = coloured ? `▬ ${text}` : text;
    if (coloured) each.className = `series-${i % N_STYLES}`;
    made.append(each);
  });
  return made;
}

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
