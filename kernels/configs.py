"""Block sizes of the attention kernels, for a GPU, a dtype, a head dimension and a pair of windows.

The first of these sources that has the problem is used: what `savl kernels tune` stored for the user on a GPU of this
name, what the package ships for a GPU of this name, and the rule of `default_config`, which works well on every
architecture without a search. While a network runs, block sizes are only looked up.

Tuned block sizes are stored in JSON files, one for each name of a GPU. A file that cannot be used causes a warning and
has no other effect. This module needs neither torch nor Triton.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tokenize
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from savl.kernels.targets import Architecture

STAGES = ("forward", "backward_qkv", "backward_q", "backward_kv", "backward_bias")
"""Names of the kernels that have block sizes."""


@dataclass(frozen=True)
class KernelConfig:
    """Block sizes of one kernel, and how it is launched."""

    block_m: int
    """Queries in a tile, a power of two ≥ 16."""
    block_n: int
    """Keys in a tile, a power of two ≥ 16."""
    warps: int
    """Number of warps of a program: 1, 2, 4 or 8."""
    stages: int
    """Depth of the software pipeline over tiles."""


Size = int | tuple[int, int]
"""Height and width in pixels; an int for both."""


def as_pair(size: Size) -> tuple[int, int]:
    """Return height and width."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class Problem:
    """Dtype and shapes that the best block sizes depend on."""

    dtype: str
    """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
    head_dim: int
    window: Size
    """Height and width of the windows of queries in pixels. Of squares an int, also where a pair is given."""
    key_window: Size
    """Height and width of the windows of keys, like ``window``."""
    bias: str = "table"
    """``"table"``, ``"dense"`` or ``"none"``."""
    cosine: bool = False
    """Whether the similarity is the cosine."""

    def __post_init__(self) -> None:
        for name in ("window", "key_window"):
            height, width = as_pair(getattr(self, name))
            object.__setattr__(self, name, height if height == width else (height, width))

    @property
    def queries(self) -> int:
        """Number of pixels of a window."""
        return prod(as_pair(self.window))

    @property
    def keys(self) -> int:
        """Number of keys of a window."""
        return prod(as_pair(self.key_window))

    @property
    def plain(self) -> bool:
        """Whether the kernels need no more registers than for the networks: square windows, a table, no cosine."""
        square = isinstance(self.window, int) and isinstance(self.key_window, int) and self.key_window >= self.window
        return square and self.bias == "table" and not self.cosine

    @property
    def block_d(self) -> int:
        """Head dimension, padded by the kernels to a power of two of at least 16."""
        return max(16, 1 << (self.head_dim - 1).bit_length())


def stages_of(problem: Problem, architecture: Architecture) -> tuple[str, ...]:
    """Return the `STAGES` that a forward and a backward pass run, in this order.

    ``backward_qkv`` computes what ``backward_q`` and ``backward_kv`` compute together, with five products instead of
    seven and a third of the instructions. It runs where it spills no register: on Hopper, whose tensor cores read
    operands from shared memory. Large windows need all registers of a thread, so that nothing else may need any: tails
    of tiles, head dimensions that are not loaded in units of 16 bytes, the float32 factors of float16, and traits
    beyond `Problem.plain`.

    Args:
        problem: The problem.
        architecture: Architecture of the GPU.
    """
    small = problem.queries <= 64
    lean = problem.queries in (128, 256) and problem.dtype == "bfloat16" and problem.head_dim % 8 == 0
    serves = problem.window == problem.key_window and problem.plain and problem.dtype != "float32"
    together = serves and problem.block_d <= 32 and (small or lean) and architecture[0] == 9
    backward = ("backward_qkv",) if together else ("backward_q", "backward_kv")
    return ("forward", *backward, *(("backward_bias",) if problem.bias != "none" else ()))


def default_config(stage: str, problem: Problem, architecture: Architecture) -> KernelConfig:
    """Return block sizes by the rule for a GPU.

    Args:
        stage: One of `STAGES`.
        problem: The problem.
        architecture: Architecture of the GPU.
    """
    if stage == "backward_qkv":  # where `stages_of` has it, whatever the GPU
        keys = min(64, _covering(problem.keys))
        return (
            KernelConfig(128, keys, 8, 1)
            if problem.queries > 64
            else KernelConfig(_covering(problem.queries), keys, 4, 1)
        )
    if isinstance(architecture, str):
        return amd_config(stage, problem, architecture)
    return nvidia_config(stage, problem, architecture)


def nvidia_config(stage: str, problem: Problem, capability: tuple[int, int]) -> KernelConfig:
    """Return block sizes by rule: the largest tiles that spill no register and fit two programs per multiprocessor.

    There is one pipeline stage: k and v of a window are small and come from the L2 cache, and the other programs of the
    multiprocessor hide that latency. A second stage adds instructions and shared memory. There are many rows per warp
    because each program loads all keys of its window. On Hopper a program of `forward` has 8 warps, which fit twice
    into the registers; 4 warps take 8 % fewer instructions per score, but only 12 of them fit.
    `python -m savl.kernels.machine_code` counts both, and `savl kernels tune` tries more.

    Args:
        stage: One of `STAGES`.
        problem: The problem.
        capability: Compute capability of the GPU, such as (9, 0).
    """
    # Hopper and data-centre Blackwell keep operands of products in shared or tensor memory, not in registers.
    generation, roomy = capability[0], capability[0] in (9, 10)
    if problem.dtype == "float32":
        if problem.block_d <= 32:
            m, n, warps = {
                # On sm_86 and sm_89, 32×64 spills two registers with windows of 16×16, and 32×32 with those of 8×8.
                "forward": (32, 32, 4) if problem.queries > 64 and capability in ((8, 6), (8, 9)) else (32, 64, 8),
                "backward_q": (32, 32, 4),
                "backward_kv": (32, 32, 8),
                "backward_bias": (16, 32, 4),
            }[stage]
        elif problem.block_d <= 64:
            m, n, warps = (16, 16, 4) if stage == "backward_bias" else (32, 32, 8)
        else:
            m, n, warps = 16, 16, 8 if stage in ("forward", "backward_q") or problem.cosine else 4
    elif problem.block_d <= 32:
        warps = 4
        if stage == "forward":
            # Rows that are not whole vectors of 16 bytes take registers, with which only one program of 8 warps fits.
            large = generation == 9 and problem.plain and problem.queries > 64 and problem.head_dim % 8 == 0
            m, n, warps = (128, 64, 8) if large else (128, 32, 4) if generation == 10 else (64, 64, 4)
        elif stage == "backward_q":
            m, n = 128, 32
        elif stage == "backward_kv":
            # Overlapping windows add selects to the sums, and square tiles match the shape of their keys better.
            wide = problem.dtype == "float16" and problem.head_dim % 8 != 0  # float32 factors, many small loads
            m, n = (64, 64) if roomy and problem.window != problem.key_window else (32, 128) if roomy else (32, 64)
            n = 64 if wide else n
        else:
            m, n = (64, 32) if generation == 12 else (64, 64)
        if not problem.plain:
            m, n = {
                "forward": (64, 64 if generation in (9, 12) else 32),
                "backward_q": (64, 32),
                "backward_kv": (32, 64),
                "backward_bias": (64, 32),
            }[stage]
    elif problem.block_d <= 64:
        m = 64 if stage == "forward" else 16 if stage == "backward_q" and problem.cosine else 32
        m = 16 if stage == "backward_bias" and not problem.plain else m
        n, warps = 16 if stage == "backward_kv" and problem.cosine else 32, 4
    elif problem.cosine:
        m, n, warps = 16, 16, 8
    else:
        m = 16 if stage == "backward_q" or not problem.plain and stage != "forward" else 32
        n, warps = 16 if stage == "backward_kv" else 32, 4
    return KernelConfig(min(m, _covering(problem.queries)), min(n, _covering(problem.keys)), warps, 1)


def amd_config(stage: str, problem: Problem, architecture: str) -> KernelConfig:
    """Return block sizes for a GPU of AMD by rule: tiles that need no scratch memory and fit two programs per unit.

    A compute unit of CDNA gives a thread twice as many registers as one of RDNA, which also multiplies float32 without
    matrix instructions: the operands of such products, which float16 tensors have too, lie in registers.

    Args:
        stage: One of `STAGES`.
        problem: The problem.
        architecture: A key of `savl.kernels.targets.AMD`.
    """
    warps = 4
    if problem.block_d > 32:
        m, n, warps = 16, 16, 8
    elif architecture.startswith("gfx9"):
        wide = problem.dtype == "float32"
        m, n = {
            "forward": (32, 32) if wide else (64, 64),
            "backward_q": (32, 32) if wide else (64, 32),
            "backward_kv": (16, 32) if wide else (32, 32),
            "backward_bias": (32, 32) if wide else (64, 32),
        }[stage]
    else:
        wide = problem.dtype != "bfloat16"
        m, n = {
            "forward": (16, 16) if wide else (64, 32),
            "backward_q": (16, 16) if wide else (32, 32),
            "backward_kv": (16, 16) if wide else (16, 32),
            "backward_bias": (16, 16) if wide else (32, 32),
        }[stage]
    return KernelConfig(min(m, _covering(problem.queries)), min(n, _covering(problem.keys)), warps, 1)


def _covering(pixels: int) -> int:
    """Return the smallest power of two that is at least the number of pixels and at least 16."""
    return max(16, 1 << (pixels - 1).bit_length())


# Tuned block sizes

CACHE_VARIABLE = "SAVL_CACHE_DIR"
FORMAT = 1
"""Version of the file format."""
TUNED_HERE, SHIPPED, RULE = "tuned here", "shipped", "rule"
"""Sources of block sizes."""
SHIPPED_FOLDER = Path(__file__).with_name("tuned")

_DTYPES = ("float32", "bfloat16", "float16")
_BIASES = ("table", "dense", "none")


@dataclass(frozen=True)
class Tuned:
    """Result of one search."""

    stage: str
    problem: Problem
    config: KernelConfig
    microseconds: float
    """Median time of the kernel with these block sizes."""
    rule_microseconds: float
    """Median time with the block sizes of `default_config`."""
    kernels: str
    """`kernels_hash` of the measured kernels."""
    triton: str
    """Version of the Triton that compiled them."""
    date: str
    """Day of the search, such as ``"2026-01-31"``."""


@dataclass(frozen=True)
class Store:
    """Content of the file of one GPU."""

    path: Path
    tuned: Mapping[tuple[str, Problem], Tuned] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    """Why parts of the file cannot be used."""
    unusable: bool = False
    """Whether no part can be used: the file has another format or is of another GPU."""


def config_for(
    stage: str, problem: Problem, gpu_name: str | None, architecture: Architecture
) -> tuple[KernelConfig, str]:
    """Look up the block sizes of a kernel. The files of a GPU are read once, and every answer is cached.

    Args:
        stage: One of `STAGES`.
        problem: The problem.
        gpu_name: Name that the driver gives; None for no particular GPU.
        architecture: Its architecture.

    Returns:
        The block sizes and where they come from: `TUNED_HERE`, `SHIPPED` or `RULE`.
    """
    found: tuple[KernelConfig, str] = _config_for(stage, problem, gpu_name, architecture)
    return found


@cache
def _config_for(
    stage: str, problem: Problem, gpu_name: str | None, architecture: Architecture
) -> tuple[KernelConfig, str]:
    if gpu_name is not None:
        for source, store in stores(gpu_name):
            if (entry := store.tuned.get((stage, problem))) is not None:
                return entry.config, source
    return default_config(stage, problem, architecture), RULE


@cache
def stores(gpu_name: str) -> tuple[tuple[str, Store], ...]:
    """Return the files of a GPU with their sources, in order of precedence; warn about what cannot be used.

    Args:
        gpu_name: Name that the driver gives.
    """
    found = []
    for source, folder in ((TUNED_HERE, user_folder()), (SHIPPED, SHIPPED_FOLDER)):
        if folder is None:
            continue
        store = read_store(folder / file_name(gpu_name), gpu_name)
        if store is None:
            continue
        found.append((source, store))
        if store.ignored:
            more = f" (and {len(store.ignored) - 1} more)" if len(store.ignored) > 1 else ""
            warnings.warn(
                f"{store.path}: {store.ignored[0]}{more}; the kernels run with other block sizes, "
                "`savl kernels tune` measures again",
                RuntimeWarning,
                stacklevel=2,
            )
    return tuple(found)


def user_folder() -> Path | None:
    """Return the folder that `savl kernels tune` stores files in; None without a home folder.

    It is ``kernels`` in SAVL_CACHE_DIR, else in ``savl`` in XDG_CACHE_HOME, else in ``~/.cache/savl``.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named) / "kernels"
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # as the XDG specification wants it
        try:
            caches = Path.home() / ".cache"
        except RuntimeError:
            return None
    return caches / "savl" / "kernels"


def file_name(gpu_name: str) -> str:
    """Return the name of the file of a GPU, such as ``nvidia-h100-80gb-hbm3.json``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json"


ATTENTION_FILES = ("attention", "attention_backward", "attention_backward_bias", "attention_backward_joint", "tiles")
"""Files in this folder that decide the machine code of the attention kernels."""


@cache
def kernels_hash() -> str:
    """Return the `code_hash` of the installed attention kernels."""
    return code_hash(*(Path(__file__).with_name(f"{name}.py") for name in ATTENTION_FILES))


def code_hash(*paths: Path) -> str:
    """Return 16 hexadecimal digits that depend on the code of Python files, not on comments, docstrings, line breaks.

    Args:
        paths: The files.
    """
    digest = hashlib.sha256()
    for path in paths:
        _add_code(digest, path)
    return digest.hexdigest()[:16]


def _add_code(digest: hashlib._Hash, path: Path) -> None:
    line_begins = True
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            if token.type in (tokenize.INDENT, tokenize.DEDENT):
                digest.update(b">" if token.type == tokenize.INDENT else b"<")
                continue
            if not (line_begins and token.type == tokenize.STRING):  # a docstring
                digest.update(token.string.strip().encode() + b"\0")
            line_begins = token.type == tokenize.NEWLINE


def read_store(path: Path, gpu_name: str) -> Store | None:
    """Read a file; None if there is none. Every other problem is reported in `Store.ignored`.

    Args:
        path: The file.
        gpu_name: The GPU that the file must be of.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        here = kernels_hash()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError, tokenize.TokenError) as error:
        return _unusable(path, f"it cannot be read ({type(error).__name__}: {error})")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        version = content.get("format") if isinstance(content, dict) else None
        return _unusable(path, f"its format must be {FORMAT}, got {version!r}")
    if content.get("gpu") != gpu_name:
        return _unusable(path, f"its gpu must be {gpu_name!r}, got {content.get('gpu')!r}")
    entries = content.get("configs")
    if not isinstance(entries, list):
        return _unusable(path, f"its configs must be a list, got {type(entries).__name__}")
    tuned: dict[tuple[str, Problem], Tuned] = {}
    ignored: dict[str, int] = {}
    for number, values in enumerate(entries):
        try:
            entry = _entry(values)
        except ValueError as error:
            ignored[f"configs[{number}]: {error}"] = 1
            continue
        if entry.kernels == here:
            tuned[entry.stage, entry.problem] = entry
        else:
            reason = f"tuned for other kernels ({entry.kernels}, these are {here})"
            ignored[reason] = ignored.get(reason, 0) + 1
    reasons = tuple(reason if count == 1 else f"{count} entries {reason}" for reason, count in ignored.items())
    return Store(path, tuned, reasons)


def dump_store(gpu_name: str, entries: Iterable[Tuned]) -> bytes:
    """Return the content of a file for `read_store`.

    Args:
        gpu_name: The GPU.
        entries: Results of searches.
    """
    listed = []
    for entry in sorted(entries, key=lambda each: (str(each.problem), STAGES.index(each.stage))):
        values = asdict(entry)
        listed.append({"stage": values.pop("stage"), **values.pop("problem"), **values.pop("config"), **values})
    lines = ",\n".join(f"  {json.dumps(values)}" for values in listed)  # one entry a line, for readable diffs
    return f'{{\n "format": {FORMAT},\n "gpu": {json.dumps(gpu_name)},\n "configs": [\n{lines}\n ]\n}}\n'.encode()


def forget() -> None:
    """Clear the caches, so that the files are read again."""
    stores.cache_clear()
    _config_for.cache_clear()


def _unusable(path: Path, reason: str) -> Store:
    return Store(path, ignored=(reason,), unusable=True)


def _entry(values: Any) -> Tuned:
    """Return one entry of a file. Raise ValueError where a value is missing or no kernel can run with it."""
    if not isinstance(values, dict):
        raise ValueError(f"must be an object, got {type(values).__name__}")

    def number(name: str, accepted: Iterable[int] | None = None) -> int:
        value = values.get(name)
        if type(value) is not int or value < 1 or (accepted is not None and value not in accepted):
            raise ValueError(f"{name} must be {_one_of(accepted) if accepted else 'a positive int'}, got {value!r}")
        return value

    def text(name: str, accepted: Iterable[str] | None = None) -> str:
        value = values.get(name)
        if not isinstance(value, str) or (accepted is not None and value not in accepted):
            raise ValueError(f"{name} must be {_one_of(accepted) if accepted else 'a string'}, got {value!r}")
        return value

    def duration(name: str) -> float:
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        return float(value)

    def size(name: str) -> Size:
        value = values.get(name)
        sides = value if isinstance(value, list) else [value, value]
        if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
            raise ValueError(f"{name} must be a positive int or a list of two, got {value!r}")
        return sides[0], sides[1]

    def flag(name: str) -> bool:
        value = values.get(name, False)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be a bool, got {value!r}")
        return value

    blocks = (16, 32, 64, 128, 256)
    return Tuned(
        text("stage", STAGES),
        Problem(
            text("dtype", _DTYPES),
            number("head_dim"),
            size("window"),
            size("key_window"),
            text("bias", _BIASES) if "bias" in values else "table",
            flag("cosine"),
        ),
        KernelConfig(
            number("block_m", blocks),
            number("block_n", blocks),
            number("warps", (1, 2, 4, 8)),
            number("stages", range(1, 9)),
        ),
        duration("microseconds"),
        duration("rule_microseconds"),
        text("kernels"),
        text("triton"),
        text("date"),
    )


def _one_of(accepted: Iterable[object]) -> str:
    return f"one of {', '.join(map(repr, accepted))}"
