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

/** Keep a conversation as it is now, as the latest one. */
export function keep(conversation) {
  forget(conversation, false);
  conversations.unshift(conversation);
  write();
}

/** Drop a conversation. */
export function forget(conversation, written = true) {
  const at = conversations.findIndex((each) => each.id === conversation.id);
  if (at >= 0) conversations.splice(at, 1);
  if (written) write();
}

/** What a conversation is called. */
export const titleOf = (conversation) => conversation.messages[0]?.content.slice(0, 60) ?? "New chat";

/** What the person chose in the settings, by the names of the API. */
export const settings = read(SETTINGS, {});

export function keepSettings() {
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
}

function write() {
  for (;;) {
    try {
      localStorage.setItem(CONVERSATIONS, JSON.stringify(conversations));
      return;
    } catch (full) {
      if (conversations.length < 2) throw full;
      conversations.pop(); // the oldest makes room
    }
  }
}
