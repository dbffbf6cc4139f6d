"""Whether files describe the model of a run: settings, shapes, tokenizer, texts."""

from collections.abc import Mapping

from research.core.errors import ParityError
from research.formats.architecture_parity import differences, excused
from research.formats.export_format import ExportedModel, WrittenModel
from research.models.transformer import Model
from research.tokenize.tokenizer import Tokenizer

TEXTS = ("Hello, world! 123", "ü 日本\n\n  x\t{}", "<|im_start|>user")
REPORT = "please report this, with the command"


def require_same_model(
    exported: ExportedModel, written: WrittenModel, asked: str
) -> Mapping[str, str]:
    """The reasons, by field, why a setting may differ in these files.

    `asked` are the numbers that the files were to have.

    Raises:
      ParityError: they describe another model.
    """
    reasons = _compare_settings(exported, written)
    _compare_shapes(exported, written)
    for path, numbers in written.held.items():
        numbers.require_exact(path, asked)
    if written.tokenizer is not None:
        _compare_tokenizers(exported.tokenizer, written.tokenizer)
    for place, ids in written.ends.items():
        if {*ids} != {*exported.tokenizer.end_ids}:
            raise ParityError(
                f"{place} of the written files has {sorted(ids)} as the ids that end "
                f"an answer, not {sorted(exported.tokenizer.end_ids)}: {REPORT}"
            )
    for name, text in exported.facts.items():
        # A format may have no place for an empty text.
        if (found := written.facts.get(name, "")) != text:
            raise ParityError(
                f"the written files say that {name} is {found!r:.80}, and it is "
                f"{text!r:.80} in the run: {REPORT}"
            )
    return reasons


def _compare_settings(
    exported: ExportedModel, written: WrittenModel
) -> Mapping[str, str]:
    ours, theirs = exported.model.architecture, written.architecture
    reasons = excused(ours, theirs) if written.for_llama_cpp else {}
    for name, (own, found) in differences(ours, theirs).items():
        if name not in reasons:
            raise ParityError(
                f"the written files describe another model: {name} is {found!r:.200}, "
                f"and {own!r:.200} in the run: {REPORT}"
            )
    return reasons


def _compare_shapes(exported: ExportedModel, written: WrittenModel) -> None:
    specs, found = exported.model.specs, Model(written.architecture).specs
    for path in {**specs, **found}:
        ours, theirs = (x[path].shape if path in x else None for x in (specs, found))
        if ours != theirs:
            raise ParityError(
                f"the written files describe {path} as {theirs}, and the run has "
                f"{ours}: {REPORT}"
            )
    lacking = specs.keys() - written.held.keys()
    if any(numbers.is_update for numbers in written.held.values()) or not written.held:
        lacking &= {*exported.adapters, *exported.full}
    if lacking:
        raise ParityError(
            f"the written files lack {', '.join(sorted(lacking))}: {REPORT}"
        )


def _compare_tokenizers(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Raises ParityError: they split texts or end answers differently."""
    for name, read in (
        ("ids of texts", lambda x: x.encode_texts(TEXTS)),
        ("chat template", lambda x: x.chat_template),
        ("ids that end an answer", lambda x: sorted(x.end_ids)),
        ("id that begins a text", lambda x: x.bos if x.add_bos else None),
    ):
        if read(ours) != read(theirs):
            raise ParityError(
                f"the tokenizer in the written files has other {name} than the run: "
                f"{str(read(theirs))[:80]!r}, not {str(read(ours))[:80]!r}: {REPORT}"
            )
