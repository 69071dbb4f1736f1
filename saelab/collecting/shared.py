"""Folders of shards that several processes write together, with the bytes that one would write.

Each process takes a run of whole batches and writes their rows to a part, a hidden folder of its own that is resumed
like any other. Then the parts become the folder's shards. A part's shards begin where those of the folder do if the
number of rows before it is known beforehand, and are then put in place as they are; shards with rows of several files
are written again. The manifest lists them in the end.
"""

import os
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic

from saelab.collecting.writers import PARTS, ArrayBuffer, claim_folder, remove_parts, shard_name
from saelab.stores.files import save_tensors, write_atomic
from saelab.stores.manifest import AnyManifest, FeatureManifest, Manifest, Shard
from saelab.training.ranks import RankGrid, Steps, run_together


def claim_together(
    folder: Path,
    request: dict[str, Any],
    kind: type[AnyManifest],
    begin: Callable[[], AnyManifest],
    resume: bool,
    ranks: RankGrid,
    stack: ExitStack,
) -> AnyManifest:
    """The manifest of a folder that the first process claims for all, until the stack is closed; see `claim_folder`.

    Args:
        folder: folder to write to.
        request: arguments that determine the folder's contents.
        kind: class of the manifest.
        begin: makes the manifest of a new folder; called in the first process.
        resume: continue or open what the folder holds; False replaces it.
        ranks: the processes.
        stack: holds the folder.

    Raises:
        ValueError: as `claim_folder`, in all processes; where they have different arguments or releases, or do not see
            the same folder.
    """
    if ranks.alone:
        return stack.enter_context(claim_folder(folder, request, kind, begin, resume))
    ranks.require_equal({"folder": str(folder), "resume": resume, **request})

    def claim() -> str:
        manifest = stack.enter_context(claim_folder(folder, request, kind, begin, resume, ranks.size))
        return "" if manifest.complete else "unfinished"

    if ranks.on_first(claim):
        ranks.require_shared(folder)
    with ranks.together():
        return kind.load(folder)


@dataclass(frozen=True, eq=False)
class SharedFolder(Generic[AnyManifest]):
    """An unfinished folder that several processes write, and this process's part of it."""

    folder: Path
    manifest: AnyManifest
    """as `claim_together` returned it; shards that one process wrote before are kept"""
    ranks: RankGrid
    n_items: int
    """number of sequences (or other items of the source)"""
    size: int
    """items per batch"""
    shard_tokens: int
    """rows per shard"""

    @property
    def share(self) -> range:
        """The items whose rows this process writes: a run of whole batches."""
        n_batches = -(-self.n_items // self.size)
        start, stop = (i * n_batches // self.ranks.size * self.size for i in (self.ranks.index, self.ranks.index + 1))
        stop = min(stop, self.n_items)
        return range(min(max(start, self.manifest.next_seq), stop), stop)

    @property
    def part(self) -> Path:
        """Folder of this process's part."""
        return self._parts[self.ranks.index]

    @property
    def _parts(self) -> list[Path]:
        return [self.folder / f"{PARTS}{self.ranks.size}" / f"{i}" for i in range(self.ranks.size)]

    @contextmanager
    def claim_part(self) -> Iterator[AnyManifest]:
        """Context that holds the folder of this process's part, and its manifest; see `claim_folder`."""
        before, first = self.manifest, self.share.start
        place = {"part": self.ranks.index, "parts": self.ranks.size, "rows_before": before.n_tokens}
        blank: dict[str, Any] = {"n_entries": 0} if isinstance(before, FeatureManifest) else {}
        fresh = replace(
            before,
            request=before.request | place,
            shards=(),
            next_seq=first,
            skip_rows=before.skip_rows if first == before.next_seq else 0,
            removed={},
            **blank,
        )
        with claim_folder(self.part, fresh.request, type(before), lambda: fresh, resume=True) as manifest:
            yield manifest

    def first_tokens(self, count_rows: Callable[[int, int], int | None]) -> int:
        """Rows of the first shard of this process's part, so that its next one begins where one of the folder does.

        Args:
            count_rows: number of rows of the items from a first one up to another; None where that is not known before
                they are read, and a full shard is returned.
        """
        begun, start = self.manifest.next_seq, self.share.start
        n_before: int | None = self.manifest.n_tokens
        if start > begun:
            n_between = count_rows(begun, start)
            n_before = None if n_between is None else self.manifest.n_tokens + n_between - self.manifest.skip_rows
        return self.shard_tokens - (n_before or 0) % self.shard_tokens

    def join(self, buffer: ArrayBuffer) -> AnyManifest:
        """Make the folder's shards of all parts, every process some of them.

        Returns the manifest that lists them, which is not written yet.
        """
        with self.ranks.together():
            parts = [type(self.manifest).load_complete(part) for part in self._parts]
        made: dict[int, Shard] = {}
        run_together(self._make_shards(parts, buffer, made), self.ranks)
        told = self.ranks.gather_json([(i, asdict(shard)) for i, shard in made.items()])
        shards = {i: Shard(**shard) for part in told for i, shard in part}
        removed = Counter(self.manifest.removed)
        for part in parts:
            removed.update(part.removed)
        return replace(
            self.manifest,
            shards=(*self.manifest.shards, *(shards[i] for i in sorted(shards))),
            next_seq=self.n_items,
            skip_rows=0,
            removed=dict(removed),
        )

    def finish(self, manifest: AnyManifest) -> None:
        """Write the finished manifest, and delete the parts; for the first process."""
        manifest.check_shards(self.folder)
        manifest.save(self.folder)
        remove_parts(self.folder)

    def _make_shards(self, parts: Sequence[Manifest], buffer: ArrayBuffer, made: dict[int, Shard]) -> Steps:
        """Make every n-th shard and add it to `made`, a shard per step."""
        files = [file for part, folder in zip(parts, self._parts, strict=True) for file in part.check_shards(folder)]
        shards = [shard for part in parts for shard in part.shards]
        starts = [0, *accumulate(shard.n_tokens for shard in shards)]
        for i in range(self.ranks.index, -(-starts[-1] // self.shard_tokens), self.ranks.size):
            start, stop = i * self.shard_tokens, min((i + 1) * self.shard_tokens, starts[-1])
            target = self.folder / shard_name(len(self.manifest.shards) + i)
            first, last = bisect_right(starts, start) - 1, bisect_left(starts, stop)
            if (start, stop) == (starts[first], starts[first + 1]):
                _put(files[first].path, target)
                crc32 = shards[first].crc32
            else:
                for j in range(first, last):
                    buffer.add(files[j], max(start - starts[j], 0), min(stop, starts[j + 1]) - starts[j])
                    files[j].release()
                crc32 = save_tensors(target, buffer.take())
            made[i] = Shard(file=target.name, n_tokens=stop - start, crc32=crc32)
            yield


def _put(source: Path, target: Path) -> None:
    """Give a finished file a second name, or copy it where the disk has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        write_atomic(target, source.read_bytes())
