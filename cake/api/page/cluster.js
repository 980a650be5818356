// The cluster: the way of a token from stage to stage, its figures, and what happened to whom.

import { chart } from "./chart.js";
import { element } from "./elements.js";
import { apart, wayOf } from "./way.js";

const KEPT_S = 300;
const SHORTEST_S = 30;
const MOST_LOG_LINES = 50;
const $ = (selector) => document.querySelector(selector);
const history = []; // snapshots of the last minutes
const states = new Map(); // what each node was in last

/** Show a snapshot of the cluster, as `/api/v1/events` tells it. */
export function showCluster(snapshot) {
  history.push(snapshot);
  while (snapshot.at - history[0].at > KEPT_S) history.shift();
  snapshot.nodes.forEach((node) => noteState(node, snapshot.at));
  if ($("#cluster").hidden) return;
  showPipeline(snapshot);
  showRates(snapshot.rates);
  showCharts(snapshot);
}

function showPipeline(snapshot) {
  $("#pipeline").replaceChildren(...wayOf(snapshot));
  const [master, ...workers] = snapshot.nodes;
  const used = new Set([master.name, ...snapshot.pipeline.map((stage) => stage.node)]);
  const others = workers.filter((node) => !used.has(node.name));
  $("#apart").hidden = others.length === 0;
  $("#apart ul").replaceChildren(...others.map(apart));
}

function showRates(rates) {
  const shown = {
    "tokens/s": rates.tokens_per_s.toFixed(1), "prompt tokens/s": rates.prompt_tokens_per_s.toFixed(0),
    requests: rates.requests, waiting: rates.waiting, sessions: rates.sessions, replays: rates.replays,
  };
  $("#rates").replaceChildren(...Object.entries(shown).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
}

function showCharts({ at, pipeline }) {
  const seconds = Math.max(SHORTEST_S, Math.ceil(at - history[0].at));
  const points = (value) => history.map((each) => [each.at - at, value(each)]);
  $("#speed-chart").replaceChildren(chart(seconds, { tokens: points((each) => each.rates.tokens_per_s) }));
  const lines = {};
  for (const { node, span } of pipeline) {
    const same = (stage) => stage.node === node && stage.span[0] === span[0];
    lines[`${node} ${span[0]}–${span[1] - 1}`] = points((each) => each.pipeline.find(same)?.compute_ms ?? 0);
  }
  $("#stage-chart").replaceChildren(chart(seconds, lines));
}

function happened(before, now) {
  if (now === "lost") return "is lost";
  if (now === "replaying") return "is told again what it lacks";
  if (before === "lost") return "is back";
  if (before === "replaying") return "has what it lacked, and goes on";
  return now === "up" ? "takes part again" : "stands by";
}

/** Write down that a node is in another state than it was. */
function noteState(node, at) {
  const before = states.get(node.name);
  states.set(node.name, node.state);
  if (before === undefined || before === node.state) return;
  const time = element("time", {}, new Date(at * 1000).toLocaleTimeString());
  $("#log").prepend(element("li", { className: node.state }, time, `${node.name} ${happened(before, node.state)}`));
  while ($("#log").children.length > MOST_LOG_LINES) $("#log").lastElementChild.remove();
}
