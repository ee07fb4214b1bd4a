"""The hidden folder beside an output that keeps the encoded frames until all of them are there.

A segment is one file with the packets of a fixed number of frames. It is written atomically, so that after a crash or
Ctrl-C every segment is complete or missing, and a later run continues with the first one that is missing. The folder
also stores the settings of the run; segments of other settings are not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from savl.atomic_write import name_beginning, write_atomically

FRAMES_PER_SEGMENT = 50
"""Few enough that a slow computer loses little work; many enough that the key frame of each costs little space."""

SETTINGS = "settings.json"


@dataclass(frozen=True)
class PacketRecord:
    """An encoded frame.

    Attributes:
        pts: Time at which it is shown.
        duration: How long it is shown; 0 if unknown.
        is_keyframe: Whether decoding can begin here.
        data: The bytes.
    """

    pts: int
    duration: int
    is_keyframe: bool
    data: bytes


@dataclass(frozen=True)
class Segment:
    """The packets of consecutive frames, in the order of decoding.

    Attributes:
        frames: Number of frames.
        extradata: Headers of the codec, the same in all segments of a video.
        packets: The packets.
    """

    frames: int
    extradata: bytes
    packets: tuple[PacketRecord, ...]

    def to_bytes(self) -> bytes:
        """Return the content of the file: one line of JSON, and the data of all packets."""
        data = b"".join(packet.data for packet in self.packets)
        head = {
            "frames": self.frames,
            "extradata": self.extradata.hex(),
            "packets": [[each.pts, each.duration, each.is_keyframe, len(each.data)] for each in self.packets],
            "crc": zlib.crc32(data),
        }
        return json.dumps(head).encode() + b"\n" + data

    @staticmethod
    def from_bytes(content: bytes) -> Segment:
        """Return the segment that a file contains.

        Raises:
            ValueError: The content is not that of a segment.
        """
        line, _, data = content.partition(b"\n")
        try:
            head = json.loads(line)
            packets, start = [], 0
            for pts, duration, is_keyframe, size in head["packets"]:
                packets.append(PacketRecord(pts, duration, is_keyframe, data[start : start + size]))
                start += size
            if start != len(data) or head["crc"] != zlib.crc32(data):
                raise ValueError("the data are incomplete")
            return Segment(head["frames"], bytes.fromhex(head["extradata"]), tuple(packets))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no segment: {error}") from error


class SegmentFolder:
    """The folder with the finished segments of an output.

    Attributes:
        path: The folder.
        changed: Names of the settings by which an earlier run differed, whose segments were removed; empty if there
            was no such run.
        frames: Number of frames in finished segments.
        count: Number of finished segments.
    """

    def __init__(self, target: Path, settings: dict[str, object]) -> None:
        """Find the segments of an earlier run with the same settings, or begin anew.

        Args:
            target: The output.
            settings: Everything on which the encoded frames depend, as values that JSON stores.

        Raises:
            OSError: The folder cannot be created or written.
        """
        self.path = segment_folder(target)
        settings = json.loads(json.dumps(settings))
        self.changed: tuple[str, ...] = ()
        self.frames = self.count = 0
        earlier = self._earlier_settings()
        if earlier is not None and earlier != settings:
            names = earlier.keys() | settings.keys()
            self.changed = tuple(sorted(name for name in names if earlier.get(name) != settings.get(name)))
        if earlier != settings:
            self.remove()
        self.path.mkdir(exist_ok=True)
        if earlier != settings:
            write_atomically(self.path / SETTINGS, json.dumps(settings, indent=1).encode())
        while (segment := self._read(self.count)) is not None:
            self.frames += segment.frames
            self.count += 1

    def append(self, segment: Segment) -> None:
        """Write the next segment.

        Raises:
            OSError: The disk is full, or the folder is gone.
        """
        write_atomically(self._file(self.count), segment.to_bytes())
        self.count += 1
        self.frames += segment.frames

    def segments(self) -> Iterator[Segment]:
        """Yield the finished segments; one of them is in memory at a time."""
        for number in range(self.count):
            segment = self._read(number)
            if segment is None:
                raise FileNotFoundError(f"{self._file(number)} has disappeared or was changed")
            yield segment

    def remove(self) -> None:
        """Remove the folder with all segments, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)

    def remove_if_empty(self) -> None:
        """Remove the folder if it contains no finished segment."""
        if self.count == 0:
            self.remove()

    def _earlier_settings(self) -> dict[str, object] | None:
        try:
            found = json.loads((self.path / SETTINGS).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}.segment"

    def _read(self, number: int) -> Segment | None:
        try:
            return Segment.from_bytes(self._file(number).read_bytes())
        except (OSError, ValueError):
            return None


def segment_folder(target: Path) -> Path:
    """Return the path of the folder for an output; all symbolic links to an output have the same one."""
    place = Path(os.path.realpath(target))
    # As for lock files: the checksum tells long names apart that begin alike.
    return place.with_name(f".{name_beginning(place.name)}.{zlib.crc32(os.fsencode(place.name)):08x}.segments")
