"""How right the lesion-free image x_minus is: against the true one where it is known, and by our own segmenter."""

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float
from skimage.metrics import structural_similarity

from decomp_jax.data.records import SliceDataset
from decomp_jax.evaluation.slices import SliceSet, decompose, read_batches, valid_rows
from decomp_jax.evaluation.tables import Summary, Table
from decomp_jax.inference.decomposer import Decomposer, Decomposition
from decomp_jax.retrieval.statistics import Bootstrap, Interval

INPAINT_SIGMA = 0.03  # of the image side
LEAST_ERROR = 1e-10  # mean squares below it count as 100 dB
BEFORE = "before"

Images = Float[np.ndarray, "n s s c"]
# Scores of slices by (image, measure).
SliceScores = dict[tuple[str, str], Float[np.ndarray, "n"]]


def counterfactual_table(decomposer: Decomposer, dataset: SliceDataset, query: SliceSet) -> Table:
    """What x_minus is worth on the lesion slices of `query`; empty where there are none.

    `lesion left in percent` is the lesion area that the network's own segmentation finds, of what it finds in x: in
    x_minus, and in x + x_minus - x_plus, the input less the lesion that was painted. The latter keeps the noise that
    real images have and paintings lack.
    `images[name]` compares an image with the true lesion-free one, in the channels that the data have: x_minus; x, the
    input as it is; the input with its lesion blurred away (which knows where the lesion is); and `ceiling`, x_minus of
    the true lesion-free image itself.
    """
    chosen = np.flatnonzero(query.lesion)
    if not len(chosen):
        return {}
    fields = ("image", "label", "healthy") if dataset.settings.healthy else ("image", "label")
    area, truth = [], []
    for place, global_batch in read_batches(dataset, fields, query.positions[chosen], "paint without lesion"):
        batch = valid_rows(global_batch, place)
        image, output = batch["image"].astype(np.float32), decompose(decomposer, batch["image"])
        area.append(_lesion_areas(decomposer, image, output))
        if "healthy" in batch:
            truth.append(_against_truth(decomposer, image, output, batch["healthy"], batch["label"] > 0))
    bootstrap = Bootstrap.draw(query.rows["patient_id"][chosen])
    table = {"lesion left in percent": _lesion_left(Summary.average(_joined(area), bootstrap))}
    return table | ({"images": _truth_table(Summary.average(_joined(truth), bootstrap))} if truth else {})


def _joined(batches: list[SliceScores]) -> SliceScores:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _lesion_areas(decomposer: Decomposer, image: Images, output: Decomposition) -> SliceScores:
    """Share of the pixels that the network's own segmentation takes for a lesion, before and after its removal."""
    segmentations = {BEFORE: output.segmentation} | {
        name: decompose(decomposer, lesion_free * _given(image)).segmentation
        for name, lesion_free in (
            ("x_minus", output.x_minus), ("x + x_minus - x_plus", image + output.x_minus - output.x_plus),
        )
    }
    return {(name, "area"): (maps.argmax(-1) > 0).mean((1, 2)) for name, maps in segmentations.items()}


def _lesion_left(areas: Summary) -> dict[str, Interval]:
    return {
        name: Interval(*(100 * part for part in areas.compare((name, "area"), (BEFORE, "area"))["ratio"]))
        for name, _ in areas.means if name != BEFORE
    }


def _against_truth(
    decomposer: Decomposer, image: Images, output: Decomposition, healthy: Images, label: Bool[np.ndarray, "n s s"]
) -> SliceScores:
    """Error, PSNR and SSIM of each lesion-free image, inside the lesion and outside of it."""
    images = {
        "x_minus": output.x_minus, "x": image, "blurred": inpaint(image, label),
        "ceiling": decompose(decomposer, healthy).x_minus,
    }
    given = _given(image)
    healthy = healthy[..., given].astype(np.float32)
    scores = {}
    for name, lesion_free in images.items():
        lesion_free = lesion_free[..., given]
        similarity = ssim_map(lesion_free, healthy)
        for place, mask in (("inside", label), ("outside", ~label & healthy.any(-1))):
            error = _mean_in(mask, (lesion_free - healthy) ** 2)
            scores[name, f"error {place}"] = _mean_in(mask, np.abs(lesion_free - healthy))
            scores[name, f"psnr {place}"] = -10 * np.log10(np.maximum(error, LEAST_ERROR))
            scores[name, f"ssim {place}"] = _mean_in(mask, similarity)
    for name in images:
        scores[name, "psnr gain inside"] = scores[name, "psnr inside"] - scores["x", "psnr inside"]
    return scores


def _given(image: Images) -> Bool[np.ndarray, "c"]:
    """The channels that the data have; others are 0."""
    return image.any((0, 1, 2))


def _truth_table(summary: Summary) -> Table:
    """The averages, and how much of the input's error inside the lesion is gone, in percent."""
    table = summary.nested()
    for name in table:
        mean, low, high = summary.compare((name, "error inside"), ("x", "error inside"))["ratio"]
        table[name]["near percent"] = Interval(100 - 100 * mean, 100 - 100 * high, 100 - 100 * low)
    return table


def _mean_in(mask: Bool[np.ndarray, "n s s"], images: Images) -> Float[np.ndarray, "n"]:
    return (images.mean(-1) * mask).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)


def inpaint(image: Images, mask: Bool[np.ndarray, "n s s"]) -> Images:
    """The image with the masked part filled by a Gaussian average of what is around it, widened until it reaches."""
    filled, missing = image.copy(), mask.copy()
    outside = ~mask[..., None]
    sigma = INPAINT_SIGMA * image.shape[1]
    while missing.any() and sigma < image.shape[1]:
        weight = _blur(outside.astype(np.float32), sigma)
        reached = missing & (weight[..., 0] > 0.01)
        filled = np.where(reached[..., None], _blur(image * outside, sigma) / np.maximum(weight, 1e-6), filled)
        missing &= ~reached
        sigma *= 2
    return filled


def ssim_map(a: Images, b: Images) -> Images:
    """SSIM (Wang et al. 2004) around each pixel: Gaussian windows of sigma 1.5, data range 1."""
    options = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return np.stack([structural_similarity(x, y, channel_axis=-1, full=True, **options)[1] for x, y in zip(a, b)])


def _blur(images: Images, sigma: float) -> Images:
    return scipy.ndimage.gaussian_filter(images, (0, sigma, sigma, 0), truncate=3.5)
