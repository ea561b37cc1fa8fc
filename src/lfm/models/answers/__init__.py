"""What a model told, kept: a directory of answers, which reloads as a model that gives Answers and nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core.errors import CorruptError, MismatchError
from lfm.core.heavy import np
from lfm.core.interfaces import Answers
from lfm.core.model import Facts, Model
from lfm.models.answers.codec import Code, decode
from lfm.models.answers.shards import AGAIN, KEY, Shards, bin_of, entries, index_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

MANIFEST = "answers.json"
CODE = "code.bin"

FORMAT = 2


@final
class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Whose answers these are, to how many questions, at how many places; k of V each. facts: of the teacher, those
    that decide whom it can teach. code, shards: sha256 of the code and of each shard's index, which has its bytes' own
    sums. digest: sha256 of all of this but the teacher's name, by which the answers are known."""

    format: int = FORMAT
    teacher: str
    teacher_digest: str
    facts: dict[str, Any]
    k: int
    vocabulary: int
    questions: int
    places: int
    bytes: int
    code: str
    shards: tuple[str, ...]
    digest: str = ""


@final
class KeptAnswers:
    """The answers in a directory."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self.manifest = directory, manifest

    @property
    def k(self) -> int:
        return self.manifest.k

    def __len__(self) -> int:
        return self.manifest.questions

    @cached_property
    def shards(self) -> Shards:
        return Shards(self._directory, len(self.manifest.shards))

    @cached_property
    def code(self) -> Code:
        return read_code(self._directory / CODE, self.manifest.k, self.manifest.vocabulary)

    def find(self, questions: Sequence[bytes]) -> NDArray[Any]:
        numbers = self.shards.find(questions)
        assert self.code.k == self.k  # read now, as what follows
        for number in np.unique(numbers[numbers >= 0]).tolist():
            self.shards.read(number)  # damage is told of now, and not in the middle of a training
        return numbers

    def told(self, numbers: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """As Answers says; ids int32, log-probabilities fp32."""
        found = [decode(self.code, self.shards.read(n), int(self.shards.entries[n]["places"])) for n in numbers]
        if not found:
            return np.empty((0, self.k), np.int32), np.empty((0, self.k), np.float32)
        return np.concatenate([ids for ids, _ in found]), np.concatenate([told for _, told in found])


def write_code(code: Code, file: Path) -> None:
    """k, how many buckets there are, their bits, and the ids by weight: int32, little-endian."""
    whole = np.concatenate([[code.k, len(code.bits)], code.bits, code.order]).astype("<i4").tobytes()
    part = file.with_name(f".{file.name}.part")
    with part.open("wb") as opened:
        opened.write(whole)
        opened.flush()
        os.fsync(opened.fileno())
    part.replace(file)


def read_code(file: Path, k: int, vocabulary: int) -> Code:
    """CorruptError where it is not one for k of so many ids: bytes are read by it without another look."""
    try:
        raw = np.frombuffer(file.read_bytes(), "<i4")
        kept, buckets = int(raw[0]), int(raw[1])
        bits, order = raw[2 : 2 + buckets].astype(np.int64), raw[2 + buckets :].astype(np.int32)
        sound = kept == k and sorted(order.tolist()) == list(range(vocabulary)) and (1 << bits).sum() == vocabulary
    except (OSError, ValueError, IndexError) as error:
        raise CorruptError(f"{file} cannot be read", why=str(error)) from None
    if not sound:
        raise CorruptError(
            f"{file} is no code for {k} of {vocabulary} ids", why=f"{MANIFEST} tells of these", fix=AGAIN
        )
    return Code(k, order, bits)


def manifest_of(directory: Path, teacher: str, digest: str, facts: Facts, k: int, vocabulary: int) -> Manifest:
    """What is to be said of the shards and the code that lie in a directory."""
    count = 0
    while index_of(directory, count).exists():
        count += 1
    indices = [index_of(directory, number) for number in range(count)]
    found = [entries(file) for file in indices]
    decisive = {"task": facts.task, "vocabulary": facts.vocabulary, "vocabulary_digest": facts.vocabulary_digest}
    told = Manifest(
        teacher=teacher,
        teacher_digest=digest,
        facts={**decisive, "labels": list(facts.labels), "context": facts.context},
        k=k,
        vocabulary=vocabulary,
        questions=sum(len(part) for part in found),
        places=int(sum(part["places"].sum() for part in found)),
        bytes=int(sum(part["bytes"].sum() for part in found)),
        code=_sum(directory / CODE),
        shards=tuple(_sum(file) for file in indices),
    )
    return msgspec.structs.replace(told, digest=_known_by(told))


def model_of(directory: Path, manifest: Manifest, ref: str = "") -> Model:
    """The model that answers in a directory are; it writes them to another, without a second copy where it can."""
    facts = Facts(bytes=manifest.bytes, **{**manifest.facts, "labels": tuple(manifest.facts["labels"])})
    return Model(
        ref=ref or str(directory),
        kind="answers",
        gives={Answers: lambda: KeptAnswers(directory, manifest)},
        identify=lambda: _digest(directory, manifest),
        formats={"answers": partial(_write, directory, manifest)},
        look=lambda: facts,
        hint=f"what {manifest.teacher} told of {manifest.questions} records",
    )


def open_answers(directory: Path) -> Model:
    """The answers in a directory. CorruptError where its manifest cannot be read, is of another format, or not as
    it was written."""
    path = directory / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, OSError) as error:
        raise CorruptError(f"{path} does not describe answers", why=str(error), fix=AGAIN) from None
    if manifest.format != FORMAT:
        raise CorruptError(
            f"{path} is of format {manifest.format}",
            why=f"this lfm reads format {FORMAT}",
            fix="another version of lfm",
        )
    if manifest.digest != _known_by(manifest):
        raise CorruptError(
            f"{path} is not as it was written",
            why=f"its digest is {_known_by(manifest)[:12]}, and {manifest.digest[:12] or 'none'} is written there",
            fix=AGAIN,
        )
    return model_of(directory, manifest)


def files_of(directory: Path, manifest: Manifest) -> list[Path]:
    """All files of the answers in a directory but the manifest."""
    numbers = range(len(manifest.shards))
    return [directory / CODE, *(f(directory, number) for number in numbers for f in (bin_of, index_of))]


def _write(directory: Path, manifest: Manifest, out: Path) -> None:
    for file in files_of(directory, manifest):
        try:
            (out / file.name).hardlink_to(file)
        except OSError:  # another disk
            shutil.copyfile(file, out / file.name)
    told = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (out / MANIFEST).write_bytes(told + b"\n")


def _digest(directory: Path, manifest: Manifest) -> str:
    """The manifest's. MismatchError where the files are not those it tells of."""
    for file, wanted in zip((directory / CODE, *(index_of(directory, i) for i in range(len(manifest.shards)))),
                            (manifest.code, *manifest.shards), strict=True):  # fmt: skip
        if not file.is_file() or _sum(file) != wanted:
            why = "its sha256 is another" if file.is_file() else "there is no such file"
            raise MismatchError(f"{file} is not what {MANIFEST} says", why=why, fix=AGAIN)
    return manifest.digest


def _known_by(manifest: Manifest) -> str:
    nameless = msgspec.structs.replace(manifest, teacher="", digest="")
    return hashlib.sha256(msgspec.json.encode(nameless, order="deterministic")).hexdigest()


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


__all__ = ["CODE", "KEY", "MANIFEST", "KeptAnswers", "Manifest", "manifest_of", "model_of", "open_answers"]
