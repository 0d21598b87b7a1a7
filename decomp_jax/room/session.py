"""What a reader can ask of an archive: questions as plain data in, answers as plain data and arrays out."""

import base64
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt

from decomp_jax.data.records import SliceDataset
from decomp_jax.data.schema import CHANNEL_ALIASES
from decomp_jax.errors import UserError
from decomp_jax.inference.decomposer import Decoding, Decomposer
from decomp_jax.inference.display import LESION_COLOURS, Display
from decomp_jax.inference.sketch import region_weights, sketch_latents
from decomp_jax.preparation.picture import FOREGROUND
from decomp_jax.retrieval import CodeBank, Queries, by_examples, codes, latents, relative
from decomp_jax.retrieval.queries import PATHS
from decomp_jax.room.archive import Archive
from decomp_jax.room.images import BATCH, Picture, Pictures, checked_row, drawn
from decomp_jax.room.upload import Brought

MOST_HITS = 200
MOST_EXAMPLES = 16
MOST_THUMBNAILS = 256
PATIENTS = 12
FAINT = 0.02  # what paintings have below it is no part of the body


class Answer(NamedTuple):
    """Plain data, and arrays by name."""

    data: dict[str, Any]
    arrays: dict[str, np.ndarray] = {}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as a page asks it and a session keeps it.

    Attributes:
        anatomy, lesion: images, as `Pictures.pictures` reads them; `lesion` may be {"drawing": run lengths}.
        share: of the lesion in the distance: 0 asks by anatomy alone, 1 by lesion alone.
        region: run lengths of the part of the image that counts; None for all of it.
        like, unlike: further images, for both paths.
        k: number of hits.
        other_patients: leaves out the patients of `anatomy` and `lesion`.
        one_per_patient: the nearest slice of each patient alone.
    """

    anatomy: dict | None = None
    lesion: dict | None = None
    share: float = 0.5
    region: list | None = None
    like: tuple[dict, ...] = ()
    unlike: tuple[dict, ...] = ()
    k: int = 60
    other_patients: bool = True
    one_per_patient: bool = False

    @property
    def paths(self) -> list[str]:
        return [path for path, share in zip(PATHS, (1 - self.share, self.share)) if share]

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Question":
        """Raises UserError naming the part that is none."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - fields):
            raise UserError(f"question: has the unknown part {unknown[0]!r}; parts are {', '.join(sorted(fields))}")
        question = cls(**values)

        def require(right: bool, name: str, what: str) -> None:
            if not right:
                raise UserError(f"{name}: needs {what}; ask again")

        for name in ("anatomy", "lesion"):
            require(isinstance(getattr(question, name), dict | None), name, "an image")
        for name in ("like", "unlike"):
            images = getattr(question, name)
            require(isinstance(images, list | tuple) and len(images) <= MOST_EXAMPLES
                    and all(isinstance(image, dict) for image in images), name, f"at most {MOST_EXAMPLES} images")
        _checked_share(question.share)
        require(type(question.k) is int and 0 < question.k <= MOST_HITS, "k", f"a number from 1 to {MOST_HITS}")
        for name in ("other_patients", "one_per_patient"):
            require(isinstance(getattr(question, name), bool), name, "true or false")
        require(question.share == 1 or question.anatomy is not None, "anatomy", "an image")
        require("drawing" not in (question.anatomy or {}), "anatomy", "an image, not a drawing")
        require(question.share == 0 or question.lesion is not None, "lesion", "an image or a drawing")
        return question


class Room:
    """A network, a bank and what readers bring; one thread at a time."""

    def __init__(self, decomposer: Decomposer, bank: CodeBank, dataset: SliceDataset | None, *, bank_digest: str
                 ) -> None:
        self._decomposer, self._bank, self._digest = decomposer, bank, bank_digest
        self._archive = Archive(bank.rows, bank.heights)
        self._pictures = Pictures(decomposer, bank, dataset, self._archive)
        self._brought = Brought(decomposer.settings, incomplete=self._reads_some)

    def warm_up(self) -> list[Callable[[], Any]]:
        """What lays out the bank and compiles for questions, so that the first is answered as fast as others."""
        if not len(self._bank):
            return [self.about]
        size = self._decomposer.settings.size
        first, last = {"row": 0}, {"row": len(self._bank) - 1}
        blank = {"pixels": base64.b64encode(bytes(2 * int(np.prod(self._pictures.shape)))).decode()}
        drawing = [0, size * (size // 2), 1, size, 0, size * size - size * (size // 2 + 1)]
        steps = [
            self.about,
            functools.partial(self._pictures.pictures, [{"row": row} for row in range(min(len(self._bank), BATCH))]),
            functools.partial(self.look, {"image": last}),
            functools.partial(self.look, {"image": blank}),  # one that is brought is encoded by itself
        ]
        for share in (0.0, 0.5, 1.0):
            question = {"anatomy": first, "lesion": last, "share": share}
            steps.append(functools.partial(self.ask, question))
            if not self._pictures.at_hand:  # an image that is brought is asked with otherwise than the archive's
                steps.append(functools.partial(self.ask, question | {"anatomy": blank, "lesion": blank}))
        if self._can_draw:
            steps.append(functools.partial(self.paint, {"anatomy": first, "drawing": drawing}))
            steps.append(functools.partial(self.ask, {"anatomy": first, "lesion": {"drawing": drawing}}))
        return steps

    @property
    def _can_draw(self) -> bool:
        return bool(self._decomposer.config.objective.layout.weight)

    @property
    def _reads_some(self) -> bool:
        """Whether modalities may be missing from what is brought."""
        return bool(self._decomposer.config.augment.drop_channel)

    def about(self) -> Answer:
        """What the page needs to know of network and archive."""
        return Answer(self._about)

    @functools.cached_property
    def _about(self) -> dict[str, Any]:
        settings, rows = self._decomposer.settings, self._bank.rows
        some = np.linspace(0, len(rows) - 1, min(len(rows), 32)).astype(int)
        images = self._pictures.archived(some)[0] if len(some) else np.zeros((0, *self._pictures.shape))
        images = np.where(images < FAINT, 0, images.astype(np.float32))
        displays = [Display.fit(images[..., [channel]]) for channel in range(images.shape[3])]
        return {
            "model": self._decomposer.model_digest, "bank": self._digest, "slices": len(rows),
            "patients": len(self._archive), "size": settings.size, "grid": self._decomposer.grid,
            "modalities": settings.modalities, "incomplete": self._reads_some,
            "aliases": {name: CHANNEL_ALIASES.get(name, (name.lower(),)) for name in settings.modalities},
            "pictures": settings.foreground == FOREGROUND, "classes": settings.lesion_classes,
            "colours": [LESION_COLOURS[i % len(LESION_COLOURS)] for i in range(len(settings.lesion_classes))],
            "at_hand": self._pictures.at_hand, "can_draw": self._can_draw,
            "white": [display.white for display in displays], "margin": min(display.margin for display in displays),
            "columns": self._archive.columns, "choices": self._archive.choices,
        }

    def patients(self, request: dict[str, Any]) -> Answer:
        """Patients of the archive whose id contains {"text"} and that have a slice with {"where": column: value}."""
        return Answer(self._archive.find(request))

    def slices(self, request: dict[str, Any]) -> Answer:
        """All slices of the patient of {"row"}, from the feet up."""
        rows = self._archive.slices_of(checked_row(request.get("row"), len(self._bank)))
        return Answer({"rows": rows.tolist(), "about": self._archive.describe(rows)})

    def thumbnails(self, rows: Any) -> Answer:
        """Images uint8 [n,C,S,S] and labels uint8 [n,S,S] of rows."""
        if not isinstance(rows, list) or not 0 < len(rows) <= MOST_THUMBNAILS:
            raise UserError(f"rows: needs 1 to {MOST_THUMBNAILS} numbers; ask for fewer")
        numbers = np.array([checked_row(row, len(self._bank)) for row in rows])
        images, labels = self._pictures.archived(numbers)
        return Answer({"about": self._archive.describe(numbers)}, {
            "image": _planes(images, np.uint8), "label": labels,
        })

    def look(self, request: dict[str, Any]) -> Answer:
        """What the network says of {"image"}: planes uint16 [C,S,S] of 0 to 65535, labels and codes."""
        picture, = self._pictures.pictures([_dictionary(request, "image")])
        known = picture.decomposition
        data = {"at_hand": known is not None}
        if known is None:
            decoded = self._decomposer.decode(*(picture.indices[path][None] for path in PATHS))
            known = Decoding(decoded.x_plus[0], decoded.x_minus[0], decoded.segmentation[0])
        image = known.x_plus if picture.image is None else picture.image
        planes = {"image": image, "x_minus": known.x_minus, "x_plus": known.x_plus}
        lesion = known.segmentation.argmax(-1).astype(np.uint8)
        if picture.row is not None:
            data["about"] = self._archive.describe(np.array([picture.row]))[0]
            data["row"] = picture.row
        arrays = {name: _planes(image, np.uint16) for name, image in planes.items()}
        indices = {f"{path}_codes": grid.astype(np.uint16) for path, grid in picture.indices.items()}
        return Answer(data, {**arrays, "label": picture.label, "lesion": lesion, **indices})

    def paint(self, request: dict[str, Any]) -> Answer:
        """What the network paints from the anatomy of {"anatomy"} with {"drawing"}: planes uint16 [C,S,S]."""
        picture, = self._pictures.pictures([_dictionary(request, "anatomy")])
        z_e_abnormal = self._sketch(request.get("drawing"))[None]
        z_e_normal = self._decomposer.normal_codebook[picture.indices["normal"]][None]
        abnormal = self._decomposer.quantize(z_e_normal, z_e_abnormal).abnormal_indices
        painted = self._decomposer.paint(picture.indices["normal"][None], np.asarray(abnormal, np.int32))
        return Answer({}, {"painted": _planes(painted[0], np.uint16)})

    def _sketch(self, runs: Any) -> np.ndarray:
        settings = self._decomposer.settings
        return sketch_latents(self._decomposer, drawn(runs, settings.size, len(settings.lesion_classes)))

    def ask(self, request: dict[str, Any]) -> Answer:
        """The slices nearest to a `Question`, and what each path and each cell, float32 [k,h,w], adds to a distance."""
        question = Question.of(request)
        queries, asked = self._queries(question)
        patients = sorted({str(self._bank.rows["patient_id"][row]) for row in asked if row is not None})
        exclude = np.resize(patients, (1, 2)) if question.other_patients and patients else None
        hits = self._bank.search(queries, k=question.k, exclude=exclude, one_per_patient=question.one_per_patient)
        rows = hits.rows[0][hits.rows[0] >= 0]
        why = {path: cells[0] for path, cells in self._bank.contributions(queries, rows[None]).items()}
        data = {"rows": rows.tolist(), "distances": hits.distances[0][:len(rows)].tolist(),
                "parts": {path: cells.sum((1, 2)).tolist() for path, cells in why.items()},
                "about": self._archive.describe(rows)}
        return Answer(data, {"why": sum(why.values()).astype(np.float32)})

    def _queries(self, question: Question) -> tuple[Queries, list[int | None]]:
        """The queries, and the rows of the images in the two places."""
        places = {"normal": question.anatomy, "abnormal": question.lesion}
        images = {path: places[path] for path in question.paths if "drawing" not in places[path]}
        pictures = self._pictures.pictures([*images.values(), *question.like, *question.unlike])
        asked, others = pictures[:len(images)], [_query([one], question.paths) for one in pictures[len(images):]]
        like = [_query([picture], [path]) for path, picture in zip(images, asked)]
        if len(images) < len(question.paths):
            like.append(latents(abnormal=self._sketch(question.lesion["drawing"])[None]))
        like, unlike = like + others[:len(question.like)], others[len(question.like):]
        queries = by_examples(like, unlike, weight=question.share)
        if question.region is not None:
            mask = drawn(question.region, self._decomposer.settings.size, 1) > 0
            queries = region_weights(mask, self._decomposer.grid) * queries
        return relative(queries), [picture.row for picture in asked]

    def ask_patients(self, request: dict[str, Any]) -> Answer:
        """The patients nearest to that of {"row"}, or to the scan that was brought as {"scan"}; each slice's match.

        {"share"} 0 and 1 leave out a path. "rows" are the slices asked with; of a scan there are none, but its images
        uint8 [n,C,S,S].
        """
        share = _checked_share(request.get("share", 0.5))
        if "scan" in request:
            scan, rows, exclude = self._brought.get(request["scan"]), np.zeros(0, int), []
            if not (self._bank.has_mm and np.isfinite(scan.heights).all()):
                raise UserError("patients: slices are matched by their heights in mm, which are not known here; ask by "
                                "single images")
            heights, pictures = scan.heights, self._pictures.scan(request["scan"], scan)
            shown = {"image": _planes(scan.images, np.uint8)}
        else:
            rows = self._archive.slices_of(row := checked_row(request.get("row"), len(self._bank)))
            heights, exclude = self._bank.heights[rows], [str(self._bank.rows["patient_id"][row])]
            pictures, shown = self._pictures.pictures([{"row": int(row)} for row in rows]), {}
        queries = _query(pictures, Question(share=share).paths)
        hits = self._bank.search_patients(queries, heights=heights, k=PATIENTS, exclude=exclude)
        return Answer({
            "rows": rows.tolist(), "patients": hits.patients.tolist(), "distances": hits.distances.tolist(),
            "matches": {path: matched.tolist() for path, matched in hits.matches.items()},
        }, shown)

    def bring(self, data: bytes) -> Answer:
        """Takes a scan or a picture in (see `upload`), which waits, in memory, to be asked for its slices."""
        return Answer(self._brought.take(data))

    def slice_of(self, request: dict[str, Any]) -> Answer:
        """The slice {"slice"} of what was brought as {"id"}, to be asked with: its pixels, float16 [S,S,C], and the
        abnormal latents of the slab around it, float32 [h,w,D].
        """
        slices, at = self._brought.slice_of(request.get("id"), request.get("slice"))
        slab = self._pictures.of_scan(request["id"], slices, np.array([at])).abnormal[0]
        return Answer({}, {"pixels": slices.images[at].astype("<f2"), "slab": slab.astype("<f4")})


def _checked_share(share: Any) -> float:
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise UserError("share: needs a number from 0 to 1; ask again")
    return share


def _query(pictures: Sequence[Picture], paths: Sequence[str]) -> Queries:
    """One query a picture: what the network says of it, or its codes where these alone are at hand."""
    if any(picture.decomposition is None for picture in pictures):
        return codes(**{path: np.stack([picture.indices[path] for picture in pictures]) for path in paths})
    return latents(**{path: np.stack([getattr(picture.decomposition, f"z_e_{path}") for picture in pictures])
                      for path in paths})


def _planes(image: Float[np.ndarray, "*n s s c"], kind: type[np.unsignedinteger]) -> UInt[np.ndarray, "*n c s s"]:
    """Channels apart, [0,1] on all values of a type of whole numbers."""
    return np.rint(np.iinfo(kind).max * np.moveaxis(image, -1, -3).astype(np.float32).clip(0, 1)).astype(kind)


def _dictionary(request: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(request.get(name), dict):
        raise UserError(f"{name}: needs an image; choose one")
    return request[name]
