"""Every moment at which the power may fail: file operations, recorded and replayed.

A `Recorder` watches a folder while a program writes into it. It sees each call of
`os.fsync`, `os.rename`, `os.replace`, `os.mkdir`, `os.unlink`, `os.remove` and
`os.rmdir` by any Python code. It infers the rest by comparing the folder before and
after each of these calls: new files and changed bytes, and all that C++ and Rust do
(TensorStore, safetensors). A sync outside Python is not seen: bytes that our code does
not sync count as lost, even where TensorStore has synced them.

`crash_states` replays every prefix of the operations on a model of a disk:

- A kill keeps everything, since the kernel has it.
- A power loss keeps the bytes of a file as of its last sync. Later bytes are whole,
  missing, torn in half, or zeros.
- It keeps the names in a folder as of the last sync of that folder. Later names are all
  there, all missing, or (`by_folder`) there in one folder alone.
"""

import contextlib
import dataclasses
import os
import shutil
import threading
import time
from pathlib import Path
from unittest import mock

RACY = 50e6  # nanoseconds in which a second write may leave the time as it was


@dataclasses.dataclass
class Node:
    """A file (bytes) or a folder (nodes by name): as it is, and as a sync left it."""

    now: bytes | dict
    safe: bytes | dict


class Recorder:
    """Records what happens below the folder `top`, as calls on the model of a disk."""

    def __init__(self, top):
        self.top, self.log = Path(top), []
        self._lock = threading.RLock()
        self._known = {".": (os.stat(top).st_ino, 0, None)}
        self._names, self._count = {".": 0}, 1
        self._compare()
        for path in self._names:  # All that is there at the start is safe.
            self._record(path, "sync", self._names[path])
        self.begun = len(self.log)

    def __enter__(self):
        self._patches = contextlib.ExitStack()
        for name in ("mkdir", "unlink", "remove", "rmdir"):
            self._patch(name, self._around)
        for name in ("rename", "replace"):
            self._patch(name, self._move)
        self._patch("fsync", self._sync)
        return self

    def __exit__(self, *_):
        self._patches.close()
        self._compare()

    def mark(self, promise):
        """From now on the program promises this, whatever happens."""
        with self._lock:
            self._compare()
            self.log.append((f"mark {promise}", "mark", (promise,)))

    def _patch(self, name, instead):
        call = getattr(os, name)

        def seen(*args, **options):
            with self._lock:
                return instead(call, *args, **options)

        self._patches.enter_context(mock.patch.object(os, name, seen))

    def _record(self, where, operation, *args):
        self.log.append((f"{operation} {where}", operation, args))

    def _around(self, call, *args, **options):
        self._compare()
        try:
            return call(*args, **options)
        finally:
            self._compare()

    def _move(self, call, source, target, **options):
        self._compare()
        call(source, target, **options)
        old, new = self._inside(source), self._inside(target)
        if old is None or new is None:
            return self._compare()
        for known in (self._known, self._names):
            for path in [p for p in known if p == new or p.startswith(f"{new}/")]:
                del known[path]
            for path in [p for p in known if p == old or p.startswith(f"{old}/")]:
                known[new + path[len(old) :]] = known.pop(path)
        self._record(f"{old} -> {new}", "move", *self._place(old), *self._place(new))

    def _inside(self, path):
        path = os.path.relpath(path, self.top)
        return None if path.startswith("..") else path

    def _sync(self, call, file):
        self._compare()
        found = os.fstat(file)
        for path, (inode, _, _) in self._known.items():
            if inode == found.st_ino:  # No real sync: the tests meet no power loss.
                self._record(path, "sync", self._names[path])

    def _place(self, path):
        folder, name = os.path.split(path)
        return self._names[folder or "."], name

    def _compare(self):
        """Records what has changed since the last look."""
        with self._lock:
            found = self._look()
            for path in sorted(self._known.keys() - found.keys(), reverse=True):
                self._record(path, "unlink", *self._place(path))
                del self._names[path]
            for path in sorted(found):
                inode, _, content = found[path]
                before = self._known.get(path)
                new = before is None or before[0] != inode
                if new:
                    self._names[path] = self._count
                    self._count += 1
                    self._record(path, "make", self._names[path], content is None)
                if content is not None and (new or before[2] != content):
                    self._record(path, "write", self._names[path], content)
                if new:
                    self._record(path, "link", *self._place(path), self._names[path])
            self._known = found

    def _look(self):
        """(inode, time, bytes or None for a folder) of everything, by path."""
        found = {".": self._known["."]}
        for folder, folders, files in os.walk(self.top):
            for name in (*folders, *files):
                full = os.path.join(folder, name)
                path = os.path.relpath(full, self.top)
                with contextlib.suppress(FileNotFoundError):  # Another thread's.
                    stat = os.lstat(full)
                    stamp, content = (stat.st_mtime_ns, stat.st_size), None
                    if name in files:
                        known = self._known.get(path, (None, None, None))
                        fresh = time.time_ns() - stat.st_mtime_ns < RACY
                        same = known[:2] == (stat.st_ino, stamp) and not fresh
                        content = known[2] if same else Path(full).read_bytes()
                    found[path] = (stat.st_ino, stamp, content)
        return {p: x for p, x in found.items() if (os.path.dirname(p) or ".") in found}


class Disk:
    """A disk: all that it holds now, and the part that would outlive a power loss."""

    def __init__(self):
        self.nodes, self.promises = {0: Node({}, {})}, ()

    def make(self, node, is_folder):
        self.nodes[node] = Node({}, {}) if is_folder else Node(b"", b"")

    def write(self, node, content):
        self.nodes[node].now = content

    def link(self, folder, name, node):
        self.nodes[folder].now[name] = node

    def unlink(self, folder, name):
        del self.nodes[folder].now[name]

    def move(self, folder, name, to_folder, to_name):
        self.nodes[to_folder].now[to_name] = self.nodes[folder].now.pop(name)

    def sync(self, node):
        content = self.nodes[node].now
        self.nodes[node].safe = dict(content) if isinstance(content, dict) else content

    def mark(self, promise):
        self.promises += (promise,)

    def unsafe_folders(self):
        return [
            n
            for n, node in self.nodes.items()
            if isinstance(node.now, dict) and node.now != node.safe
        ]

    def after(self, keeps_names, bytes_left, number=0, prefix=""):
        """Bytes by path (None for folders), as a power loss leaves them.

        Args:
          keeps_names: whether a folder, by its number, has the names it has now.
          bytes_left: `bytes_left(now, safe)` of a file that was written since its sync.
        """
        folder, tree = self.nodes[number], {}
        names = folder.now if keeps_names(number) else folder.safe
        for name, inner in sorted(names.items()):
            node = self.nodes[inner]
            if isinstance(node.now, dict):
                tree[prefix + name] = None
                tree |= self.after(keeps_names, bytes_left, inner, f"{prefix}{name}/")
            else:
                is_safe = node.now == node.safe
                content = node.now if is_safe else bytes_left(node.now, node.safe)
                tree[prefix + name] = content
        return tree


def _begun(now, safe):
    """The part of a file that a sync has covered, where it has only grown since."""
    return len(safe) if now.startswith(safe) else 0


LEFT = {
    "whole": lambda now, safe: now,
    "missing": lambda now, safe: safe,
    "torn": lambda now, safe: now[: (_begun(now, safe) + len(now)) // 2],
    "zeros": lambda now, safe: now[: _begun(now, safe)].ljust(len(now), b"\0"),
}
NAMES = {"all names": lambda node: True, "synced names": lambda node: False}


@dataclasses.dataclass(frozen=True)
class CrashState:
    """A folder after a crash.

    Attributes:
      what: the last operation, and what of the unsynced is left.
      promises: all that the program had promised by then.
      tree: bytes by path; None for folders.
    """

    what: str
    promises: tuple
    tree: dict

    def put_back(self, top):
        """Makes the folder `top` hold this state, and nothing else."""
        for path in sorted(top.rglob("*"), reverse=True):  # Files before folders.
            kept = self.tree.get(path.relative_to(top).as_posix(), "no")
            if path.is_dir() and kept is not None:
                shutil.rmtree(path)
            elif not path.is_dir() and not isinstance(kept, bytes):
                path.unlink()
        for name, content in self.tree.items():  # Folders before files.
            path = top / name
            if content is None:
                path.mkdir(exist_ok=True)
            elif not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


def crash_states(recorder, *, by_folder=False):
    """Every state that a crash may leave, once for each set of promises.

    Args:
      by_folder: also those in which one folder alone has its unsynced names.
    """
    disk, seen = Disk(), set()
    for index, (what, operation, args) in enumerate(recorder.log):
        getattr(disk, operation)(*args)
        if index + 1 < recorder.begun:
            continue
        kept = dict(NAMES)
        if by_folder:
            for folder in disk.unsafe_folders():
                kept[f"names of folder {folder}"] = folder.__eq__
        for names, keeps_names in kept.items():
            for left, bytes_left in LEFT.items():
                tree = disk.after(keeps_names, bytes_left)
                key = hash((disk.promises, tuple(tree.items())))
                if key not in seen:
                    seen.add(key)
                    yield CrashState(f"{what}; {names}, {left}", disk.promises, tree)
