"""Opens the tokenizer that `config.text.tokenizer` names, or makes it first."""

import bisect
import collections
import importlib.metadata
import itertools
import logging
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from research.config.data_knobs import DataConfig, TextConfig
from research.core.atomic_files import publish_folder
from research.core.errors import UserError, nearest
from research.core.hub_access import HubAddress, fetch_files, is_hub
from research.core.local_paths import local_path, no_such
from research.data.text.document_readers import SourceFile, TextSource
from research.data.text.row_layout import is_held_out
from research.data.text.source_fingerprint import cache_folder, cannot_write, source_key
from research.data.text.text_dataset import with_share
from research.data.text.text_sources import open_sources
from research.tokenize.tokenizer import Tokenizer, from_file, from_folder
from research.tokenize.tokenizer_training import (
    SMALLEST,
    byte_tokenizer,
    save_tokenizer,
    train_bpe,
)

FORMAT = 1
# More text hardly changes the merges of a vocabulary of usual size.
TRAINING_BYTES = 64 << 20
MEASURED_BYTES = 4 << 20
FEWEST_STEPS = 64
HUB_FILES = ["tokenizer*", "*.model", "special_tokens_map.json", "*.jinja", "*.txt"]


def open_tokenizer(text: TextConfig, data: DataConfig) -> Tokenizer:
    """Opens the tokenizer of `text.tokenizer`.

    A BPE is trained on the training side of `text.sources` and kept in the cache
    folder, where the next run with the same text finds it.

    Raises:
      UserError: there is no such tokenizer, or it cannot be read or trained.
    """
    asked = text.tokenizer
    kind, _, size = asked.partition(":")
    if asked == "byte":
        return byte_tokenizer()
    if kind == "bpe":
        return _open_bpe(text, data, _vocabulary(asked, size))
    if is_hub(asked):
        return from_folder(_fetched(asked, data.hub_timeout))
    path = local_path(asked, "config.text.tokenizer", "model")
    if path.is_file():
        return from_file(path)
    if path.is_dir():
        return from_folder(path)
    raise no_such(
        f"config.text.tokenizer={asked}{nearest(asked, ('byte', 'bpe:4096'))}", path,
        "give byte, bpe:SIZE, a tokenizer.json, a folder or hub://owner/name[@revision]",
    )  # fmt: skip


def make_tokenizer(
    text: TextConfig, data: DataConfig, size: int, out: str
) -> Iterator[tuple[str, int, int]]:
    """Trains a BPE on the sources of `text`, and writes it into the folder `out`.

    Yields:
      Name, bytes and tokens of each source, over at most `MEASURED_BYTES`.

    Raises:
      UserError: a source cannot be read, or the folder cannot be written.
    """
    sources = open_sources(text, data)
    share = with_share(text, sources).held_out_share
    made = train_bpe(training_texts(sources, share), size)
    _tell_if_smaller(made, size)
    folder = local_path(out).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _keep(made, folder)
    for source in sources:
        read = tokens = 0
        for text in sample_texts(source, MEASURED_BYTES, share):
            read += len(text.encode())
            tokens += len(made.encode_texts([text])[0])
        yield source.name, read, max(tokens, 1)


def _vocabulary(asked: str, size: str) -> int:
    if not size.isascii() or not size.isdigit() or int(size) < SMALLEST:
        raise UserError(
            f"config.text.tokenizer is {asked!r}; the size in bpe:SIZE must be a "
            f"number of at least {SMALLEST}: 256 bytes and the end of a document"
        )
    return int(size)


def _open_bpe(text: TextConfig, data: DataConfig, size: int) -> Tokenizer:
    cache = cache_folder(text)
    sources = open_sources(text, data)
    text = with_share(text, sources)
    settings = {
        "format": FORMAT,
        "size": size,
        "bytes": TRAINING_BYTES,
        "held_out_share": text.held_out_share,
        "library": importlib.metadata.version("tokenizers"),
    }
    for source in sources:
        settings["sources"] = source_key(source, cache, settings)
    folder = cache / "tokenizers" / f"bpe{size}-{settings['sources'][:16]}"
    if not folder.is_dir():
        begun = time.monotonic()
        logging.info("text: training a tokenizer of %d ids", size)
        texts = training_texts(sources, text.held_out_share)
        made = train_bpe(texts, size)
        _keep(made, folder)
        logging.info(
            "text: tokenizer of %d ids trained in %.1f s, kept in %s",
            made.vocab_size, time.monotonic() - begun, folder,
        )  # fmt: skip
    opened = from_folder(folder)
    _tell_if_smaller(opened, size)
    return opened


def _tell_if_smaller(made: Tokenizer, size: int) -> None:
    if made.vocab_size < size:
        logging.warning(
            "text: the tokenizer has %d ids and not %d: there is too little text to "
            "train more",
            made.vocab_size, size,
        )  # fmt: skip


def _keep(tokenizer: Tokenizer, folder: Path) -> None:
    """Saves it so that others see all or nothing; the first of two writers wins."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        save_tokenizer(tokenizer, temporary)
        publish_folder(temporary, folder)
    except OSError as error:
        if not folder.is_dir():
            raise cannot_write(folder.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def training_texts(
    sources: Iterable[TextSource], held_out_share: float
) -> Iterator[str]:
    """Up to `TRAINING_BYTES` of training text, from all over the sources.

    Raises:
      UserError: there is no text at all.
    """
    sources = list(sources)
    found = False
    for source in sources:
        room = TRAINING_BYTES // len(sources)
        for piece in sample_texts(source, room, held_out_share):
            found = True
            yield piece
    if not found:
        raise UserError(
            f"{', '.join(f'{s.name}={s.where}' for s in sources)} has no text to train "
            "a tokenizer on; give other config.text.sources"
        )


def sample_texts(source: TextSource, room: int, held_out_share: float) -> Iterator[str]:
    """At most about `room` letters of training text, from all over a source."""
    own = 0.0
    for item, part in _parts(source.files, room):
        # A file that is shorter than its part leaves the rest to the next one.
        own += part
        for text in _training_pieces(source, item, held_out_share):
            if own < 1:
                break
            yield text[: int(own)]
            own -= len(text[: int(own)])


def _parts(files: Sequence[SourceFile], room: int) -> list[tuple[SourceFile, float]]:
    """Files at equal steps of bytes, and how much text to take from each."""
    ends = list(itertools.accumulate(item.size for item in files))
    total = ends[-1]
    if total <= room:
        parts = [item.size / total if total else 1 / len(files) for item in files]
        return [(i, room * part) for i, part in zip(files, parts, strict=True)]
    count = max(len(files) * room // total, FEWEST_STEPS)
    hits = collections.Counter(
        bisect.bisect_right(ends, k * total // count) for k in range(count)
    )
    return [(files[i], room * n / count) for i, n in sorted(hits.items())]


def _training_pieces(
    source: TextSource, item: SourceFile, share: float
) -> Iterator[str]:
    held = False
    for piece in source.read([item]):
        held = is_held_out(piece, share) if piece.starts else held
        if not held:
            yield piece.text


def _fetched(asked: str, timeout: float) -> Path:
    """Fetches only the tokenizer's files from the hub, or finds them in its cache."""
    try:
        return fetch_files(
            HubAddress.parse(asked, "model"),
            timeout,
            HUB_FILES,
            lambda folder: (
                "" if (folder / "tokenizer.json").is_file() else "tokenizer.json"
            ),
        )
    except ConnectionError as error:
        raise UserError(
            f"tokenizer {asked} cannot be fetched ({error}); check its name and "
            "revision, or give a local folder as config.text.tokenizer"
        ) from error
