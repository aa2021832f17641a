"""Measuring choices of bits with workers, each choice once: results are remembered, and kept in a checkpoint file.

A checkpoint is JSON lines: first {"problem": digest}, then one {"state", "bits", "losses", "changes",
"hits"} a choice. Floats are written
so that they read back the same; a last line that was cut off by an interruption is left out.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mptqc.analysis.bit_variables import Bits
from mptqc.analysis.sensitivity import Measured, Problem, measure
from mptqc.errors import OutputError, RecipeError
from mptqc.runtime.executors import Place, Workers

Key = tuple[Bits, Bits]
"""The state of the search, and the choice that was measured."""


class Scorer:
    """score(state, choices) -> what each choice of bits does; `state` is where the search is, near them all.

    Attributes:
        measured: how many choices were run, not remembered.
    """

    def __init__(self, problem: Problem, place: Place, checkpoint: Path | None = None) -> None:
        self._workers = Workers(place, problem)
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint, problem.digest)
        self._known: dict[Key, Measured] = {} if self._checkpoint is None else self._checkpoint.read()
        self.measured = 0

    def __call__(self, state: Bits, choices: Sequence[Bits]) -> list[Measured]:
        """Measure what is not known yet.

        Raises:
            ExecutorError: workers were lost again and again.
        """
        keys = [(state, bits) for bits in choices]
        unknown = [key for key in dict.fromkeys(keys) if key not in self._known]
        for key, found in zip(unknown, self._workers.map(measure, unknown), strict=True):
            self._known[key] = found
            self.measured += 1
            if self._checkpoint is not None:
                self._checkpoint.add(key, found)
        return [self._known[key] for key in keys]


class Checkpoint:
    """A file of what was measured for one problem."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path = path
        self._digest = digest

    def read(self) -> dict[Key, Measured]:
        """What the file holds; a new file holds nothing.

        Raises:
            RecipeError: it belongs to another model, recipe or other samples, or is no checkpoint.
            OutputError: it cannot be read or written.
        """
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            if not lines:
                self._path.write_text(json.dumps({"problem": self._digest}) + "\n", encoding="utf-8")
                return {}
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"the checkpoint {self._path} cannot be used: {error}") from error
        records = _whole(lines)
        if not records or records[0].get("problem") != self._digest:
            raise RecipeError(
                f"the checkpoint {self._path} belongs to another search (model, recipe and calibration images must be "
                "the same); remove it, or give another path"
            )
        if len(records) < len(lines):  # what was cut off must not run into the next record
            text = "".join(f"{line}\n" for line in lines[: len(records)])
            self._path.write_text(text, encoding="utf-8")
        return {(_bits(record["state"]), _bits(record["bits"])): _measured(record) for record in records[1:]}

    def add(self, key: Key, found: Measured) -> None:
        """Append one choice."""
        hits = None if found.hits is None else found.hits.astype(int).tolist()
        state, bits = ("".join(map(str, one)) for one in key)
        figures = {"losses": found.losses.tolist(), "changes": found.changes.tolist(), "hits": hits}
        record = {"state": state, "bits": bits, **figures}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _whole(lines: Sequence[str]) -> list[dict[str, object]]:
    """Records up to the first line that is none."""
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def _bits(text: object) -> Bits:
    return tuple(int(digit) for digit in str(text))


def _measured(record: dict[str, object]) -> Measured:
    hits = record["hits"]
    losses, changes = (np.array(record[name], np.float64) for name in ("losses", "changes"))
    return Measured(losses, changes, None if hits is None else np.array(hits, np.bool_))
