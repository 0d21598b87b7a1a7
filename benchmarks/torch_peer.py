"""The network, losses, augmentation, optimiser and codebooks of decomp_jax, as a PyTorch user would write them.

For comparison alone: `largest_differences` loads decomp_jax's parameters and holds outputs, losses, gradients and
codebooks to its own; tests and benchmarks use it. The savings of ours are made here, too: the decoder's stem and the null condition's gamma and beta
are computed once. Images are [B,C,S,S] in channels_last memory; modules are named after the flax parameters.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decomp_jax.config import AugmentConfig, Config, ModelConfig, ObjectiveConfig, StructureTerm
from decomp_jax.losses.objective import objective
from decomp_jax.models.decoders import decoder_widths
from decomp_jax.models.network import DecompositionNet
from decomp_jax.training.state import State
from decomp_jax.training.step import update_codebooks
from decomp_jax.types import Targets

Norm = Callable[[int], nn.Module]


def activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def batch_norm(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=1 - ModelConfig.batch_norm_decay)
    if not affine:  # statistics are tracked, scale and bias are SPADE's
        norm.weight = norm.bias = None
    return norm


class Spade(nn.Module):
    def __init__(self, channels: int, width: int, layout_channels: int) -> None:
        super().__init__()
        self.norm_0 = batch_norm(channels, affine=False)
        self.shared = conv(layout_channels, min(width, channels))
        self.gamma_beta = conv(min(width, channels), 2 * channels)

    def forward(self, x: Tensor, layout: Tensor) -> Tensor:
        gamma, beta = self.gamma_beta(activation(self.shared(layout))).chunk(2, 1)
        return self.norm_0(x) * (1 + gamma) + beta


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Norm = batch_norm) -> None:
        super().__init__()
        self.norm_0, self.conv_0 = norm(inputs), conv(inputs, outputs)
        self.norm_1, self.conv_1 = norm(outputs), conv(outputs, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        h = self.conv_0(activation(self.norm_0(x, *condition)))
        return self.skip(x) + self.conv_1(activation(self.norm_1(h, *condition)))


class UpBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv_0 = conv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_0(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stem(nn.Module):
    def __init__(self, code: int, features: int, first_up: int) -> None:
        super().__init__()
        self.conv_0, self.norm_0 = conv(code, features), batch_norm(features)
        self.conv_1, self.norm_1 = conv(features, features), batch_norm(features)
        self.up = UpBlock(features, first_up)

    def forward(self, code: Tensor) -> Tensor:
        x = self.conv_1(activation(self.norm_0(self.conv_0(code))))
        return self.up(activation(self.norm_1(x)))


class Encoder(nn.Module):
    def __init__(self, channels: int, widths: tuple[int, ...], full_block: bool, code: int, own_blocks: int) -> None:
        super().__init__()
        self.conv = conv(channels, widths[0], 5)
        self.full_block = ResBlock(widths[0], widths[0]) if full_block else nn.Identity()
        pairs = list(zip(widths, widths[1:]))
        self.shared = len(pairs) - own_blocks
        self.block = nn.ModuleList([ResBlock(*pair) for pair in pairs[: self.shared]])
        for path in ("normal", "abnormal"):
            self.add_module(f"{path}_block", nn.ModuleList([ResBlock(*pair) for pair in pairs[self.shared :]]))
            self.add_module(f"{path}_norm", batch_norm(widths[-1]))
            self.add_module(f"{path}_conv", conv(widths[-1], code))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = F.avg_pool2d(self.full_block(self.conv(image)), 2)
        for block in self.block:
            x = F.avg_pool2d(block(x), 2)
        heads = []
        for path in ("normal", "abnormal"):
            h = x
            for block in getattr(self, f"{path}_block"):
                h = F.avg_pool2d(block(h), 2)
            heads.append(getattr(self, f"{path}_conv")(activation(getattr(self, f"{path}_norm")(h))))
        return tuple(heads)


class SegmentationDecoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], code: int, classes: int) -> None:
        super().__init__()
        features = decoder_widths(widths)
        self.stem = Stem(code, widths[-1], features[0])
        self.up_blocks = nn.ModuleList([UpBlock(*pair) for pair in zip(features, features[1:])])
        self.res_blocks = nn.ModuleList([ResBlock(width, width) for width in features])
        self.norm_0, self.conv = batch_norm(features[-1]), conv(features[-1], classes, 5)

    def forward(self, code: Tensor) -> Tensor:
        x = self.res_blocks[0](self.stem(code))
        for up, block in zip(self.up_blocks, self.res_blocks[1:]):
            x = block(up(x))
        return self.conv(activation(self.norm_0(x)))


class ImageDecoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], code: int, channels: int, spade_width: int, classes: int) -> None:
        super().__init__()
        features = decoder_widths(widths)
        self.stem_block = Stem(code, widths[-1], features[0])
        self.up_blocks = nn.ModuleList([UpBlock(*pair) for pair in zip(features, features[1:])])
        self.res_blocks = nn.ModuleList(
            [ResBlock(width, width, lambda c: Spade(c, spade_width, classes)) for width in features]
        )
        self.norm, self.conv = batch_norm(features[-1]), conv(features[-1], channels, 5)

    def paint(self, stem: Tensor, layout: Tensor) -> Tensor:
        def resized(x: Tensor) -> Tensor:
            step = layout.shape[-1] // x.shape[-1]
            return layout[..., step // 2 :: step, step // 2 :: step]

        x = self.res_blocks[0](stem, resized(stem))
        for up, block in zip(self.up_blocks, self.res_blocks[1:]):
            x = up(x)
            x = block(x, resized(x))
        return self.conv(activation(self.norm(x)))


def nearest_code(z_e: Tensor, codebook: Tensor) -> Tensor:
    """Vectors [N,D] and codebook [K,D] -> indices [N]."""
    return (codebook.square().sum(1) - 2 * z_e @ codebook.T).argmin(1)


def cells(z: Tensor) -> Tensor:
    """[B,D,h,w] -> [N,D]"""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


class Network(nn.Module):
    """All of `DecompositionNet`; codebooks are buffers that `Trainer` moves."""

    def __init__(self, model: DecompositionNet) -> None:
        super().__init__()
        config, classes = model.config, model.lesion_classes
        widths, code = config.widths, config.code_dim
        self.threshold = config.nothing_threshold
        encoder_widths = tuple(config.encoder_widening * width for width in widths)
        self.encoder = Encoder(model.channels, encoder_widths, config.full_resolution_block, code, config.own_blocks)
        self.segmentation_decoder = SegmentationDecoder(widths, code, classes + 1)
        self.image_decoder = ImageDecoder(widths, code, model.channels, config.spade_width, classes)
        for path in ("normal", "abnormal"):
            self.register_buffer(f"{path}_codebook", torch.zeros(config.codebook_size, code))
        self.register_buffer("null", torch.zeros(1, classes, model.size, model.size))

    def forward(self, image: Tensor, quantised: float | Tensor) -> dict[str, Tensor]:
        normal, abnormal = (z.float() for z in self.encoder(image))
        with torch.autocast(image.device.type, enabled=False):
            found = self.quantize(normal.detach(), abnormal.detach())
        seen = {}
        for path, z_e in (("normal", normal), ("abnormal", abnormal)):
            seen[path] = z_e + quantised * (found[f"{path}_code"] - z_e).detach()
        logits = self.segmentation_decoder(seen["abnormal"]).float()
        winner = F.one_hot(logits.argmax(1), logits.shape[1]).permute(0, 3, 1, 2)
        stem = self.image_decoder.stem_block(seen["normal"])
        x_plus = self.image_decoder.paint(stem, (logits * winner)[:, 1:]).float()
        x_minus = self.image_decoder.paint(stem, self.null).float()
        return found | {"normal": normal, "abnormal": abnormal, "seg_logits": logits, "x_plus": x_plus, "x_minus": x_minus}

    def quantize(self, normal: Tensor, abnormal: Tensor) -> dict[str, Tensor]:
        """Indices [N] of both paths, and the code of each cell [B,D,h,w]."""
        def code(codebook: Tensor, indices: Tensor) -> Tensor:
            b, d, h, w = normal.shape
            return codebook[indices].reshape(b, h, w, d).permute(0, 3, 1, 2)

        normal_indices = nearest_code(cells(normal), self.normal_codebook)
        lesion_indices = 1 + nearest_code(cells(abnormal), self.abnormal_codebook[1:])
        finding = abnormal.square().sum(1, keepdim=True) > self.threshold
        lesion_code = code(self.abnormal_codebook, lesion_indices)
        return {
            "normal_indices": normal_indices, "lesion_indices": lesion_indices, "lesion_code": lesion_code,
            "normal_code": code(self.normal_codebook, normal_indices), "abnormal_code": lesion_code * finding,
            "abnormal_indices": lesion_indices * finding.flatten(),
        }

    def load_flax(self, params: dict, batch_stats: dict) -> None:
        """Takes over parameters and statistics of a `DecompositionNet`."""
        named = dict(self.named_parameters()) | dict(self.named_buffers())
        with torch.no_grad():
            for tree in (params, batch_stats):
                for path, value in jax.tree_util.tree_leaves_with_path(tree):
                    named[torch_name([key.key for key in path])].copy_(from_flax(value))


def nchw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(0, 3, 1, 2)


def from_flax(value: np.ndarray) -> Tensor:
    value = torch.from_numpy(np.array(value))
    return value.permute(3, 2, 0, 1) if value.ndim == 4 else value


def torch_name(path: list[str]) -> str:
    name = "/".join(path)
    for old, new in (
        (r"/BatchNorm_(\d)/BatchNorm_0/", r"/norm_\1/"), (r"/BatchNorm_0/", "/"), (r"Spade_", "norm_"), (r"Conv_", "conv_"),
        (r"ResBlock_", "res_blocks_"), (r"stem(_block)?/UpBlock_0", r"stem\1/up"), (r"UpBlock_", "up_blocks_"),
        (r"(block|blocks)_(\d)/", r"\1/\2/"), (r"(kernel|scale)$", "weight"), (r"(mean|var)$", r"running_\1"),
    ):
        name = re.sub(old, new, name)
    return name.replace("/", ".")


def augment(image: Tensor, label: Tensor, config: AugmentConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Random geometry, transplant and gamma: image [B,C,S,S] and label [B,S,S] -> input and targets."""
    n, size = len(image), image.shape[-1]
    batch = torch.arange(n, device=image.device)[:, None, None]

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, device=image.device) - 1

    flip = torch.where(uniform(n) < 2 * config.flip - 1, -1.0, 1.0)
    if config.rotation or config.scale:
        angle, scale = np.radians(config.rotation) * uniform(n), torch.exp(config.scale * uniform(n))
        cos, sin, zero = angle.cos() / scale, angle.sin() / scale, torch.zeros_like(angle)
        theta = torch.stack([torch.stack([flip * cos, flip * sin, zero], 1), torch.stack([-sin, cos, zero], 1)], 1)
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        image = F.grid_sample(image, grid, align_corners=False)
        label = F.grid_sample(label[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].long()
    else:
        image = torch.where(flip[:, None, None, None] < 0, image.flip(3), image)
        label = torch.where(flip[:, None, None] < 0, label.flip(2), label).long()

    axis = torch.arange(size, device=image.device)
    shift = torch.randint(-size // 8, size // 8 + 1, (2, n, 1), device=image.device)
    rows, columns = (axis - shift[0]) % size, (axis - shift[1]) % size
    columns = torch.where(uniform(n, 1) < 0, size - 1 - columns, columns)
    source = (batch.roll(1), rows[:, :, None], columns[:, None, :])
    donor_image, donor_label = image.permute(0, 2, 3, 1)[source].permute(0, 3, 1, 2), label[source]
    body = (image > config.foreground).any(1)
    mask = (donor_label > 0) & body & (torch.rand(n, 1, 1, device=image.device) < config.transplant)
    mask &= mask.float().mean((1, 2), keepdim=True) >= config.least_pasted
    soft = F.avg_pool2d(mask[:, None].float(), 3, 1, 1)
    alpha = torch.where(mask[:, None], soft.clamp_min(config.opacity), soft / 2 * body[:, None])

    def foreground_mean(x: Tensor) -> Tensor:
        inside = x > config.foreground
        return (x * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp_min(1)

    gain = foreground_mean(image) / foreground_mean(donor_image).clamp_min(1e-3)
    pasted = (1 - alpha) * image + alpha * (gain * donor_image).clamp(0, 1)
    gamma = torch.exp(config.intensity * uniform(n, 1, 1, 1))
    seen = torch.where(pasted > 0, pasted.clamp(1e-6, 1) ** gamma, 0.0)
    return seen, {"image": pasted, "label": torch.where(mask, donor_label, label), "background": image,
                  "background_label": label}


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM of pairs [N,C,S,S] over windows inside the image, by a separable Gaussian."""
    taps = torch.exp(-0.5 * ((torch.arange(11, device=a.device) - 5) / 1.5) ** 2)
    taps = (taps / taps.sum()).view(1, 1, 1, 11)
    maps = torch.cat([a, b, a * a, b * b, a * b]).flatten(0, 1)[:, None]
    mu_a, mu_b, aa, bb, ab = F.conv2d(F.conv2d(maps, taps), taps.mT).reshape(5, *a.shape[:2], -1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    structure = (2 * (ab - mu_a * mu_b) + c2) / (aa - mu_a**2 + bb - mu_b**2 + c2)
    return (luminance * structure).mean((1, 2))


def similarity_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    pred, target = mask * pred, mask * target
    return ((pred - target) ** 2).mean() + 1 - ssim(pred, target).mean()


def structure_loss(z_e: Tensor, image: Tensor, healthy: Tensor, lesion: Tensor, settings: StructureTerm) -> Tensor:
    """The first channels of z_e beside the local contrast of 4 x 4 pieces of each cell (of 32 channels or 64)."""
    size, grid = image.shape[-1], z_e.shape[-1]
    at = torch.arange(size, device=image.device)
    window = torch.exp(-0.5 * ((at[:, None] - at) / (size * settings.window)) ** 2)
    window = window / window.sum(1, keepdim=True)
    shown = (window @ healthy @ window.T).clamp(min=1e-3)
    mean, square = (window @ (healthy * x) @ window.T / shown for x in (image, image.square()))
    contrast = (image - mean) / ((square - mean.square()).clamp(min=0) + settings.flat).sqrt()
    weight = healthy * (1 + (settings.pasted - 1) * lesion)
    parts = min(4, size // grid)
    pieces = [F.pixel_unshuffle(F.avg_pool2d(x, size // (parts * grid)), parts) for x in (contrast, weight)]
    z_e = z_e[:, : pieces[0].shape[1]]
    return (pieces[1] * (z_e - settings.scale * pieces[0]).square()).sum(1).mean()


def losses(out: dict[str, Tensor], targets: dict[str, Tensor], config: ObjectiveConfig) -> dict[str, Tensor]:
    """The terms of the recommended objective (`ObjectiveConfig()`)."""
    label, logits = targets["label"], out["seg_logits"]
    onehot = F.one_hot(label, logits.shape[1]).permute(0, 3, 1, 2).float()
    fractions = F.avg_pool2d(onehot, label.shape[-1] // out["abnormal"].shape[-1])[:, 1:]
    fraction = fractions.sum(1)
    lesion_cells = (fraction >= config.lesion_cell).float()
    probs = logits.softmax(1)
    shared, total = (probs * onehot).sum((0, 2, 3))[1:], (probs + onehot).sum((0, 2, 3))[1:]
    whole = config.layout.whole
    shares = torch.cat([whole * fraction[:, None], (1 - whole) * fractions], 1)
    layout = config.layout.scale * F.pad(shares, (0, 0, 0, 0, 0, out["abnormal"].shape[1] - shares.shape[1])).sqrt()
    lesion = (label > 0).float()[:, None]
    healthy = (targets["background_label"] == 0).float()[:, None]
    abnormal, x_plus, x_minus = out["abnormal"], out["x_plus"], out["x_minus"]
    return {
        "commitment_normal": (out["normal"] - out["normal_code"]).square().sum(1).mean(),
        "commitment_abnormal": (lesion_cells * (abnormal - out["lesion_code"]).square().sum(1)).mean(),
        "nothing": ((fraction == 0) * abnormal.square().sum(1)).mean(),
        "layout": ((fraction > 0) * (abnormal - layout).square().sum(1)).mean(),
        "structure": structure_loss(out["normal"], targets["background"], healthy, lesion, config.structure),
        "soft_dice": 1 - (2 * shared / (total + 1e-5)).mean(),
        "cross_entropy": F.cross_entropy(logits, label),
        "reconstruction_minus": similarity_loss(x_minus, targets["background"], healthy),
        "reconstruction_plus": similarity_loss(x_plus, targets["image"], torch.ones_like(lesion))
        + similarity_loss(x_plus, targets["image"], lesion),
        "residual": ((1 - lesion) * (x_minus - x_plus)).abs().mean(),
    }


class Trainer:
    """A training step as in decomp_jax.training.step. Raises ValueError for settings that it does not know.

    Args:
        compiled: run network and losses through torch.compile.
        autocast: compute in bfloat16.
    """

    def __init__(self, model: DecompositionNet, config: Config, device: str, *, compiled: bool, autocast: bool) -> None:
        odd = config.model.spade_stop_gradient or config.model.rotation_trick or not config.model.codebook_decay
        if odd or config.objective != ObjectiveConfig():
            raise ValueError("the peer knows the recommended objective, gradients and codebooks by moving average alone")
        self.config, self.device, self.autocast = config, device, autocast
        self.network = Network(model).to(device, memory_format=torch.channels_last)
        self.forward = torch.compile(self.network_and_losses) if compiled else self.network_and_losses
        self.augment = torch.compile(augment) if compiled else augment
        self.optimizer = torch.optim.Adam(self.network.parameters(), config.train.learning_rate, fused=True)
        shape = (config.model.codebook_size, config.model.code_dim)
        self.stats = {path: (torch.zeros(shape[0], device=device), torch.zeros(shape, device=device))
                      for path in ("normal", "abnormal")}

    def network_and_losses(self, image: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict, dict]:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            out = self.network(image, 1.0)
        terms = losses(out, targets, self.config.objective)
        return sum(getattr(self.config.objective, name).weight * term for name, term in terms.items()), terms, out

    def step(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Image [B,C,S,S] and label [B,S,S], as they were read -> metrics, left on the device."""
        image = image.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        seen, targets = self.augment(image, label.to(self.device), self.config.augment)
        return self.update(seen, targets)

    def update(self, seen: Tensor, targets: dict[str, Tensor], revive: bool = True) -> dict[str, Tensor]:
        total, terms, out = self.forward(seen, targets)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters()])
        self.optimizer.step()
        metrics = {name: term.detach() for name, term in terms.items()} | {"total": total.detach(), "gradient_norm": norm}
        return metrics | self.update_codebooks(out, targets["label"], revive)

    @torch.no_grad()
    def update_codebooks(self, out: dict[str, Tensor], label: Tensor, revive: bool) -> dict[str, Tensor]:
        decay, metrics = self.config.model.codebook_decay, {}
        size = label.shape[-1] // out["abnormal"].shape[-1]
        fraction = F.avg_pool2d((label > 0).float()[:, None], size).flatten()
        lesion_cells = (fraction >= self.config.objective.lesion_cell).float()
        for path, indices, weight in (("normal", out["normal_indices"], torch.ones_like(lesion_cells)),
                                      ("abnormal", out["lesion_indices"], lesion_cells)):
            count, total = self.stats[path]
            z_e = cells(out[path])
            count = decay * count + (1 - decay) * torch.zeros_like(count).index_add_(0, indices, weight)
            total = decay * total + (1 - decay) * torch.zeros_like(total).index_add_(0, indices, weight[:, None] * z_e)
            if revive:
                dead = (count < self.config.model.revive_below) & (weight.sum() > 0)
                drawn = z_e[torch.multinomial(weight + 1e-12, len(count), replacement=True)]
                count, total = torch.where(dead, 1.0, count), torch.where(dead[:, None], drawn, total)
            self.stats[path] = count, total
            codebook = getattr(self.network, f"{path}_codebook")
            codebook.copy_(torch.where(count[:, None] > 1e-3, total / count.clamp_min(1e-3)[:, None], codebook))
            if path == "abnormal":
                codebook[0] = 0
            used = torch.zeros_like(count).index_add_(0, out[f"{path}_indices"], torch.ones_like(weight))
            p = used / used.sum()
            metrics[f"{path}_usage"] = (used > 0).float().mean()
            metrics[f"{path}_perplexity"] = torch.exp(-torch.special.xlogy(p, p).sum())
        return metrics


def largest_differences(
    config: Config, model: DecompositionNet, state: State, image: np.ndarray, label: np.ndarray
) -> dict[str, float]:
    """Between the peer and decomp_jax, as a share of the largest value compared; of outputs, losses, gradients, codebooks.

    x_minus and the normal code are held to another image than x_plus is, as under a pasted lesion: the batch in reverse.

    Args:
        config: the recommended objective, float32, without revival.
        state: of step 0; only shapes and statistics matter.
        image: float32 [B,S,S,C].
        label: int32 [B,S,S].
    """
    rng = np.random.default_rng(1)
    books = {f"{path}_codebook": jnp.asarray(rng.normal(size=(model.config.codebook_size, model.config.code_dim)), jnp.float32)
             for path in ("normal", "abnormal")}
    # Biases start at 0, where SPADE's null condition meets the kink of the activation: the slope there is a convention.
    books["abnormal_codebook"] = books["abnormal_codebook"].at[0].set(0.0)
    moved = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), state.params)
    state = state.replace(params=moved | books)
    targets = Targets(*(jnp.asarray(x) for x in (image, label, image[::-1], label[::-1])))

    @jax.jit
    def ours(params: dict) -> tuple:
        def loss(params: dict) -> tuple:
            variables = {"params": params, "batch_stats": state.batch_stats}
            outputs, _ = model.apply(variables, targets.image, quantised=1.0, train=True, mutable=["batch_stats"])
            total, terms = objective(outputs, targets, config.objective, nothing=True)
            return total, (terms, outputs)

        (_, (terms, outputs)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        moved, _ = update_codebooks(
            jax.random.key(0), params, state.codebook_stats, outputs, targets, jnp.int32(0), config
        )
        return outputs, terms, gradients, moved

    outputs, terms, gradients, moved = jax.device_get(ours(state.params))
    peer = Trainer(model, config, "cpu", compiled=False, autocast=False)
    peer.network.load_flax(state.params, state.batch_stats)
    seen, theirs = nchw(image), {
        "image": nchw(image), "label": torch.from_numpy(np.array(targets.label)).long(), "background": nchw(targets.background),
        "background_label": torch.from_numpy(np.array(targets.background_label)).long(),
    }
    _, their_terms, out = peer.network_and_losses(seen, theirs)
    metrics = peer.update(seen, theirs, revive=False)
    found = dict(peer.network.named_parameters())
    pairs = {
        "outputs": [(nchw(getattr(outputs, name)), out[name].detach()) for name in ("seg_logits", "x_plus", "x_minus")]
        + [(nchw(getattr(outputs.latents, path)), out[path].detach()) for path in ("normal", "abnormal")],
        "losses": [(terms[name], metrics[name]) for name in their_terms],
        "gradients": [(from_flax(value), found[torch_name([key.key for key in path])].grad)
                      for path, value in jax.tree_util.tree_leaves_with_path(gradients) if "codebook" not in path[0].key],
        "codebooks": [(moved[name], getattr(peer.network, name)) for name in books],
    }
    return {
        what: max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) / max(np.abs(np.asarray(c)).max() for c, _ in both)
                  for a, b in both)
        for what, both in pairs.items()
    }
