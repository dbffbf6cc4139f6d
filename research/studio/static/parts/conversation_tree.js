// A conversation as a tree of lines, and the way down it that is shown.

export class Tree {
  constructor(lines = []) {
    this.lines = lines;
    this.seen = { turn: {}, answers: {}, pick: {} }; // What a person has chosen to see.
    for (const line of lines) this.note(line);
  }

  add(line) {
    this.lines.push(line);
    this.note(line);
  }

  note(line) {
    if (line.kind === "turn") this.seen.turn[key(line.parent, line.chosen)] = line.id;
    if (line.kind === "answers") this.seen.answers[line.turn] = line.id;
    if (line.kind === "pick") this.seen.pick[line.answers] = line.model;
    // A turn that follows an answer has taken it.
    if (line.kind === "turn" && line.parent) this.seen.pick[line.parent] ??= line.chosen;
  }

  turns(parent, chosen) {
    return this.lines.filter((x) => x.kind === "turn" && key(x.parent, x.chosen) === key(parent, chosen));
  }

  answers(turn) {
    return this.lines.filter((x) => x.kind === "answers" && x.turn === turn);
  }

  scores(answers, model) {
    return this.lines.findLast((x) => x.kind === "scores" && x.answers === answers && x.model === model);
  }

  picked(answers) {
    const models = answers.columns.map((column) => column.model);
    const chosen = this.seen.pick[answers.id];
    return models.includes(chosen) ? chosen : (models.find((_, i) => !answers.columns[i].stamp.is_base) ?? models[0]);
  }

  // [{turn, turns, answers, all, picked}] from the first turn to the last.
  way() {
    const steps = [];
    let [parent, chosen] = ["", ""];
    for (;;) {
      const turns = this.turns(parent, chosen);
      if (!turns.length) return steps;
      const turn = turns.find((x) => x.id === this.seen.turn[key(parent, chosen)]) ?? turns.at(-1);
      const all = this.answers(turn.id);
      const answers = all.find((x) => x.id === this.seen.answers[turn.id]) ?? all.at(-1) ?? null;
      const picked = answers ? this.picked(answers) : "";
      steps.push({ turn, turns, answers, all, picked });
      if (!answers) return steps;
      [parent, chosen] = [answers.id, picked];
    }
  }
}

function key(parent, chosen) {
  return parent ? `${parent} ${chosen}` : "";
}

// What puts the last of some steps to a model; the first turn has system text and context.
export function messagesOf(steps) {
  const first = steps[0].turn;
  const messages = first.system ? [{ role: "system", content: first.system }] : [];
  steps.forEach(({ turn, answers, picked }, index) => {
    messages.push({ role: "user", content: turn.text });
    if (index === steps.length - 1) return;
    const column = answers.columns.find((x) => x.model === picked);
    messages.push({ role: "assistant", content: column.text });
  });
  return { messages, context: first.context };
}
