// The page's two views, and the stream of news that both live on.

import { openChat, showDelay } from "./chat.js";
import { showCluster } from "./cluster.js";
import { events, fetched } from "./server.js";

const RETRY_MS = 1000;
const $ = (selector) => document.querySelector(selector);

function showView() {
  const wanted = location.hash === "#cluster" ? "cluster" : "chat";
  for (const view of document.querySelectorAll("main")) view.hidden = view.id !== wanted;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${wanted}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function showState(snapshot) {
  const lost = snapshot.nodes.filter((node) => node.state === "lost").map((node) => node.name);
  const replaying = snapshot.nodes.filter((node) => node.state === "replaying").map((node) => node.name);
  const up = snapshot.nodes.length - lost.length;
  $("#state").classList.toggle("bad", lost.length > 0);
  let text = `${up} of ${snapshot.nodes.length} nodes up`;
  if (replaying.length) text = `${replaying.join(", ")} catching up`;
  if (lost.length) text = `${lost.join(", ")} lost`;
  showDelay(lost, replaying);
  if ($("#state").textContent !== text) $("#state").textContent = text;
}

async function follow() {
  for (;;) {
    try {
      for await (const snapshot of events(await fetched("/api/v1/events"))) {
        showState(snapshot);
        showCluster(snapshot);
      }
    } catch {
      // told below, and tried again
    }
    $("#state").classList.add("bad");
    $("#state").textContent = "the server does not answer; trying again";
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

addEventListener("hashchange", showView);
showView();
const { data: [{ id }] } = await (await fetched("/v1/models")).json();
$("#model").textContent = id;
openChat(id);
follow();
