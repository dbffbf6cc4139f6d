"""Rows are tokenised once, by content; a failure loses one unit at most."""

import collections
import dataclasses
import json
import threading

import pytest
from tiny_model import make_tiny_model

from research.config.run_config import Config, DataConfig, TextConfig
from research.core.errors import UserError
from research.data.instructions import instruction_dataset, row_cache
from research.data.instructions.instruction_dataset import load_dataset
from research.tasks.instruction_tuning import InstructionTask
from research.tasks.row_preview import PreviewRow
from research.tokenize.chat_template import ChatFormat
from research.tokenize.tokenizer import from_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return from_folder(make_tiny_model(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture
def chat(tokenizer):
    return ChatFormat(tokenizer, "dolly")


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(row_cache, "UNIT_ROWS", 4)


def rows_of(count, first=0):
    return [
        {"instruction": f"Say {i}", "response": f"It is {i}.", "category": "ab"[i % 2]}
        for i in range(first, first + count)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path), seq_len=64, held_out=2)


def contents(data):
    """All that a run can see of a data set."""
    sides = [
        [(d.ids.tolist(), d.trained.tolist(), d.group) for d in side.documents]
        + [[side.documents.where(i) for i in range(len(side.documents))], side.rows]
        for side in (data.train, data.held_out)
    ]
    return sides, data.counts, data.held_out_records, data.sample, data.examples


def never(*_, **__):
    raise AssertionError("rows are read again")


def test_the_second_start_reads_no_row_and_sees_the_same(tmp_path, chat, monkeypatch):
    rows = [*rows_of(21), {"instruction": "long", "response": "x" * 500, "id": 5}]
    config = write_rows(tmp_path / "rows.jsonl", rows)
    text = TextConfig(cache_dir=str(tmp_path / "cache"))
    first = contents(load_dataset(config, 0, chat, text))
    assert first[1].dropped == {"too long": 1} and first[1].total == 22
    assert list(first[1].unused) == ["id"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "rows.jsonl").rename(moved / "rows.jsonl")
    monkeypatch.setattr(instruction_dataset, "load_rows", never)
    again = dataclasses.replace(config, path=str(moved / "rows.jsonl"), batch_size=3)
    assert contents(load_dataset(again, 0, chat, text)) == first
    other = load_dataset(again, 1, chat, text)  # Only the packing has a seed.
    assert other.train.rows != first[0][0][-1] and other.counts == first[1]


def test_whatever_changes_ids_or_the_split_makes_another_cache(
    tmp_path, chat, tokenizer, monkeypatch
):
    config = write_rows(tmp_path / "rows.jsonl", rows_of(12))
    text = TextConfig(cache_dir=str(tmp_path / "cache"))
    load_dataset(config, 0, chat, text)
    monkeypatch.setattr(instruction_dataset, "load_rows", never)
    load_dataset(config, 0, chat, text)
    replace = dataclasses.replace
    others = [
        (replace(config, seq_len=65), 0, chat),
        (replace(config, held_out=3), 0, chat),
        (replace(config, max_rows=8), 0, chat),
        (replace(config, overlength="drop"), 0, chat),
        (replace(config, edition=1), 0, chat),
        (replace(config, eval_path=config.path), 0, chat),
        (config, 0, ChatFormat(tokenizer, "chat")),
        (config, 0, ChatFormat(tokenizer, "dolly", "Be brief.")),
        (config, 0, ChatFormat(tokenizer.within(tokenizer.largest_id + 9), "chat")),
    ]
    for changed, seed, form in others:
        with pytest.raises(AssertionError, match="read again"):
            load_dataset(changed, seed, form, text)
    write_rows(tmp_path / "rows.jsonl", rows_of(12, first=1))
    with pytest.raises(AssertionError, match="read again"):
        load_dataset(config, 0, chat, text)


def test_a_build_that_fails_keeps_its_units_and_only_the_rest_is_made(
    tmp_path, chat, monkeypatch
):
    config = write_rows(tmp_path / "rows.jsonl", rows_of(30))
    text = TextConfig(cache_dir=str(tmp_path / "cache"))
    expected = contents(
        load_dataset(config, 0, chat, TextConfig(cache_dir=str(tmp_path / "whole")))
    )
    encode, made = chat.encode_each, []

    def failing(records):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(len(records))
        return encode(records)

    monkeypatch.setattr(chat, "encode_each", failing)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(config, 0, chat, text)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("cache/rows/*/train*")}
    assert len(kept) == 6 and made == [4, 4, 4]
    monkeypatch.setattr(chat, "encode_each", lambda r: made.append(len(r)) or encode(r))
    assert contents(load_dataset(config, 0, chat, text)) == expected
    assert made[3:] == [4, 4, 4, 4, 2]
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_unit_is_made_again(tmp_path, chat, harm, caplog):
    config = write_rows(tmp_path / "rows.jsonl", rows_of(20))
    text = TextConfig(cache_dir=str(tmp_path / "cache"))
    expected = contents(load_dataset(config, 0, chat, text))
    file = next(tmp_path.glob("cache/rows/*/train-000001.u32"))
    file.write_bytes(file.read_bytes()[:-4]) if harm == "cut" else file.unlink()
    assert contents(load_dataset(config, 0, chat, text)) == expected
    assert "train-000001.u32" in caplog.text and "made again" in caplog.text


def test_one_of_several_builds_and_the_others_find_it_finished(
    tmp_path, tokenizer, monkeypatch
):
    config = write_rows(tmp_path / "rows.jsonl", rows_of(40))
    text = TextConfig(cache_dir=str(tmp_path / "cache"))
    load_rows, builds, found = instruction_dataset.load_rows, [], []

    def counted(*arguments):
        builds.append(arguments)
        return load_rows(*arguments)

    monkeypatch.setattr(instruction_dataset, "load_rows", counted)

    def start():
        form = ChatFormat(tokenizer, "dolly")
        found.append(contents(load_dataset(config, 0, form, text)))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(found) == 3
    assert found[0] == found[1] == found[2]


def test_rows_that_change_while_they_are_read_are_refused(tmp_path, chat, monkeypatch):
    config = write_rows(tmp_path / "rows.jsonl", rows_of(12))
    draw = instruction_dataset.draw

    def meanwhile(*arguments):
        write_rows(tmp_path / "rows.jsonl", rows_of(12, first=5))
        return draw(*arguments)

    monkeypatch.setattr(instruction_dataset, "draw", meanwhile)
    text = TextConfig(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"rows\.jsonl:\d+ has changed while"):
        load_dataset(config, 0, chat, text)


def test_a_cache_that_cannot_be_written_costs_no_run_unless_it_was_named(
    tmp_path, chat, monkeypatch, caplog
):
    config = write_rows(tmp_path / "rows.jsonl", rows_of(12))
    (tmp_path / "file").write_text("")
    named = TextConfig(cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written.*text\.cache_dir="):
        load_dataset(config, 0, chat, named)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    data = load_dataset(config, 0, chat, TextConfig())
    assert data.counts.total == 12 and "there is no cache" in caplog.text


def test_a_row_that_the_template_refuses_is_named_by_file_and_line(tmp_path, tokenizer):
    picky = "{{ raise_exception('no cats') if '/cat' in messages[0].content }}"
    template = picky + tokenizer.chat_template
    chat = ChatFormat(tokenizer.with_chat_template(template), "chat")
    rows = rows_of(12)
    rows[6]["instruction"] = "A /cat?"
    config = write_rows(tmp_path / "some.jsonl", rows)
    text = TextConfig(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^some\.jsonl:7: .*no cats.*bad_lines=skip"):
        load_dataset(config, 0, chat, text)
    skips = dataclasses.replace(config, bad_lines="skip")
    found = load_dataset(skips, 0, chat, text)
    assert found.counts.dropped == {"refused by the template": 1}
    assert found.examples[0].startswith("some.jsonl:7: the model's chat template")
    assert found.examples[0].count("some.jsonl") == 1


def mixed_rows(count):
    for i in range(count):
        yield [
            {"instruction": f"Say {i}", "response": f"It is {i}."},
            {"prompt": f"Write {i}", "completion": f"{i}!"},
            {"messages": [{"role": "user", "content": f"{i}?"},
                          {"role": "assistant", "content": f"{i} it is"}]},
        ][i % 3]  # fmt: skip


def test_rows_of_each_schema_are_shown_where_there_are_several(tmp_path, tokenizer):
    write_rows(tmp_path / "rows.jsonl", mixed_rows(18))
    data = DataConfig(
        path=str(tmp_path / "rows.jsonl"), seq_len=64, held_out=2, template="dolly"
    )
    config = Config(data=data, text=TextConfig(cache_dir=str(tmp_path / "cache")))
    for _ in range(2):  # From the rows, and from the cache.
        task = InstructionTask(config, tokenizer, 512)
        packed, shown = [], collections.defaultdict(list)
        for row in task.preview(2):
            (shown[row.schema] if row.schema else packed).append(row)
        assert len(packed) == 2 and len(shown) == 3
        for schema, rows in shown.items():
            documents = [document for (document,) in (row.documents for row in rows)]
            lines = [int(document.where.partition(":")[2]) for document in documents]
            assert len(lines) == 3 and lines == sorted(lines)
            assert len({line % 3 for line in lines}) == 1, schema
            for line, document in zip(lines, documents, strict=True):
                assert str(line - 1) in document.spans[-1].text
                assert document.spans[-1].trained
    assert [PreviewRow.from_json(dataclasses.asdict(row)) for row in rows] == rows
    plain = dataclasses.replace(data, path=str(tmp_path / "plain.jsonl"))
    write_rows(tmp_path / "plain.jsonl", rows_of(9))
    task = InstructionTask(dataclasses.replace(config, data=plain), tokenizer, 512)
    assert not any(row.schema for row in task.preview(2))


@pytest.mark.parametrize("long, warns", [(0, False), (1, False), (4, True)])
def test_a_user_should_look_where_many_rows_are_dropped(
    tmp_path, tokenizer, long, warns
):
    cut = [{"instruction": "x", "response": "y" * 100} for _ in range(long)]
    write_rows(tmp_path / "rows.jsonl", [*rows_of(30), *cut])
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), seq_len=64, template="dolly")
    config = Config(data=data, text=TextConfig(cache_dir=str(tmp_path / "cache")))
    findings = InstructionTask(config, tokenizer, 512).examine()
    (dropped,) = (finding for finding in findings if finding.name == "dropped")
    assert dropped.ok and dropped.warns == warns
    assert dropped.numbers.get("too long", 0) == long
    assert ("larger config.data.seq_len" in dropped.text) == bool(long)


def test_without_held_out_rows_all_are_trained(tmp_path, chat):
    """By its own size, nine rows hold out none; ten hold out one."""
    text = TextConfig(cache_dir=str(tmp_path / "cache"))
    for count, held_out, held in ((12, 0.0, 0), (9, -1.0, 0), (10, -1.0, 1)):
        config = write_rows(tmp_path / "rows.jsonl", rows_of(count))
        config = dataclasses.replace(config, held_out=held_out)
        for _ in ("built", "cached"):
            data = load_dataset(config, 0, chat, text)
            assert len(data.train.documents) == count - held
            assert len(data.held_out_records) == len(data.held_out.documents) == held
            batches = list(instruction_dataset.eval_batches(data.held_out, 4))
            assert len(batches) == held
