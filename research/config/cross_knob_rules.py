"""The rules that involve more than one knob. Each is checked, and `--help` shows it.

Every config keeps `RULES`. A knob that `ACTS` says has no effect is refused only where
somebody sets it, so that runs of earlier versions open.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from research.config.choices import KEEP
from research.config.field_names import name_sources, shell_flag
from research.config.knobs import flat
from research.core.errors import UserError, refuse
from research.core.hub_access import is_hub


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule across knobs.

    Attributes:
      meaning: the rule and its remedy. An error says it after the knobs' values.
      holds: whether a `run_config.Config` keeps the rule.
    """

    knobs: tuple[str, ...]
    meaning: str
    holds: Callable[[Any], bool]


def _lists_hub(path: str) -> bool:
    parts = [part.strip() for part in path.split(",")]
    return len(parts) > 1 and any(map(is_hub, parts))


def _is_of_b(override: str) -> bool:
    """Whether it is LoRA+ as the documentation writes it."""
    return override.rpartition("=")[0] in ("[.]b$", r"\.b$")


def _is_size(held_out: float) -> bool:
    return 0 <= held_out < 1 or (held_out >= 1 and held_out == int(held_out))


# Values of `model.quantize` with which no codes are made.
UNMADE = ("none", KEEP)

RULES = (
    Rule(
        ("trainable", "model.quantize"),
        "codes do not train: set --config.model.quantize=none, or "
        "--config.trainable=lora",
        lambda c: c.trainable == "lora" or c.model.quantize == "none",
    ),
    Rule(
        ("model.int8_products", "model.quantize"),
        "products of bytes need a base in bytes: set --config.model.quantize=int8, or "
        "--config.model.int8_products=False",
        lambda c: not c.model.int8_products or c.model.quantize == "int8",
    ),
    Rule(
        ("model.quantize", "model.quantize_paths"),
        "the paths change the format of some matrices of a base that is rounded: set "
        "--config.model.quantize=nf4, int4 or int8, or drop the paths",
        lambda c: not c.model.quantize_paths or c.model.quantize not in UNMADE,
    ),
    Rule(
        ("lora.kind", "optim.rate_pattern"),
        "LoRA+ gives the factors B a rate of their own, and VeRA trains none: drop the "
        "pattern, or use another kind",
        lambda c: (
            c.trainable != "lora"
            or c.lora.kind != "vera"
            or not any(map(_is_of_b, c.optim.rate_pattern))
        ),
    ),
    Rule(
        ("lora.kind", "lora.rslora"),
        "EVA gives each matrix a rank of its own, and alpha / rank stays the same for "
        "all: use one of them",
        lambda c: c.lora.kind != "eva" or not c.lora.rslora,
    ),
    Rule(
        ("lora.kind", "model.quantize"),
        "loftq and qera start at what the codes of a base have lost of its file: set "
        "--config.model.quantize=nf4, int4 or int8, or use another kind",
        lambda c: (
            c.trainable != "lora"
            or c.lora.kind not in ("loftq", "qera")
            or c.model.quantize not in UNMADE
        ),
    ),
    Rule(
        ("model.init_from", "model.preset"),
        "one of them names a model to start from, or the shape of a random one",
        lambda c: bool(c.model.init_from or c.model.preset),
    ),
    Rule(
        ("data.kind", "model.init_from"),
        "instruction tuning starts from a model, whose tokenizer it uses",
        lambda c: c.data.kind != "instructions" or bool(c.model.init_from),
    ),
    Rule(
        ("trainable", "model.init_from"),
        "adapters need a trained model; without one use --config.trainable=full",
        lambda c: c.trainable != "lora" or bool(c.model.init_from),
    ),
    Rule(
        ("epochs", "steps"),
        "only one of them says how long the run is; --config.steps=-1 leaves it to the "
        "epochs, --config.epochs=0 to the steps",
        lambda c: not c.epochs or c.steps == -1,
    ),
    Rule(
        ("steps",),
        "a run makes at least one step",
        lambda c: c.steps != 0,
    ),
    Rule(
        ("epochs", "data.kind", "text.cache"),
        "streamed text has not been counted, so its epochs have no length; set "
        "--config.epochs=0 --config.steps=NUMBER, or --config.text.cache=True",
        lambda c: not c.epochs or c.data.kind != "text" or c.text.cache,
    ),
    Rule(
        ("data.held_out",),
        "rows are held out by number, such as 48, or by share, such as 0.1; 0 holds "
        "out none, and -1 chooses",
        lambda c: c.data.held_out == -1 or _is_size(c.data.held_out),
    ),
    Rule(
        ("runtime.profile_from", "steps"),
        "the first step to trace is a step of the run",
        lambda c: c.epochs or c.runtime.profile_from <= c.steps,
    ),
    Rule(
        ("data.microbatch_size", "data.batch_size"),
        "the micro-batch must divide the batch",
        lambda c: c.data.batch_size % c.data.rows_per_pass == 0,
    ),
    Rule(
        ("text.overlap", "data.seq_len"),
        "each row of text begins less than half a row before the end of the last one: "
        "lower config.text.overlap or raise config.data.seq_len",
        lambda c: c.data.kind != "text" or 2 * c.text.overlap < c.data.seq_len,
    ),
    Rule(
        ("data.path", "data.eval_path"),
        "rows are those of one dataset on the hub, or of files and folders: a list "
        "with commas has no hub:// in it",
        lambda c: not (_lists_hub(c.data.path) or _lists_hub(c.data.eval_path)),
    ),
    Rule(
        ("data.kind", "text.sources"),
        "raw text for pre-training is given as "
        "--config.text.sources=\"('mine=my.txt',)\"; ('stdlib=stdlib',) is the text "
        "of the running Python's own library",
        lambda c: c.data.kind != "text" or bool(c.text.sources),
    ),
)


@dataclasses.dataclass(frozen=True)
class Condition:
    """The values of a knob with which another one has an effect.

    Attributes:
      knob: its path, such as "data.kind".
      values: some of its values.
      wanted: whether the other one acts with these; else it acts with all others.
      unless: conditions of which one is enough in place of this one.
    """

    knob: str
    values: tuple[Any, ...]
    wanted: bool = True
    unless: "Conditions" = ()

    @property
    def listed(self) -> str:
        return " or ".join(map(repr, self.values))

    def __str__(self) -> str:
        own = f"config.{self.knob} is {'' if self.wanted else 'not '}{self.listed}"
        return " or ".join([own, *map(str, self.unless)])

    def holds(self, values: Mapping[str, Any]) -> bool:
        own = (values[self.knob] in self.values) == self.wanted
        return own or any(other.holds(values) for other in self.unless)


Conditions = tuple[Condition, ...]


def _only(knob: str, *values: Any) -> Conditions:
    return (Condition(knob, values),)


def _never(knob: str, *values: Any, unless: Conditions = ()) -> Conditions:
    return (Condition(knob, values, wanted=False, unless=unless),)


# Knobs that one job reads and the other does not. An added task may read both.
ROWS, TEXT = _never("data.kind", "text"), _never("data.kind", "instructions")
HELD_ROWS = _never(
    "data.held_out",
    0.0,
    unless=_never("data.eval_path", "") + _never("data.kind", "instructions"),
)
EVALUATED = HELD_ROWS + _never(
    "text.held_out_share", 0.0, unless=_never("data.kind", "text")
)
RANDOM = _only("model.init_from", "")
JOINS = _only("runtime.distributed", True)
ADAPTERS = _only("trainable", "lora")
NO_ROWS = ("batch_size", "microbatch_size", "seq_len", "bad_lines", "hub_timeout")
# The conditions under which a knob, or each knob of a group, acts. A knob's own entry
# stands before that of its group; one that is found nowhere always acts.
ACTS: dict[str, Conditions] = {
    "replace_export": _only("export", True),
    "model.preset": RANDOM,
    "model.param_dtype": _only("trainable", "full"),
    "model.attention_block": _only("model.attention", "auto", "xla"),
    "lora": ADAPTERS,
    "lora.pissa_niter": ADAPTERS + _only("lora.kind", "pissa"),
    "lora.eva_rho": ADAPTERS + _only("lora.kind", "eva"),
    "lora.eva_batches": ADAPTERS + _only("lora.kind", "eva", "qera"),
    **{
        f"lora.{name}": ADAPTERS + _never("lora.kind", "vera")
        for name in ("alpha", "alpha_pattern", "rslora")
    },
    "data": ROWS,
    **{f"data.{name}": () for name in ("kind", *NO_ROWS)},
    "data.source": ROWS + _only("data.path", ""),
    "data.eval_path": ROWS + _never("data.path", ""),
    "data.held_out": ROWS + _only("data.eval_path", ""),
    "text": TEXT,
    "text.tokenizer": TEXT + RANDOM,
    "text.held_out_bytes": TEXT + _never("text.held_out_share", 0.0),
    "text.cache_dir": (),
    "optim.decay": _only("optim.schedule", "wsd"),
    "optim.final": _never("optim.schedule", "constant"),
    "optim.b1": _never("optim.name", "adafactor"),
    "optim.b2": _never("optim.name", "adafactor"),
    "optim.eps": _never("optim.name", "adafactor", "lion"),
    "optim.no_decay": _never("optim.weight_decay", 0.0),
    "optim.skip_window": _never("optim.skip_spread", 0.0),
    "eval.every": EVALUATED,
    "eval.stop_loss": EVALUATED + _never("eval.every", 0),
    "eval.prompts": ROWS + HELD_ROWS,
    "eval.answers_rows": ROWS + HELD_ROWS,
    "eval.answers_every": ROWS + HELD_ROWS + _never("eval.answers_rows", 0),
    "eval.samples_every": HELD_ROWS,
    "eval.text_prompts": TEXT,
    "checkpoint.keep_best": EVALUATED,
    "checkpoint.best_by": ROWS + HELD_ROWS,
    "runtime.profile_steps": _never("runtime.profile_from", 0),
    "runtime.coordinator_address": JOINS,
    "runtime.num_processes": JOINS,
    "runtime.process_id": JOINS,
}


def conditions_of(path: str) -> Conditions:
    """The conditions under which the knob at `path` has an effect."""
    while path and path not in ACTS:
        path = path.rpartition(".")[0]
    return ACTS.get(path, ())


def idle(config: Any) -> dict[str, Condition]:
    """The knobs that have no effect, each with the first condition that fails."""
    values = flat(config)
    return {
        path: condition
        for path in values
        for condition in reversed(conditions_of(path))
        if not condition.holds(values)
    }


# The knobs that do for one job what the others do for the other one.
COUNTERPARTS = {
    "data.path": "text.sources",
    "data.held_out": "text.held_out_share",
    "data.columns.response": "text.column",
    "eval.prompts": "eval.text_prompts",
}
COUNTERPARTS |= {text: rows for rows, text in COUNTERPARTS.items()}
# The value of a knob as its counterpart writes it, where it has the same meaning.
AS_COUNTERPART: dict[str, Callable[[Any], Any]] = {
    "data.path": name_sources,
    "text.sources": lambda sources: ",".join(x.partition("=")[2] for x in sources),
    "data.columns.response": str,
    "text.column": str,
}


def _agrees(
    path: str, condition: Condition, now: Mapping[str, Any], flags: Collection[str]
) -> bool:
    """Whether something is off, and this knob of it is, too, or it was a flag that
    turned it off after a file had set the knob.
    """
    turned_off = condition.knob in flags and path not in flags
    return now[condition.knob] == 0 and (now[path] == 0 or turned_off)


def check_effects(
    config: Any,
    default: Any,
    resumed: Sequence[Any] = (),
    flags: Collection[str] = (),
) -> None:
    """Refuses a `run_config.Config` that sets knobs which have no effect in its run.

    Args:
      config: of the run.
      default: with all knobs at their defaults.
      resumed: configs of runs that are opened again: what had no effect in them may
        have none now.
      flags: paths of the knobs that the command line sets.

    Raises:
      UserError: names all of these knobs, and how to set them back.
    """
    now, conditions, unset = flat(config), idle(config), flat(default)
    known = [
        {path: flat(each)[path] for path in idle(each)} for each in (default, *resumed)
    ]
    lines, moved, dropped, restored, changed = [], [], [], [], []
    for path, condition in conditions.items():
        is_known = any(now[path] == old.get(path, unset[path]) for old in known)
        if is_known or _agrees(path, condition, now, flags):
            continue
        line = (
            f"config.{path} is {now[path]!r}, which has no effect where "
            f"config.{condition.knob} is {now[condition.knob]!r}"
        )
        if condition.wanted:
            line += f" and not {condition.listed}"
        if path in COUNTERPARTS and COUNTERPARTS[path] not in conditions:
            line += f" (config.{COUNTERPARTS[path]} takes its place)"
            if path in AS_COUNTERPART:
                value = AS_COUNTERPART[path](now[path])
                moved.append(shell_flag(COUNTERPARTS[path], value))
        lines.append(line)
        changed.append(path)
        if path in flags:
            dropped.append(f"--config.{path}")
        else:
            restored.append(shell_flag(path, unset[path]))
    if not lines:
        return
    fixes = [f"give {' '.join(moved)} instead"] if moved else []
    if dropped:
        fixes.append(f"drop {' '.join(dropped)}")
    if restored:
        fixes.append(f"drop what sets it in the file, or add {' '.join(restored)}")
    others = dict.fromkeys(f"config.{conditions[path].knob}" for path in changed)
    fix = f"{', and '.join(fixes)}; or change {' and '.join(others)}"
    if len(lines) == 1:
        raise UserError(f"{lines[0]}: {fix}")
    listed = "\n  ".join(lines)
    raise UserError(f"some knobs would have no effect:\n  {listed}\n{fix}")


def check_rules(config: Any) -> None:
    """Checks a `run_config.Config` whose knobs are each within their limits.

    Raises:
      UserError: knobs contradict each other; the message names all of them.
    """
    values = flat(config)
    faults = []
    for rule in RULES:
        if not rule.holds(config):
            found = [f"config.{knob} is {values[knob]!r}" for knob in rule.knobs]
            faults.append(f"{', '.join(found)}: {rule.meaning}")
    refuse(faults)
