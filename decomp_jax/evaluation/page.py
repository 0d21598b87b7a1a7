"""The report as one HTML file that needs nothing else: for a radiologist first, for a reviewer all the way down.

Words and layout are in `templates/`.
"""

import base64
from pathlib import Path
from typing import Any

from decomp_jax.evaluation import patients, rankers
from decomp_jax.evaluation.tables import FLOOR
from decomp_jax.inference.render import render


def write_page(
    path: Path, metrics: dict[str, Any], figures: dict[str, Path], config: dict[str, Any],
    methods: dict[str, rankers.Method], patient_methods: dict[str, patients.Method],
) -> None:
    """Writes the page.

    Args:
        metrics: what metrics.json holds: intervals as {mean, low, high}, None where a number is undefined.
        figures: PNG files by name.
        config: the settings of the run.
        methods, patient_methods: what slices and patients were ranked by.
    """
    images = {name: f"data:image/png;base64,{_base64(file)}" for name, file in figures.items()}
    path.write_text(render(
        "decomp_jax.evaluation", "report.html.jinja", metrics=metrics, figures=images, config=config,
        methods=methods, patient_methods=patient_methods, titles=metrics["protocol"]["methods"], floors=FLOOR,
    ))


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
