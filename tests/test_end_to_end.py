"""The programs as a user calls them, on a tiny phantom: train, encode, search, query, report."""

import csv
import dataclasses
import json
import signal

import jax
import nibabel
import numpy as np
import pytest

from decomp_jax.data.records import SliceDataset
from decomp_jax.errors import UserError
from decomp_jax.files import sealed
from decomp_jax.inference.decomposer import Decomposer
from decomp_jax.inference.export import export_run
from decomp_jax.training.checkpoint import restore_for_inference, write_exported
from tests.conftest import run_python, start_python

TINY = (
    "--config=configs/demo.py", "--config.train.steps=6", "--config.train.batch_size=8", "--config.train.eval_every=0",
    "--config.model.widths=(4,4,8)", "--config.model.code_dim=4", "--config.model.codebook_size=8",
)


def run(*arguments):
    done = run_python(*arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def work(phantom, tmp_path_factory):
    """A trained run and its two banks."""
    folder = tmp_path_factory.mktemp("work")
    run("train.py", *TINY, f"--workdir={folder}/run", f"--config.data.dir={phantom}")
    for split in ("query", "reference"):
        done = run("evaluate.py", "encode", f"--workdir={folder}/run", f"--data={phantom}", f"--split={split}", f"--out={folder}/{split}")
        assert "WARNING:absl" not in done.stderr
    return folder


def load(bank, path):
    codebook = np.load(bank / f"{path}_codebook.npy").astype(np.float64)
    indices = np.load(bank / f"{path}_indices.npy")
    return codebook[indices].reshape(len(indices), -1)


@pytest.mark.parametrize("by", ["normal", "abnormal", "both"])
def test_search_equals_brute_force_over_the_exported_arrays(work, by):
    out = work / f"{by}.csv"
    run("evaluate.py", "search", f"--bank={work}/reference", f"--queries={work}/query", f"--by={by}", "--k=5", f"--out={out}")
    paths = ("normal", "abnormal") if by == "both" else (by,)
    query, reference = (np.hstack([load(work / split, path) for path in paths]) for split in ("query", "reference"))
    distances = ((query[:, None] - reference[None]) ** 2).sum(-1)
    order = np.argsort(np.round(distances, 9), axis=1, kind="stable")[:, :5]
    rows = np.load(work / "reference" / "rows.npy")
    with out.open() as file:
        hits = list(csv.DictReader(file))
    assert len(hits) == 5 * len(query)
    for hit in hits:
        q, rank, row = int(hit["query"]), int(hit["rank"]) - 1, int(hit["row"])
        assert distances[q, row] == pytest.approx(distances[q, order[q, rank]], rel=1e-6, abs=1e-9)
        assert float(hit["distance"]) == pytest.approx(distances[q, row], rel=1e-5, abs=1e-6)
        assert hit["patient_id"] == rows["patient_id"][row] and int(hit["slice_index"]) == rows["slice_index"][row]


def test_mixed_queries_by_pairs(work):
    pairs = work / "pairs.csv"
    pairs.write_text("normal_row,abnormal_row\n0,3\n5,1\n")
    out = work / "mixed.csv"
    run("evaluate.py", "search", f"--bank={work}/reference", f"--queries={work}/query", "--by=both", "--k=3",
        f"--pairs={pairs}", "--exclude_same_patient", "--one_per_patient", f"--out={out}")
    lines = list(csv.DictReader(out.open()))
    assert {line["query"] for line in lines} == {"0", "1"}
    for query in "01":
        patients = [line["patient_id"] for line in lines if line["query"] == query]
        assert len(patients) == len(set(patients))


def test_report_leaves_page_numbers_and_figures(work, phantom):
    out = work / "report"
    run("evaluate.py", "report", f"--workdir={work}/run", f"--data={phantom}", f"--out={out}")
    metrics = json.loads((out / "metrics.json").read_text())
    for method in ("normal", "abnormal", "both", "random", "pixel_l2", "oracle_normal", "oracle_abnormal"):
        for target in ("normal", "abnormal"):
            value = metrics["retrieval"][method][target]["dice@5"]
            assert 0 <= value["mean"] <= 1
            assert value["low"] is value["high"] is None  # of the few patients of this data set
    assert "<html" in (out / "index.html").read_text() and list((out / "figures").glob("*.png"))
    assert (out / "metrics.csv").read_text().count("\n") > 20


def test_query_with_an_unsegmented_scan(work, phantom, tmp_path):
    """A scan made of a phantom slice: its own slice in the bank is the nearest."""
    dataset = SliceDataset(phantom, "reference")
    image = dataset[4]["image"][..., 0].astype(np.float32)
    volume = np.repeat((image * 1000)[:, ::-1].T[:, ::-1][..., None], 4, axis=2)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "scan.nii.gz")
    run("evaluate.py", "query", f"--workdir={work}/run", f"--bank={work}/reference", f"--image={tmp_path}/scan.nii.gz",
        "--slice=1", "--by=normal", "--k=4", f"--out={tmp_path}/out")
    lines = list(csv.DictReader((tmp_path / "out" / "hits.csv").open()))
    assert [line["rank"] for line in lines] == ["1", "2", "3", "4"]
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 10_000


def test_painting_an_images_own_codes_gives_its_x_plus(work, phantom):
    decomposer = Decomposer.restore(work / "run")
    images = SliceDataset(phantom, "query").stack(("image",), range(5))["image"]
    output = decomposer.decompose(images)
    codes = decomposer.encode(images)
    np.testing.assert_array_equal(codes.normal_indices, output.normal_indices)
    np.testing.assert_array_equal(codes.abnormal_indices, output.abnormal_indices)
    painted = decomposer.paint(output.normal_indices, output.abnormal_indices)
    np.testing.assert_allclose(painted, output.x_plus, atol=1e-4)


def test_an_exported_run_is_the_run(work, phantom, tmp_path):
    """After the report, which the model card quotes: the same codes and parameters."""
    out = tmp_path / "model"
    command = ("export", f"--workdir={work}/run", f"--data={phantom}", f"--report={work}/report", f"--out={out}")
    run("evaluate.py", *command)
    ours, theirs = (Decomposer.restore(folder) for folder in (out, work / "run"))
    assert ours.model_digest == theirs.model_digest
    images = SliceDataset(phantom, "query").stack(("image",), range(5))["image"]
    for a, b in zip(*(dataclasses.astuple(decomposer.encode(images)) for decomposer in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)
    card = (out / "README.md").read_text()
    report = json.loads((work / "report" / "metrics.json").read_text())
    assert f"{report['retrieval']['abnormal']['abnormal']['dice@5']['mean']:.3f}" in card and "seed=3" in card
    assert (out / "failures.png").read_bytes() == (work / "report" / "figures" / "failures.png").read_bytes()
    assert str(phantom) not in (out / "meta.json").read_text()
    again = run_python("evaluate.py", *command)
    assert again.returncode == 2 and "exists already" in again.stderr
    exported, kept = (restore_for_inference(folder)[0] for folder in (out, work / "run"))
    for name in exported:  # what --config.train.init_from takes
        jax.tree.map(np.testing.assert_array_equal, exported[name], kept[name])


def test_a_damaged_export_is_told(work, tmp_path):
    (tmp_path / "model").mkdir()
    write_exported(tmp_path / "model", *restore_for_inference(work / "run"))
    file = tmp_path / "model" / "parameters.npz"
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 256] = bytes(256)  # more than one header, of which not every byte matters
    file.write_bytes(data)
    with pytest.raises(UserError, match="parameters.npz: damaged"):
        restore_for_inference(tmp_path / "model")


@pytest.mark.parametrize("text, says", [
    (None, "not found"),
    ('{"retrieval": {"normal"', "not JSON that can be read"),
    ("[]", "not a JSON object"),
    ('{"retrieval": {}}', "its digest does not hold"),
    (json.dumps({**sealed({"slices": 80}), "slices": 90}), "its digest does not hold"),
])
def test_a_damaged_report_is_told(work, phantom, tmp_path, text, says):
    if text is not None:
        (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=f"^{tmp_path}/metrics.json: .*{says}.*; write the report again with"):
        export_run(work / "run", phantom, [tmp_path], tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "command, says",
    [
        (("encode", "--workdir={w}/run", "--data={w}", "--split=query", "--out={w}/x"), "manifest.json: not found"),
        (("encode", "--workdir={w}", "--data={p}", "--split=query", "--out={w}/x"), "no checkpoints here"),
        (("encode", "--workdir={w}/run", "--data={p}", "--split=query", "--out={w}/query"), "exists already"),
        (("search", "--bank={w}/none", "--queries={w}/query", "--by=both", "--out={w}/x"), "none"),
        (("export", "--workdir={w}/run", "--data={p}", "--report={w}", "--out={w}/x"), "metrics.json: not found"),
        (("query", "--workdir={w}/run", "--bank={w}/query", "--image={w}/none.nii.gz", "--slice=3", "--out={w}/x"), "none.nii.gz"),
    ],
)
def test_mistakes_are_told_in_one_line(work, phantom, command, says):
    done = run_python("evaluate.py", *(part.format(w=work, p=phantom) for part in command))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert says in done.stderr.strip().splitlines()[-1]


def test_sigterm_in_encode_leaves_nothing(work, phantom, tmp_path):
    script = """
import sys, time
from decomp_jax import errors
from decomp_jax.inference import encode
append = encode.BankWriter.append
def slow(self, *codes):
    append(self, *codes)
    print("writing", flush=True)
    time.sleep(60)
encode.BankWriter.append = slow
errors.run_program(lambda: encode.encode_split(sys.argv[1], sys.argv[2], "query", sys.argv[3]))
"""
    process = start_python("-c", script, work / "run", phantom, tmp_path / "bank")
    assert process.stdout.readline() == "writing\n", process.stderr.read()
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_liver_by_ct_in_two_parts(tmp_path):
    """Data, training, report and a query of another organ, by a window, with classes of its own."""
    from tests.data_prep.test_volumes import write_liver

    write_liver(tmp_path / "src")
    for i in (1, 2):
        run("-m", "data_prep", "volumes", f"--src={tmp_path}/src", f"--out={tmp_path}/part-{i}", f"--shard={i}/2",
            "--workers=1", "--size=64", "--window=-100,250", "--field_mm=400", "--anatomy_labels=liver")
    run("-m", "data_prep", "join", f"--out={tmp_path}/all", tmp_path / "part-1", tmp_path / "part-2")
    run("train.py", *TINY, f"--workdir={tmp_path}/run", f"--config.data.dir={tmp_path}/all")
    run("evaluate.py", "report", f"--workdir={tmp_path}/run", f"--data={tmp_path}/all", f"--out={tmp_path}/report")
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["segmentation"]["dice"].keys() == {"cancer", "whole lesion"}
    assert metrics["retrieval"]["oracle_normal"]["normal"]["dice@5"]["mean"] > 0.9
    bank = f"{tmp_path}/bank"
    run("evaluate.py", "encode", f"--workdir={tmp_path}/run", f"--data={tmp_path}/all", "--split=train", f"--out={bank}")
    row = np.load(f"{bank}/rows.npy")[0]
    scan = tmp_path / "src" / "imagesTr" / f"{row['patient_id']}.nii.gz"
    run("evaluate.py", "query", f"--workdir={tmp_path}/run", f"--bank={bank}", f"--image={scan}",
        f"--slice={row['slice_index']}", "--codes", "--k=48", f"--out={tmp_path}/hits")
    nearest = next(csv.DictReader((tmp_path / "hits" / "hits.csv").open()))
    assert float(nearest["distance"]) == 0
    preprocessing = json.loads((tmp_path / "bank" / "bank.json").read_text())["preprocessing"]
    assert preprocessing["foreground"] == "window" and preprocessing["field_mm"] == 400
