// The chat: asks the server, shows the answer as it comes, and keeps the conversation.

import { begin, conversations, keep, keepSettings, save, settings } from "./conversations.js";
import { button, element, written } from "./elements.js";
import { settleDeletion, showConversations } from "./list.js";
import { Pace } from "./pace.js";
import { events, fetched } from "./server.js";

const SAVE_MS = 1000; // between one saving of an answer that is coming and the next
const BROKEN_OFF = "broken off"; // what is known of an answer whose end never came
const $ = (selector) => document.querySelector(selector);
let conversation = conversations[0] ?? begin();
let running = null; // the AbortController of the answer that is coming
let pace = new Pace(); // of that answer
let model = "";
let lost = []; // names of nodes that are not there
let left = false; // the page is, which ends what it has asked for
let follows = true; // the end of the messages is in view, and is to stay there

/** Make the chat ready, for the model of this name. */
export function openChat(name) {
  model = name;
  show(conversation);
  readSettings();
  $("#messages").onscroll = () => { follows = isAtEnd(); };
  new ResizeObserver(() => { if (follows) scrollToEnd(); }).observe($("#messages"));
  $("#ask").onsubmit = (submitted) => { submitted.preventDefault(); send(); };
  $("#question").onkeydown = (key) => {
    if (key.key === "Enter" && !key.shiftKey && !key.isComposing) { key.preventDefault(); send(); }
  };
  document.addEventListener("keydown", (key) => { if (key.key === "Escape") running?.abort(); });
  $("#stop").onclick = () => running?.abort();
  addEventListener("pagehide", () => { left = true; if (running) save(); });
  addEventListener("pageshow", () => { left = false; });
  $("#new").onclick = () => open(begin());
  $("#show-conversations").onclick = () => showList(!$("#conversations").classList.contains("open"));
  $("#show-settings").onclick = () => showSettings($("#settings").hidden);
  $("#hide-settings").onclick = () => showSettings(false);
}

/** Say under an answer that is coming what it may wait for: nodes that are lost, and such as catch up. */
export function showDelay(names, replaying) {
  if (replaying.length || names.some((name) => !lost.includes(name))) pace.interrupt();
  lost = names;
  const text = running && lost.length ? `${lost.join(", ")} lost: the answer goes on with whoever serves its blocks next.` : "";
  if ($("#delay").textContent !== text) $("#delay").textContent = text;
}

function send() {
  const text = $("#question").value.trim();
  if (!text || running) return;
  $("#question").value = "";
  conversation.messages.push({ role: "user", content: text });
  answer();
}

/** Ask for an answer to the conversation as it stands. */
async function answer() {
  const asked = conversation;
  pace = new Pace();
  const said = { role: "assistant", content: "", note: BROKEN_OFF };
  const messages = asked.messages.map(({ role, content }) => ({ role, content }));
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  asked.messages.push(said);
  keep(asked);
  settleDeletion();
  showConversations(asked, { open, show });
  setRunning(new AbortController());
  const { system, ...sampling } = settings;
  const body = JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true }, ...sampling });
  showMessages();
  const { signal } = running;
  let n_tokens, saved = performance.now(), ending = BROKEN_OFF;
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body, signal };
    for await (const event of events(await fetched("/v1/chat/completions", options))) {
      if (event.error) throw new Error(event.error.message);
      const text = event.choices[0]?.delta.content;
      if (text) { pace.piece(); said.content += text; showLast(asked); }
      if (performance.now() - saved > SAVE_MS) { save(); saved = performance.now(); }
      if (event.choices[0]?.finish_reason) ending = "";
      if (event.usage) n_tokens = event.usage.completion_tokens;
    }
  } catch (error) {
    if (signal.aborted) ending = "stopped";
    else if (!left) said.fault = error.message;
    if (said.fault && !said.content) ending = ""; // nothing had begun
  }
  said.note = [...(ending ? [ending] : []), ...pace.notes(n_tokens)].join(" · ");
  setRunning(null);
  save();
  if (asked === conversation) showMessages();
}

function setRunning(controller) {
  running = controller;
  $("#stop").hidden = !running;
  $("#send").hidden = Boolean(running);
  showDelay(lost, []);
}

/** Go on with another conversation, as the person wants. */
function open(other) {
  settleDeletion();
  show(other);
  showList(false);
  $("#question").focus();
}

function show(other) {
  if (other !== conversation) running?.abort();
  conversation = other;
  showConversations(conversation, { open, show });
  showMessages();
}

/** On a narrow screen the list is there when it is wanted. */
function showList(wanted) {
  $("#conversations").classList.toggle("open", wanted);
  $("#show-conversations").setAttribute("aria-expanded", wanted);
}

function showMessages() {
  const shown = conversation.messages.map(messageElement);
  if (!shown.length) shown.push(element("li", { className: "welcome" }, "Ask, and your devices answer together."));
  $("#messages").replaceChildren(...shown);
  scrollToEnd();
}

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("#messages");
  return scrollHeight - scrollTop - clientHeight < 80;
}

function scrollToEnd() {
  $("#messages").scrollTop = $("#messages").scrollHeight;
}

/** Show only the last message anew: it is the one that grows. */
function showLast(asked) {
  if (asked !== conversation) return;
  const wasAtEnd = isAtEnd();
  $("#messages").lastElementChild.replaceWith(messageElement(asked.messages.at(-1), asked.messages.length - 1));
  if (wasAtEnd) scrollToEnd();
}

function messageElement(message, at) {
  const comes = running && at === conversation.messages.length - 1;
  const body = element("div", { className: "body" }, ...written(message.content));
  if (comes) body.classList.add("waiting");
  const note = element("div", { className: "note" }, comes ? "" : message.note ?? "");
  if (!running && message.role === "assistant") note.append(button("Retry", () => again(at)));
  if (!running && message.role === "user") note.append(button("Edit", () => edit(at)));
  const parts = [element("span", { className: "unseen" }, message.role === "user" ? "You: " : "Answer: "), body];
  if (message.fault) parts.push(element("p", { className: "fault" }, message.fault));
  return element("li", { className: message.role }, ...parts, note);
}

/** Drop an answer and what came after it, and ask again. */
function again(at) {
  conversation.messages.length = at;
  answer();
}

/** Take a question back into the box, without what came after it. */
function edit(at) {
  $("#question").value = conversation.messages[at].content;
  conversation.messages.length = at;
  showMessages();
  $("#question").focus();
}

function showSettings(wanted) {
  $("#settings").hidden = !wanted;
  $("#show-settings").setAttribute("aria-expanded", wanted);
  (wanted ? $("#settings textarea") : $("#show-settings")).focus();
}

function readSettings() {
  for (const field of $("#settings").querySelectorAll("[name]")) {
    field.value = settings[field.name] ?? "";
    field.onchange = () => {
      if (!field.checkValidity()) { field.reportValidity(); return; }
      if (field.value === "") delete settings[field.name];
      else settings[field.name] = field.type === "number" ? Number(field.value) : field.value;
      keepSettings();
    };
  }
}
