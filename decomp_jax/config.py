"""The settings of a run. `configs/*.py` hand out ConfigDicts of these fields; programs turn them into dataclasses."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Self, get_type_hints

from ml_collections import ConfigDict

from decomp_jax.errors import UserError

REDUCTIONS = ("mean", "sum")
KINDS = {int: "a whole number", str: "text", bool: "True or False"}
LARGE = 2**31 - 1  # what device arrays count to
TINY, BELOW_1 = math.ulp(0.0), math.nextafter(1.0, 0.0)
# Setting -> least and largest value.
RANGES = {
    "model.widths": (1, LARGE),
    "model.encoder_widening": (1, LARGE),
    "model.code_dim": (1, LARGE),
    "model.codebook_size": (2, 65_536),
    "model.own_blocks": (0, LARGE),
    "model.spade_width": (1, LARGE),
    "model.nothing_threshold": (0, math.inf),
    "model.codebook_decay": (0, BELOW_1),
    "model.revive_below": (0, math.inf),
    "model.batch_norm_decay": (TINY, BELOW_1),
    "model.normal_gain": (TINY, math.inf),
    "model.output_gain": (TINY, math.inf),
    "objective.lesion_cell": (TINY, 1),
    "objective.layout.scale": (TINY, math.inf),
    "objective.layout.whole": (0, 1),
    "objective.structure.scale": (TINY, math.inf),
    "objective.structure.window": (TINY, 1),
    "objective.structure.flat": (TINY, math.inf),
    "objective.structure.pasted": (0, math.inf),
    "objective.discrimination.margin": (0, math.inf),
    "augment.flip": (0, 1),
    "augment.rotation": (0, 45),
    "augment.scale": (0, 0.5),
    "augment.transplant": (0, 1),
    "augment.foreground": (0, 1),
    "augment.least_pasted": (0, 1),
    "augment.opacity": (0, 1),
    "augment.intensity": (0, 5),
    "augment.contrast": (0, 5),
    "augment.bias": (0, 5),
    "augment.sharpness": (0, 1),
    "augment.noise": (0, 1),
    "augment.drop_channel": (0, 1),
    "data.read_threads": (1, 1024),
    "data.prefetch": (1, 1024),
    "train.steps": (1, LARGE),
    "train.epochs": (0, math.inf),
    "train.warmup_steps": (0, LARGE),
    "train.ramp_steps": (0, LARGE),
    "train.batch_size": (1, LARGE),
    "train.learning_rate": (TINY, math.inf),
    "train.final_rate": (0, 1),
    "train.revive_until": (0, 1),
    "train.seed": (0, LARGE),
    "train.population_images": (0, LARGE),
    "train.checkpoint_every": (1, LARGE),
    "train.log_every": (1, LARGE),
    "train.eval_every": (0, LARGE),
    "train.eval_slices": (1, LARGE),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
        widths: encoder channels at full, half, quarter ... resolution (Table A.1); the code grid is
            size / 2^len(widths).
        encoder_widening: the encoder has this many times `widths` channels, the decoders `widths` (1 in the paper).
        full_resolution_block: the encoder has a residual block before its first average pool (none in the paper, so
            that nothing but a linear filter sees single pixels).
        code_dim: D, channels of a code.
        codebook_size: K, codes of each codebook.
        own_blocks: last residual blocks that the abnormal path does not share with the normal one (0 in the paper).
        spade_width: hidden channels of a SPADE module are min(spade_width, C).
        spade_stop_gradient: keep image losses from training the segmentation decoder through SPADE.
        nothing_threshold: cells whose ||z_e_abnormal||^2 is at most this take code 0, a fixed zero vector that says
            "nothing here"; 0 switches the rule off, as in the paper.
        codebook_decay: decay of the moving average that updates codebooks; 0 trains them by gradient, which takes
            objective.codebook_normal and objective.codebook_abnormal.
        revive_below: codes whose moving average of use falls below this restart at an encoder output; 0 never.
        rotation_trick: what decoders teach the encoder passes quantisation rotated (Fifty et al. 2024), not straight.
        batch_norm_decay: decay of the moving statistics of batch normalisation.
        normal_gain: initial standard deviation of the last convolution before the normal z_e, in units of He's.
            At a half the normal code starts at the length that its structure has.
        output_gain: the same of the last convolution of each decoder. At He's own, the first hundreds of steps only
            shrink its output.
        dtype: compute type of the network; parameters, losses, statistics and distances are float32.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    encoder_widening: int = 1
    full_resolution_block: bool = False
    code_dim: int = 64
    codebook_size: int = 512
    own_blocks: int = 2
    spade_width: int = 128
    spade_stop_gradient: bool = False
    nothing_threshold: float = 5.0
    codebook_decay: float = 0.99
    revive_below: float = 0.1
    rotation_trick: bool = False
    batch_norm_decay: float = 0.95
    normal_gain: float = 0.5
    output_gain: float = 0.1
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Term:
    """Settings of one term of the objective (`losses/terms.py`).

    Attributes:
        weight: factor of the term in the objective, the paper's lambda; 0 removes the term and its cost.
    """

    weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class LayoutTerm(Term):
    """The lesion's layout in the abnormal z_e.

    Attributes:
        scale: length of the abnormal z_e in a cell that is all lesion.
        whole: share of its squared length that says that there is a lesion; the rest says of which class.
    """

    scale: float = 14.0
    whole: float = 0.7


@dataclasses.dataclass(frozen=True)
class StructureTerm(Term):
    """Local contrast in the normal z_e.

    Attributes:
        scale: deviation of local contrast in the channels of the normal z_e. Beside the layout's scale it decides what
            the two codes weigh where their distances are added up.
        window: deviation of the Gaussian window of local contrast, in image sides.
        flat: variance at which a window counts as without contrast.
        pasted: weight of what lies under a pasted lesion. Such cells are few, and they alone teach what a lesion hides.
    """

    scale: float = 1.0
    window: float = 1 / 16
    flat: float = 1e-3
    pasted: float = 5.0


@dataclasses.dataclass(frozen=True)
class DiscriminationTerm(Term):
    """Distance of the abnormal z_e of lesion-free images to the codes.

    Attributes:
        margin: pi of equation 3.
    """

    margin: float = 10.0


@dataclasses.dataclass(frozen=True)
class PixelTerm(Term):
    """A distance between images.

    Attributes:
        reduction: "mean" over pixels, or "sum", as the paper prints its norms.
    """

    reduction: str = "mean"


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The terms of the objective and their constants; what each of them does is in `losses/terms.py`.

    Attributes:
        lesion_cell: share of its pixels with a lesion from which a cell of the code grid counts as a lesion cell, whose
            code the abnormal path learns from. Used where there is a "nothing" code.
    """

    lesion_cell: float = 0.04
    codebook_normal: Term = Term(0.0)
    codebook_abnormal: Term = Term(0.0)
    commitment_normal: Term = Term(1.0)
    commitment_abnormal: Term = Term(0.25)
    nothing: Term = Term(1.0)
    layout: LayoutTerm = LayoutTerm(1.0)
    structure: StructureTerm = StructureTerm(4.0)
    discrimination: DiscriminationTerm = DiscriminationTerm(0.0)
    generalized_dice: Term = Term(0.0)
    soft_dice: Term = Term(5.0)
    cross_entropy: Term = Term(5.0)
    reconstruction_minus: PixelTerm = PixelTerm(1.0)
    reconstruction_plus: PixelTerm = PixelTerm(1.0)
    residual: PixelTerm = PixelTerm(1.0)

    @property
    def terms(self) -> dict[str, Term]:
        """The terms in use, those whose weight is not 0, by name."""
        terms = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: term for name, term in terms.items() if isinstance(term, Term) and term.weight}


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training image, made on the device.

    Attributes:
        flip: probability of a left-right flip.
        rotation: largest rotation, degrees, at most 45.
        scale: largest log of the scaling factor, at most 0.5.
        transplant: probability that another image's lesion is pasted in.
        foreground: intensity above which a pixel shows the body; lesions are pasted there alone.
        least_pasted: share of the image that a pasted lesion must cover, else nothing is pasted.
        opacity: least share that a pasted lesion has of a pixel; the rest is what was there.
        intensity: largest log of the gamma applied to the input (the targets keep their intensities).
        contrast: of the input, too: largest log of the factor by which pixels differ from the mean of the body.
        bias: deviation of the log of a smooth field that multiplies it.
        sharpness: largest share of means over 3x3 pixels in it; half as much is taken away from other images.
        noise: largest deviation of the noise added to it.
        drop_channel: probability that a channel of the input is 0, one of an image's always staying; above 0, images
            that lack modalities are taken wherever the network is used.
    """

    flip: float = 0.5
    rotation: float = 12.0
    scale: float = 0.12
    transplant: float = 0.5
    foreground: float = 0.04
    least_pasted: float = 6 / 64**2
    opacity: float = 0.6
    intensity: float = 0.25
    contrast: float = 0.0
    bias: float = 0.0
    sharpness: float = 0.0
    noise: float = 0.0
    drop_channel: float = 0.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the slices are and how far they are read ahead.

    Attributes:
        dir: a directory written by `python -m data_prep`.
        read_threads: batches that are read at the same time; more than a few slow each other down.
        prefetch: batches on their way to the devices.
    """

    dir: str = ""
    read_threads: int = 4
    prefetch: int = 4


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run.

    Attributes:
        steps: optimiser steps.
        epochs: passes over the training slices; where it is not 0, it sets `steps` when the run starts.
        warmup_steps: first steps, in which decoders see unquantised codes; over as many again they change to quantised
            ones (clamped to a quarter of `steps`).
        ramp_steps: linear ramp of the learning rate.
        batch_size: global batch.
        learning_rate: Adam's, at its highest: a ramp leads there, a cosine away from it.
        final_rate: share of the learning rate that the cosine ends at; 1 holds it constant.
        revive_until: share of the steps after which codebooks are no longer revived, so that codes settle.
        seed: of parameters, the order of slices and augmentation.
        population_images: training slices, as they are, whose statistics batch normalisation takes at the end and for
            validation (`training/population.py`); 0 keeps the moving averages of training.
        init_from: another run's directory, whose newest parameters this run starts from: a run of the same network, or
            of one for images of half the size (`widths` without the first), which is grown. What depends on the
            lesion classes or channels, if they are others, begins afresh.
        checkpoint_every, log_every: steps between checkpoints, and between lines of metrics.jsonl.
        eval_every: steps between validation passes; 0 for none.
        eval_slices: a validation pass takes at most so many slices, spread over the patients.
        tensorboard: the metrics and validation images for TensorBoard, too.
    """

    steps: int = 65_000
    epochs: float = 0.0
    warmup_steps: int = 1_000
    ramp_steps: int = 500
    batch_size: int = 256
    learning_rate: float = 2e-3
    final_rate: float = 0.0
    revive_until: float = 0.8
    seed: int = 0
    population_images: int = 2_048
    init_from: str = ""
    checkpoint_every: int = 1_000
    log_every: int = 50
    eval_every: int = 2_000
    eval_slices: int = 2_048
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings; the defaults are those of `configs/brats.py`."""

    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    augment: AugmentConfig = AugmentConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises UserError for a name that no field has and for values that can't be used."""
        config = _from_dict(cls, values, "config")
        _check(config)
        return config

    def replace(self, settings: Mapping[str, Any]) -> Self:
        """With other values of some settings, named as on the shell: {"model.own_blocks": 0}."""
        values = self.to_dict()
        for name, value in settings.items():
            *sections, field = name.split(".")
            section = values
            for part in sections:
                section = section[part]
            section[field] = value
        return self.from_dict(values)

    def get(self, name: str) -> Any:
        """The value of a setting, named as on the shell: "model.own_blocks"."""
        return functools.reduce(getattr, name.split("."), self)

    def with_steps(self, slices: int) -> Self:
        """With the steps of `train.epochs` passes over so many training slices, where epochs are set."""
        if not self.train.epochs:
            return self
        return self.replace({"train.steps": max(round(self.train.epochs * slices / self.train.batch_size), 1)})

    def to_config_dict(self) -> ConfigDict:
        """For `configs/*.py`: a ConfigDict whose fields the shell can override (`--config.train.steps=100`)."""
        return ConfigDict(self.to_dict())


def _from_dict(kind: type, values: Any, where: str) -> Any:
    """A dataclass of dataclasses from nested dictionaries; lists become tuples."""
    types = get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise UserError(f"--{where}={values}: holds settings ({', '.join(sorted(types))}), and is none itself")
    for name in values:
        if name not in types:
            raise UserError(f"{where}.{name}: no such setting; there are {', '.join(sorted(types))}")
    return kind(**{name: _value(types[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(kind: type, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _from_dict(kind, value, where)
    if isinstance(value, (list, tuple)) and kind == tuple[int, ...]:
        return tuple(_value(int, part, where) for part in value)
    if type(value) in (int, float) and math.isfinite(value) if kind is float else type(value) is kind:
        return value
    name = "a finite number" if kind is float else "whole numbers" if kind == tuple[int, ...] else KINDS[kind]
    raise UserError(f"--{where}={value}: must be {name}")


def _trained_one_way(config: Config) -> bool:
    """Codebooks follow either the moving average or the gradient of their losses."""
    by_gradient = [config.objective.codebook_normal.weight > 0, config.objective.codebook_abnormal.weight > 0]
    return 0 < config.model.codebook_decay < 1 and not any(by_gradient) or (
        config.model.codebook_decay == 0 and all(by_gradient)
    )


def _check(config: Config) -> None:
    for name, (low, high) in RANGES.items():
        value = config.get(name)
        if not all(low <= part <= high for part in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"--config.{name}={value}: must be {_between(low, high)}")
    for name, term in config.objective.terms.items():
        if term.weight < 0:
            raise UserError(f"--config.objective.{name}.weight={term.weight}: must be at least 0")
    for name in ("reconstruction_minus", "reconstruction_plus", "residual"):
        _require(config, f"objective.{name}.reduction", REDUCTIONS)
    _require(config, "model.dtype", ("float32", "bfloat16"))
    model = config.model
    if not model.widths:
        raise UserError("--config.model.widths: must name at least one width, such as 32,64,128")
    if model.own_blocks >= len(model.widths):
        raise UserError(f"--config.model.own_blocks={model.own_blocks}: must be below the number of widths, and "
                        f"--config.model.widths={','.join(map(str, model.widths))} are {len(model.widths)}")
    if not _trained_one_way(config):
        raise UserError(f"--config.model.codebook_decay={model.codebook_decay}: must be between 0 and 1, or 0 with "
                        "weights of objective.codebook_normal and codebook_abnormal, which a decay does without")
    if model.nothing_threshold == 0 and (config.objective.nothing.weight or config.objective.layout.weight):
        raise UserError("--config.model.nothing_threshold=0.0: must be above 0 where objective.nothing or layout have "
                        "a weight")


def _between(low: float, high: float) -> str:
    """TINY stands for 0, which is left out."""
    low_text = "above 0" if low == TINY else f"at least {low}"
    if high == BELOW_1:
        return f"{low_text} and below 1"
    return low_text if high in (LARGE, math.inf) else f"{low_text} and at most {high}"


def _require(config: Config, name: str, known: tuple[str, ...]) -> None:
    if config.get(name) not in known:
        raise UserError(f"--config.{name}={config.get(name)}: must be one of {', '.join(known)}")
