"""The report as one HTML file that needs nothing else: for a radiologist first, for a reviewer all the way down."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from decomp_jax.evaluation.rankers import METHODS
from decomp_jax.evaluation.tables import FLOOR, Table
from decomp_jax.retrieval.statistics import Interval

STYLE = """
:root { --ink: #1c2733; --soft: #5d6b78; --line: #dde3e8; --accent: #0b5fa5; --paper: #fff; --tint: #f4f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 Georgia, "Times New Roman", serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1, h2, h3, th, td, figcaption, .key, .fine, nav { font-family: "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; margin: 3.5rem 0 .5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 .4rem; }
p, ul { max-width: 44rem; }
.lead { font-size: 1.15rem; }
.fine, figcaption { font-size: .85rem; line-height: 1.5; color: var(--soft); }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 1.25rem; margin: 2rem 0;
       padding: 1.25rem 0; border: solid var(--line); border-width: 1px 0; }
.key b { display: block; font-size: 1.75rem; line-height: 1.2; color: var(--accent); }
.key b small { font-size: .85rem; font-weight: 400; color: var(--soft); }
.key span { display: block; font-size: .85rem; line-height: 1.4; } .key .fine { margin-top: .25rem; }
figure { margin: 1.5rem 0; } figure img { width: 100%; height: auto; display: block; }
figcaption { max-width: 44rem; margin-top: .5rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td + td { white-space: nowrap; } td small { display: block; color: var(--soft); }
td:first-child { min-width: 9rem; }
summary { cursor: pointer; margin: .6rem 0; font-family: Arial, sans-serif; }
code, pre { font-size: .8rem; } pre { overflow-x: auto; background: var(--tint); padding: 1rem; }
@media (max-width: 40rem) { body { font-size: 16px; } main { padding-top: 1.5rem; } h1 { font-size: 1.6rem; } }
"""
NAMES = {"normal": "anatomy", "abnormal": "lesion", "both": "both"}


def write_page(path: Path, metrics: Table, figures: dict[str, Path], config: dict[str, Any]) -> None:
    """Writes the page: `metrics` as `report.measure` gives them, `figures` PNG files by name."""
    parts = (
        _opening(metrics), _examples(figures), _selectivity(metrics, figures), _mixed(metrics),
        _decomposition(metrics, figures), _findings(metrics, config), _details(metrics), _network(metrics, figures, config),
        _reading(metrics["protocol"]), _limits(metrics), _provenance(metrics, config),
    )
    path.write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Retrieval by anatomy and by lesion</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main>
{"".join(parts)}</main></body></html>
""")


# ---------------------------------------------------------------- pieces


def number(value: float | Interval, digits: int = 2, unit: str = "") -> str:
    """A number, with its interval if it has one."""
    if not isinstance(value, Interval):
        return f"{value:.{digits}f}{unit}"
    mean, low, high = (f"{part:.{digits}f}" for part in value)
    return f"{mean}{unit} <small>{low} to {high}</small>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; cells are HTML."""
    heading = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in (*row, *[''] * (len(head) - len(row))))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table></div>\n'


def figure(figures: dict[str, Path], name: str, caption: str) -> str:
    """An embedded image with its caption; nothing where the report has no such figure."""
    if name not in figures:
        return ""
    image = base64.b64encode(figures[name].read_bytes()).decode()
    alt = html.escape(" ".join(caption.split(". ")[0].split()))
    source = f"data:image/png;base64,{image}"
    return f'<figure><img alt="{alt}" src="{source}"><figcaption>{caption}</figcaption></figure>\n'


def section(title: str, *parts: str) -> str:
    """A section, or nothing if all of its parts are empty."""
    return f"<h2>{title}</h2>\n{''.join(parts)}" if any(parts) else ""


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>\n"


def paragraph(text: str) -> str:
    return f"<p>{text}</p>\n"


def against(comparison: dict[str, Interval]) -> str:
    """A paired comparison in words."""
    difference = comparison["difference"]
    if difference.low > 0:
        return "higher than"
    return "lower than" if difference.high < 0 else "not clearly different from"


# ---------------------------------------------------------------- sections


def _opening(metrics: Table) -> str:
    queries, references = (metrics["protocol"][name] for name in ("queries", "references"))
    said = [f"""The network splits a slice into two codes, one for the anatomy and one for the lesion, so that an
        archive can be searched for either. Here {queries["slices"]:,} slices of {queries["patients"]:,} patients were
        looked up among {references["slices"]:,} slices of {references["patients"]:,} other patients. The network was
        given no label of them: labels only tell how alike what it found is."""]
    said += [_verdict(metrics, target) for target in ("abnormal", "normal")]
    lead = "".join(f'<p class="lead">{text}</p>\n' for text in said if text)
    return f"""<h1>Retrieval by anatomy and by lesion: what is found, and how sure we are</h1>
{lead}{_key_numbers(metrics)}<p class="fine">Dice runs from 0 (no overlap) to 1 (the same pixels). Small numbers are
95 % intervals from resampling patients. Research software: not a medical device, and not for diagnosis.</p>
"""


def _verdict(metrics: Table, target: str) -> str:
    pair = metrics["comparisons"].get(target, {}).get("dice@5", {}).get(f"{target} vs pixel_l2")
    if not pair:
        return ""
    methods = (target, "pixel_l2", f"oracle_{target}")
    ours, pixels, best = (metrics["retrieval"][method][target]["dice@5"].mean for method in methods)
    return f"""Searching by <b>{NAMES[target]}</b>, the five nearest slices overlap the query's {_LABELS[target]} with
        a Dice of {ours:.2f} on average, {against(pair)} comparing pixels ({pixels:.2f}). A search by the labels
        themselves would reach {best:.2f}."""


_LABELS = {"normal": "anatomical regions", "abnormal": "lesion classes"}


def _key_numbers(metrics: Table) -> str:
    retrieval, compared = metrics["retrieval"], metrics["comparisons"]
    tiles = []
    for target, measure, what in _KEYS:
        pair = compared.get(target, {}).get(measure, {}).get(f"{target} vs pixel_l2")
        if pair:
            best = "oracle_whole" if measure.startswith("whole") else f"oracle_{target}"
            pixels, chance, most = (retrieval[m][target][measure].mean for m in ("pixel_l2", "random", best))
            tiles.append((number(retrieval[target][target][measure]), what, f"""{number(pair["ratio"], 2, "×")} of
                comparing pixels ({pixels:.2f}); chance {chance:.2f}, best possible {most:.2f}"""))
    if "auroc" in metrics["abnormality"]:
        tiles.append((number(metrics["abnormality"]["auroc"]), "slices with a lesion told from those without (AUROC)",
                      "chance 0.50, best possible 1.00"))
    truth = metrics["counterfactual"].get("images")
    if truth:
        tiles.append((number(truth["x_minus"]["psnr gain inside"], 1, " dB"),
                      "closer to the true lesion-free image than the input is, inside the lesion",
                      f"blurring the lesion away: {truth['blurred']['psnr gain inside'].mean:.1f} dB"))
    cells = "".join(f'<div><b>{value}</b><span>{what}</span><span class="fine">{beside}</span></div>\n'
                    for value, what, beside in tiles)
    return f'<div class="key">{cells}</div>\n' if tiles else ""


_KEYS = (
    ("abnormal", "dice@5", "lesion-class Dice of the 5 nearest by abnormal code"),
    ("abnormal", "whole_dice@5", "whole-lesion Dice of the 5 nearest by abnormal code"),
    ("normal", "dice@5", "anatomy Dice of the 5 nearest by normal code"),
)


def _examples(figures: dict[str, Path]) -> str:
    return section("What it finds", figure(figures, "retrieval", """Queries (blue frame) and their five nearest slices
        of other patients, nearest first. Labels are drawn for the reader, in the sense that was searched for; the
        search saw none. The queries are not the best ones: of each kind, the three stand at 80 %, 50 % and 20 % of
        the score, among slices whose lesion is larger than the median. The Dice below a slice is its overlap with the
        query's labels (in c: with the anatomy of the first image | with the lesion of the second). This is Figure 3
        of Kobayashi et al. (2020), made from this model."""))


def _selectivity(metrics: Table, figures: dict[str, Path]) -> str:
    retrieval = metrics["retrieval"]
    targets = [target for target in NAMES if target in retrieval.get("random", {})]
    if not targets:
        return ""
    rows = []
    for title, methods in _GROUPS.items():
        known = [method for method in methods if method in retrieval]
        rows += [[f"<b>{title}</b>"], *(_selectivity_row(metrics, method, targets) for method in known)]
    return section(
        "Does each code find what it is for, and only that?",
        paragraph("""Read down a column: who finds slices whose anatomy, or lesion, is like the query's? A code should
            do well in its own column and badly in the other. How badly it can do is not chance: lesions sit at
            certain heights, so that even a search by the true lesion finds some of the anatomy. This <b>floor</b>,
            what the oracle of the code's own target scores, is given beside, with the paired difference from it. Where
            both targets come in it is no floor, only what the code's own oracle reaches."""),
        figure(figures, "selectivity", """Dice@5 of all methods. The code made for the target is blue; oracles, which
            search by the true labels, are grey. The dashed line is the floor: what a search by the other true label
            finds."""),
        table(("ranked by", *(f"like {NAMES[target]}, Dice@5" for target in targets)), rows),
        *(folded(f"Like {NAMES[target]}: other measures", _more_measures(retrieval, target)) for target in targets),
    )


_GROUPS = {
    "The codes": ("normal", "abnormal", "both"),
    "Without the network": ("random", "slice_level", "pixel_l2", "local_contrast", "pca"),
    "The network otherwise": ("z_e_normal", "z_e_abnormal", "segmentation"),
    "By the true labels": ("lesion_grid", "oracle_normal", "oracle_abnormal", "oracle_whole", "oracle_both"),
}


def _selectivity_row(metrics: Table, method: str, targets: list[str]) -> list[str]:
    retrieval, cells = metrics["retrieval"], [METHODS[method]]
    for target in targets:
        floor, beside = FLOOR.get((method, target)), ""
        if floor in retrieval:
            word = "its oracle" if "both" in (method, target) else "floor"
            mean, low, high = metrics["comparisons"][target]["dice@5"][f"{method} vs {floor}"]["difference"]
            beside = f"""<small>{word} {retrieval[floor][target]["dice@5"].mean:.3f}</small>
                <small>less it {mean:+.3f}, {low:+.3f} to {high:+.3f}</small>"""
        cells.append(number(retrieval[method][target]["dice@5"], 3) + beside)
    return cells


_MEASURES = {
    "dice@1": "Dice@1", "dice@10": "Dice@10", "dice@5 one per patient": "Dice@5, one hit a patient",
    "zero_dice@5": "Dice@5, absent classes as 0", "whole_dice@5": "whole-lesion Dice@5",
    "aligned_dice@5": "Dice@5, lesions moved to the same place", "area_similarity@5": "likeness of class areas@5",
    "ndcg@10": "nDCG@10", "recall of ideal@10": "share of the ideal 10 found",
}


def _more_measures(retrieval: Table, target: str) -> str:
    methods = [name for name in ("normal", "abnormal", "both", "pixel_l2", "random", f"oracle_{target}")]
    known = retrieval["random"][target]
    titles = {name: title for name, title in _MEASURES.items() if name in known}
    titles |= {name: name.replace("map", "mAP") for name in known if name.startswith(("map", "precision@5 ("))}
    rows = [
        [title, *(number(retrieval[method][target][name], 3) for method in methods)] for name, title in titles.items()
    ]
    return table(("measure", *(METHODS[method] for method in methods)), rows)


def _mixed(metrics: Table) -> str:
    mixed = metrics["mixed"]
    if not mixed:
        return ""
    targets = ("anatomy of A", "lesion of B", "anatomy of B", "lesion of A")
    rows = [[method, *(number(mixed[method][target]["dice@5"], 3) for target in targets)]
            for method in mixed if not method.endswith("vs pure")]
    ratios = (mixed[mix][target]["ratio"] for mix in ("mixed vs pure", "oracle vs pure") for target in targets[:2])
    anatomy, lesion, *best = (number(Interval(*(100 * part for part in ratio)), 0, " %") for ratio in ratios)
    return section(
        "Anatomy of one patient with the lesion of another",
        paragraph(f"""A query can be put together from two images: the normal code of A with the abnormal code of B,
            another patient drawn by chance. The mix keeps {anatomy} of what the normal code alone finds of A's
            anatomy, and {lesion} of what the abnormal code alone finds of B's lesion. No reference need be like both:
            a ranking by both true overlaps keeps {best[0]} and {best[1]} of what rankings by either find."""),
        table(("ranked by", *(f"{target}, Dice@5" for target in targets)), rows),
    )


def _decomposition(metrics: Table, figures: dict[str, Path]) -> str:
    counterfactual = metrics["counterfactual"]
    truth = counterfactual.get("images")
    known = " The true lesion-free image is known because these patients are synthetic." if truth else ""
    parts = [figure(figures, "decomposition", f"""Held-out slices, what the network paints from both codes (x̂⁺) and
        from the normal code alone (x̂⁻), and the labels it predicts; from the largest lesion to small ones, chosen by
        rank, and one slice without. This is Figure E.1 of Kobayashi et al. (2020).{known}""")]
    if counterfactual:
        left = {image: number(area, 0, " %") for image, area in counterfactual["lesion left in percent"].items()}
        parts.append(paragraph(f"""Of the lesion area that it finds in the input x, the network's own segmentation still
            finds {left["x + x_minus - x_plus"]} in x less the painted lesion (x + x̂⁻ - x̂⁺), and
            {left["x_minus"]} in x̂⁻ itself, where it also misjudges that paintings are smooth. This asks the network about itself: it is a check, no proof."""))
    if truth:
        rows = [[_IMAGES[name], *(number(found[key], digits) for key, (_, digits) in _AGAINST_TRUTH.items())]
                for name, found in truth.items()]
        parts.append("<h3>Against the true lesion-free image</h3>\n")
        parts.append(table(("image", *(title for title, _ in _AGAINST_TRUTH.values())), rows))
    return section("What the network takes for the lesion, and what is left without it", *parts)


_IMAGES = {
    "x_minus": "x̂⁻", "x": "the input itself", "blurred": "input, lesion blurred away (knows the label)",
    "ceiling": "x̂⁻ of the true lesion-free image",
}
_AGAINST_TRUTH = {
    "psnr inside": ("PSNR inside the lesion, dB", 1), "psnr gain inside": ("gain over the input, dB", 1),
    "near percent": ("share of the way to the truth, %", 0), "ssim inside": ("SSIM inside", 2),
    "psnr outside": ("PSNR outside, dB", 1), "ssim outside": ("SSIM outside", 2),
}


def _findings(metrics: Table, config: dict[str, Any]) -> str:
    segmentation = metrics["segmentation"]
    score = """minus the paper's ‖z<sub>e</sub>⁺ − e⁺‖² (equation 3), mean over cells: lesions lie near the codes, cells
        without one away from them"""
    if config["model"]["nothing_threshold"]:
        score = """the largest ‖z<sub>e</sub>⁺‖² of its cells: those without a finding are drawn to 0, where the paper
            pushes them away from all codes (‖z<sub>e</sub>⁺ − e⁺‖², equation 3)"""
    rows = [[f"Dice, {html.escape(name)}", number(value)] for name, value in segmentation["dice"].items()]
    rows += [[f"share of {name}", number(value)] for name, value in segmentation.items() if name != "dice"]
    rows += [[_SCORES[name], number(value)] for name, value in metrics["abnormality"].items()]
    return section(
        "Finding lesions",
        paragraph(f"""The predicted labels and the abnormality score are by-products; they show what the abnormal code
            can know. Dice is taken over all slices of a patient together. The abnormality score of a slice is
            {score}. Beside it stand two scores by the predicted labels."""),
        table(("measure", "value"), rows),
    ) if rows else ""


_SCORES = {
    "auroc": "AUROC of the abnormality score", "auroc of predicted area": "AUROC of the predicted lesion area",
    "auroc of lesion probability": "AUROC of the predicted lesion probability, summed",
}


def _details(metrics: Table) -> str:
    agreement = metrics["agreement"]
    parts = []
    measures = [name for name in _AGREEMENT if name in agreement.get("random", {})]
    if measures:
        rows = [[METHODS[method], *(number(agreement[method][name]) for name in measures)]
                for method in ("normal", "abnormal", "both", "pixel_l2", "random")]
        head = ("ranked by", *(_AGREEMENT[name] for name in measures))
        parts += ["<h3>Agreement of the five nearest</h3>\n", table(head, rows)]
    for column, methods in metrics["columns"].items():
        names = ("precision@1", "precision@5", "precision@10", "map")
        rows = [[METHODS[method], *(number(found[name], 3) for name in names)] for method, found in methods.items()]
        parts += [f"<h3>Same {html.escape(column)}</h3>\n", paragraph("""The codes are not trained on this column:
            published methods that are can't be compared at face value."""),
            table(("ranked by", *names[:3], "mAP"), rows)]
    for by, thirds in metrics["strata"].items():
        parts += [f"<h3>By {by}</h3>\n", _strata_table(thirds)]
    return section("Closer looks", *parts)


_AGREEMENT = {
    "presence@5": "agree in having a lesion", "side@5": "lesion on the same side of the image",
    "height error in mm@5": "height error, mm",
}


def _strata_table(thirds: Table) -> str:
    rows = []
    for third, found in thirds.items():
        low, high = found["from_to"]
        for method in ("normal", "abnormal", "pixel_l2"):
            cells = (found.get(method, {}).get(target, {}).get(measure) for target, measure in _STRATA)
            rows.append([third, METHODS[method], *(number(cell, 3) if cell else "" for cell in cells)])
        rows[-3][0] += f"<small>{low:.3g} to {high:.3g}</small>"
    return table(("third", "ranked by", *_STRATA.values()), rows)


_STRATA = {
    ("abnormal", "dice@5"): "lesion Dice@5", ("abnormal", "whole_dice@5"): "whole-lesion Dice@5",
    ("normal", "dice@5"): "anatomy Dice@5",
}


def _network(metrics: Table, figures: dict[str, Path], config: dict[str, Any]) -> str:
    nothing = """ In the abnormal codebook one code stands for cells without a finding; it should take nearly all cells
        of lesion-free slices.""" if config["model"]["nothing_threshold"] else ""
    rows = [
        [path, str(book["size"]), kind, str(use["used"]), number(use["perplexity"], 1),
         number(100 * use["most common"], 0, " %")]
        for path, book in metrics["codebooks"].items() for kind, use in book.items() if kind != "size"
    ]
    return section(
        "Inside the network",
        figure(figures, "training", "Losses, validation measures and perplexity of the codebooks by training step."),
        table(("codebook", "codes", "over", "in use", "perplexity", "most common code"), rows),
        figure(figures, "codebooks", f"How often each code is used.{nothing}"),
    )


def _reading(protocol: Table) -> str:
    return section("How to read the numbers", f"""<ul>
<li><b>Relevance</b> is the overlap of label maps: Dice per class between query and hit, averaged over lesion classes
or over anatomical regions. A class that neither slice has is skipped; counting it as 0, as others do, is given
beside.</li>
<li><b>Queries</b> for the lesion are the slices that have one, for the anatomy all slices. Slices without a label are
left out. No patient is both query and reference.</li>
<li><b>Intervals</b>: scores are averaged per patient, then over patients; {protocol["bootstrap samples"]:,} bootstrap
resamples of patients. Differences and ratios take the same resamples on both sides.</li>
<li><b>Average precision</b> sees the first {protocol["ranking depth"]:,} hits; the Dice from which a slice counts as
relevant is in its name.</li>
<li><b>Floors and ceilings</b>: random order, nearest slice height, pixels; oracles that search by the true
labels.</li>
</ul>
""")


def _limits(metrics: Table) -> str:
    synthetic = """<li>These patients are synthetic: lesions are drawn into one template's anatomy. The numbers say
that the method works, not how well it would on patients.</li>
""" if metrics["provenance"]["settings"]["source"] == "phantom" else ""
    return section("Limits", f"""<ul>
<li>Dice rewards the same place and size; two lesions of one kind in different places score 0. The Dice of lesions
moved to the same place, and the likeness of areas, look past the place.</li>
<li>Single slices, not volumes; overlap of labels, not diagnosis, outcome or what a reader finds useful.</li>
<li>Intervals cover the choice of patients, not of training run, hospital or scanner.</li>
{synthetic}<li><b>Not a medical device.</b> Not for diagnosis or treatment.</li>
</ul>
""")


def _provenance(metrics: Table, config: dict[str, Any]) -> str:
    provenance, protocol = dict(metrics["provenance"]), metrics["protocol"]
    settings = {"Preparation of the data": provenance.pop("settings"), "Configuration of the run": config}
    rows = [[name.replace("_", " "), f"<code>{html.escape(str(value))}</code>"] for name, value in provenance.items()]
    rows += [[name, ", ".join(f"{count:,} {what}" for what, count in protocol[name].items())]
             for name in ("queries", "references")]
    rows.append(["split searched", html.escape(protocol["reference split"])])
    written = {name: html.escape(json.dumps(values, indent=1)) for name, values in settings.items()}
    blocks = (folded(name, f"<pre>{values}</pre>") for name, values in written.items())
    return section("Where this comes from", table(("what", "value"), rows), *blocks, """<p class="fine">All numbers,
with intervals: metrics.json and metrics.csv beside this page. Method: K. Kobayashi et al., Decomposing normal and
abnormal features of medical images for content-based image retrieval, 2020.</p>
""")
