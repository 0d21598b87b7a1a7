"""The settings of a run. `configs/*.py` hand out ConfigDicts of these fields; programs turn them at once into dataclasses."""

import dataclasses
from typing import Any, Self, get_type_hints

from ml_collections import ConfigDict

from decomp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
        widths: encoder channels at full, half, quarter ... resolution (Table A.1); the code grid is size / 2^len(widths).
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
            weights.codebook_normal and weights.codebook_abnormal.
        revive_below: codes whose moving average of use falls below this restart at an encoder output; 0 never.
        rotation_trick: what decoders teach the encoder passes quantisation rotated (Fifty et al. 2024), not straight.
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
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weight of each term of the objective; 0 removes the term and its cost. The paper's lambdas, one a term.

    Attributes:
        codebook_normal, codebook_abnormal: draw codes to z_e (equation 1; with codebook_decay=0 alone).
        commitment_normal, commitment_abnormal: draw z_e to codes (equation 1).
        nothing: draws the abnormal z_e of lesion-free cells to 0.
        layout: draws the abnormal z_e of lesion cells to the lesion's share of the cell, of it all and of each class.
        structure: draws the normal z_e to the local contrast of the lesion-free image.
        discrimination: keeps abnormal z_e of lesion-free images off the lesion codes (equation 3).
        generalized_dice, soft_dice, cross_entropy: of the segmentation (equation 4; ours; equation 5).
        reconstruction_minus, reconstruction_plus: of the paintings without the lesion and with it (equations 7 and 8).
        residual: keeps the two paintings alike outside the lesion (equation 10).
    """

    codebook_normal: float = 0.0
    codebook_abnormal: float = 0.0
    commitment_normal: float = 1.0
    commitment_abnormal: float = 0.25
    nothing: float = 1.0
    layout: float = 1.0
    structure: float = 4.0
    discrimination: float = 0.0
    generalized_dice: float = 0.0
    soft_dice: float = 5.0
    cross_entropy: float = 5.0
    reconstruction_minus: float = 1.0
    reconstruction_plus: float = 1.0
    residual: float = 1.0


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training image, made on the device.

    Attributes:
        flip: probability of a left-right flip.
        rotation: largest rotation, degrees.
        scale: largest log of the scaling factor.
        transplant: probability that another image's lesion is pasted in.
        intensity: largest log of the gamma applied to the input (the targets keep their intensities).
    """

    flip: float = 0.5
    rotation: float = 12.0
    scale: float = 0.12
    transplant: float = 0.5
    intensity: float = 0.25


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
        warmup_steps: first steps, in which decoders see unquantised codes; over as many again they change to quantised
            ones (clamped to a quarter of `steps`).
        ramp_steps: linear ramp of the learning rate.
        batch_size: global batch.
        learning_rate: Adam's, at its highest: a ramp leads there, a cosine away from it.
        final_rate: share of the learning rate that the cosine ends at; 1 holds it constant.
        margin: pi, the threshold of the discrimination term (Appendix D).
        revive_until: share of the steps after which codebooks are no longer revived, so that codes settle.
        seed: of parameters, the order of slices and augmentation.
        init_from: another run's directory, whose newest parameters this run starts from.
        checkpoint_every, log_every: steps between checkpoints, and between lines of metrics.jsonl.
        eval_every: steps between validation passes; 0 for none.
        eval_slices: a validation pass takes at most so many slices, spread over the patients.
        tensorboard: the metrics and validation images for TensorBoard, too.
    """

    steps: int = 69_000
    warmup_steps: int = 1_000
    ramp_steps: int = 500
    batch_size: int = 240
    learning_rate: float = 2e-3
    final_rate: float = 0.0
    margin: float = 10.0
    revive_until: float = 0.8
    seed: int = 0
    init_from: str = ""
    checkpoint_every: int = 1_000
    log_every: int = 50
    eval_every: int = 2_000
    eval_slices: int = 2_048
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    weights: LossWeights = LossWeights()
    augment: AugmentConfig = AugmentConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises UserError for a name that no field has and for values that can't be used."""
        types = get_type_hints(cls)
        _refuse_unknown(values, types, "config")
        parts = {name: _part(types[name], fields, f"config.{name}") for name, fields in values.items()}
        config = cls(**parts)
        _check(config)
        return config

    def to_config_dict(self) -> ConfigDict:
        """For `configs/*.py`: a ConfigDict whose fields the shell can override (`--config.train.steps=100`)."""
        return ConfigDict(self.to_dict())


def _part(part: type, values: dict[str, Any], where: str) -> Any:
    known = {field.name for field in dataclasses.fields(part)}
    _refuse_unknown(values, known, where)
    return part(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _refuse_unknown(values: dict[str, Any], known: Any, where: str) -> None:
    for name in values:
        if name not in known:
            raise UserError(f"{where}.{name}: no such setting; there are {', '.join(sorted(known))}")


def _trained_one_way(config: Config) -> bool:
    """Codebooks follow either the moving average or the gradient of their losses."""
    by_gradient = [config.weights.codebook_normal > 0, config.weights.codebook_abnormal > 0]
    return 0 < config.model.codebook_decay < 1 and not any(by_gradient) or (
        config.model.codebook_decay == 0 and all(by_gradient)
    )


def _check(config: Config) -> None:
    rules = {
        "config.train.steps": config.train.steps >= 1,
        "config.train.batch_size": config.train.batch_size >= 1,
        "config.train.log_every": config.train.log_every >= 1,
        "config.train.checkpoint_every": config.train.checkpoint_every >= 1,
        "config.train.learning_rate": config.train.learning_rate > 0,
        "config.train.final_rate": 0 <= config.train.final_rate <= 1,
        "config.model.widths": len(config.model.widths) >= 1,
        "config.model.encoder_widening": config.model.encoder_widening >= 1,
        "config.model.own_blocks": 0 <= config.model.own_blocks < len(config.model.widths),
        "config.model.codebook_size": 2 <= config.model.codebook_size <= 65_536,
        "config.model.codebook_decay": _trained_one_way(config),
        "config.model.code_dim": config.model.code_dim >= 1,
        "config.model.spade_width": config.model.spade_width >= 1,
        "config.model.nothing_threshold": config.model.nothing_threshold > 0
        or not (config.weights.nothing or config.weights.layout),
        "config.weights": min(dataclasses.astuple(config.weights)) >= 0,
        "config.augment.flip": 0 <= config.augment.flip <= 1,
        "config.augment.transplant": 0 <= config.augment.transplant <= 1,
        "config.data.read_threads": config.data.read_threads >= 1,
        "config.data.prefetch": config.data.prefetch >= 1,
        "config.train.warmup_steps": config.train.warmup_steps >= 0,
        "config.train.ramp_steps": config.train.ramp_steps >= 0,
        "config.train.eval_every": config.train.eval_every >= 0,
        "config.train.eval_slices": config.train.eval_slices >= 1,
        "config.model.dtype": config.model.dtype in ("float32", "bfloat16"),
    }
    for name, holds in rules.items():
        if not holds:
            raise UserError(f"--{name}: this value can't be used; see its description in decomp_jax/config.py")
