// Conversations and settings, kept in this browser and nowhere else.

const CONVERSATIONS = "cake.conversations";
const SETTINGS = "cake.settings";

const read = (name, otherwise) => JSON.parse(localStorage.getItem(name)) ?? otherwise;

/** All conversations, the latest first: `{id, messages: [{role, content, note}]}`. */
export const conversations = read(CONVERSATIONS, []);

/** A new, empty conversation; it is kept once something was said in it. */
export function begin() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), messages: [] };
}

/** Keep a conversation, as the latest one. */
export function keep(conversation) {
  drop(conversation);
  conversations.unshift(conversation);
  save();
}

/** Keep a conversation no longer; where it stood. */
export function forget(conversation) {
  const at = drop(conversation);
  save();
  return at;
}

/** Keep one again that was forgotten, where it stood. */
export function restore(conversation, at) {
  conversations.splice(at, 0, conversation);
  save();
}

function drop(conversation) {
  const at = conversations.indexOf(conversation);
  if (at >= 0) conversations.splice(at, 1);
  return at;
}

/** Keep what is kept as it is now, as far as there is room. */
export function save() {
  for (;;) {
    try {
      localStorage.setItem(CONVERSATIONS, JSON.stringify(conversations));
      return;
    } catch {
      if (conversations.length < 2) return;
      conversations.pop(); // the oldest makes room
    }
  }
}

/** What a conversation is called. */
export const titleOf = (conversation) => conversation.messages[0]?.content.slice(0, 60) ?? "New chat";

/** What the person chose in the settings, by the names of the API. */
export const settings = read(SETTINGS, {});

export function keepSettings() {
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
}
