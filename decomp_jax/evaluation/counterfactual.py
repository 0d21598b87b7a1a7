"""How right the lesion-free image x_minus is: against the true one where it is known, and by our own segmenter."""

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, Integer

from decomp_jax.data.records import SliceDataset
from decomp_jax.evaluation.slices import SliceSet, decomposed
from decomp_jax.evaluation.tables import Summary, Table
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.retrieval.statistics import Bootstrap, Interval

SSIM_SIGMA = 1.5
INPAINT_SIGMA = 0.03  # of the image side
LEAST_ERROR = 1e-10  # mean squares below it count as 100 dB

Images = Float[np.ndarray, "n s s c"]


def counterfactual_table(decomposer: Decomposer, dataset: SliceDataset, query: SliceSet) -> Table:
    """What x_minus is worth on the lesion slices of `query`; empty where there are none.

    `lesion left in percent` is the lesion area that the network's own segmentation finds, of what it finds in x: in
    x_minus, and in x + x_minus - x_plus, the input less the lesion that was painted. The latter keeps the noise that
    real images have and paintings lack.
    `images[name]` compares an image with the true lesion-free one: x_minus; x, the input as it is; the input with its
    lesion blurred away (which knows where the lesion is); and `ceiling`, x_minus of the true lesion-free image itself.
    """
    chosen = np.flatnonzero(query.lesion)
    if not len(chosen):
        return {}
    image, label = query.image[chosen].astype(np.float32), query.label[chosen] > 0
    x_plus, x_minus = _paintings(decomposer, image, "paint with and without lesion")
    bootstrap = Bootstrap.of(query.rows["patient_id"][chosen])
    before = query.segmentation[chosen]
    table = {"lesion left in percent": {
        name: _lesion_left(decomposer, before, rid, bootstrap)
        for name, rid in (("x_minus", x_minus), ("x + x_minus - x_plus", image + x_minus - x_plus))
    }}
    if dataset.settings.healthy:
        healthy = dataset.stack(("healthy",), query.positions[chosen])["healthy"].astype(np.float32)
        images = {
            "x_minus": x_minus, "x": image, "blurred": inpaint(image, label),
            "ceiling": _paintings(decomposer, healthy, "paint the ceiling")[1],
        }
        table |= _against_truth(images, healthy, label, bootstrap)
    return table


def _paintings(decomposer: Decomposer, images: Images, progress: str) -> tuple[Images, Images]:
    """x_plus and x_minus."""
    both = [(batch.x_plus, batch.x_minus) for batch in decomposed(decomposer, images, progress)]
    x_plus, x_minus = (np.concatenate(images) for images in zip(*both))
    return x_plus, x_minus


def _lesion_left(
    decomposer: Decomposer, before: Integer[np.ndarray, "n s s"], images: Images, bootstrap: Bootstrap
) -> Interval:
    """Lesion area that the network's own segmentation finds in `images`, of the area `before`."""
    batches = decomposed(decomposer, images, "look for lesions left")
    left = np.concatenate([(batch.segmentation.argmax(-1) > 0).mean((1, 2)) for batch in batches])
    summary = Summary.of({("left",): 100 * left, ("before",): (before > 0).mean((1, 2))}, bootstrap)
    return summary.compare(("left",), ("before",))["ratio"]


def _against_truth(
    images: dict[str, Images], healthy: Images, label: Bool[np.ndarray, "n s s"], bootstrap: Bootstrap
) -> Table:
    scores = {}
    for name, image in images.items():
        similarity = ssim_map(image, healthy)
        for place, mask in (("inside", label), ("outside", ~label & healthy.any(-1))):
            error = _mean_in(mask, (image - healthy) ** 2)
            scores[name, f"error {place}"] = _mean_in(mask, np.abs(image - healthy))
            scores[name, f"psnr {place}"] = -10 * np.log10(np.maximum(error, LEAST_ERROR))
            scores[name, f"ssim {place}"] = _mean_in(mask, similarity)
    for name in images:
        scores[name, "psnr gain inside"] = scores[name, "psnr inside"] - scores["x", "psnr inside"]
    summary = Summary.of(scores, bootstrap)
    table = summary.nested()
    for name in images:
        mean, low, high = summary.compare((name, "error inside"), ("x", "error inside"))["ratio"]
        table[name]["near percent"] = Interval(100 - 100 * mean, 100 - 100 * high, 100 - 100 * low)
    return {"images": table}


def _mean_in(mask: Bool[np.ndarray, "n s s"], values: Images) -> Float[np.ndarray, "n"]:
    return (values.mean(-1) * mask).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)


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
    """SSIM (Wang et al. 2004) around each pixel: 11-tap Gaussian windows of sigma 1.5, data range 1."""
    mean_a, mean_b = _blur(a, SSIM_SIGMA), _blur(b, SSIM_SIGMA)
    var_a, var_b = _blur(a * a, SSIM_SIGMA) - mean_a**2, _blur(b * b, SSIM_SIGMA) - mean_b**2
    covariance = _blur(a * b, SSIM_SIGMA) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance * (2 * covariance + c2) / (var_a + var_b + c2)


def _blur(images: Images, sigma: float) -> Images:
    return scipy.ndimage.gaussian_filter(images, (0, sigma, sigma, 0), truncate=3.5)
