// How fast an answer comes. Times are milliseconds.

/** Counts the pieces of an answer that is asked for now, and leaves out what it waited for a lost worker. */
export class Pace {
  #asked; #first; #last; #pieces = 0; #counted = 0; #worked = 0; #interrupted = false;

  constructor(now = performance.now()) {
    this.#asked = now;
  }

  /** One more piece is there. */
  piece(now = performance.now()) {
    if (!this.#pieces) this.#first = now;
    else if (!this.#interrupted) { this.#counted += 1; this.#worked += now - this.#last; }
    this.#pieces += 1;
    this.#last = now;
    this.#interrupted = false;
  }

  /** The next piece takes longer than it would, as a worker is lost or catches up. */
  interrupt() {
    this.#interrupted = true;
  }

  /** What there is to say of an answer; as many tokens as pieces, unless it is known better. */
  notes(nTokens = this.#pieces) {
    if (!this.#pieces) return [];
    const each = (nTokens - 1) / (this.#pieces - 1), rate = (1000 * each * this.#counted) / this.#worked;
    return [`${nTokens} ${nTokens === 1 ? "token" : "tokens"}`, `${this.#worked ? rate.toFixed(1) : "–"} tokens/s`,
      `first after ${Math.round(this.#first - this.#asked)} ms`];
  }
}
