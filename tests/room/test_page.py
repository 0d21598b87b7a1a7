"""The page in Chromium, by hand and by keys."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from decomp_jax.retrieval import CodeBank
from tests.conftest import run_python, start_python
from tests.room.browser import CHROMIUM, Browser
from tests.room.test_serve import PROGRAM
from tests.room.test_upload import AFFINE, patient, series

__all__ = ["series"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page was NOT TESTED: no chromium here; apt-get install it")
EVIL = "<img src=x onerror=window.pwned=1>"
STATE = "(async () => (await import('/state.js')).state{})()"
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, phantom: Path) -> Path:
    out = tmp_path_factory.mktemp("bank") / "bank"
    done = run_python("evaluate.py", "encode", "--workdir=models/phantom64", f"--data={phantom}", "--split=train",
                      f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def address(bank: Path) -> Iterator[str]:
    program = start_python("evaluate.py", "serve", "--workdir=models/phantom64", f"--bank={bank}")
    try:
        yield program.stdout.readline().strip()
    finally:
        program.terminate()
        program.communicate(timeout=200)


@pytest.fixture
def page(address: str) -> Iterator[Browser]:
    with Browser() as page:
        enter(page, address)
        yield page
        assert not page.problems


def enter(page: Browser, address: str) -> None:
    page.open(address)
    page.wait("document.querySelector('.patients button')", 300)
    page.run("window.saved = []; const make = URL.createObjectURL.bind(URL);"
             "URL.createObjectURL = (blob) => { saved.push(blob); return make(blob); }; 0")


def shown(page: Browser) -> list[int]:
    return page.run("[...document.querySelectorAll('#answers .thumbs canvas')].map((c) => Number(c.dataset.row))")


def ask(page: Browser, key: str) -> list[int]:
    """Rows in sight after a key that asks."""
    before = page.run(STATE.format(".log.length"))
    page.key(key)
    end = time.monotonic() + 200
    while page.run(STATE.format(".log.length")) == before:
        assert time.monotonic() < end, page.run(STATUS)
    rows = page.run(STATE.format(".log.at(-1).rows"))
    while sorted(shown(page)) != sorted(rows):
        assert time.monotonic() < end, page.run(STATUS)
    return rows


def test_a_session_from_the_first_look_to_its_reopening(page: Browser, address: str, tmp_path: Path) -> None:
    page.click(".patients li:nth-child(2) button")
    page.wait("document.querySelector('canvas[data-tile=image]')")
    by_anatomy, by_both, by_lesion = (ask(page, key) for key in "123")
    assert len({tuple(rows) for rows in (by_anatomy, by_both, by_lesion)}) == 3
    page.key("ArrowRight")
    page.wait("document.activeElement.matches('#answers .thumb')")
    page.key("m")
    second = page.run(STATE.format(".hit"))
    assert list(page.run(STATE.format(".marks"))) == [str(second)] and second in by_lesion
    page.key("a")  # the anatomy of the second hit, the lesion of the image on the desk
    page.run("document.activeElement.blur()")
    mixed = ask(page, "Enter")
    question = page.run(STATE.format(".log.at(-1).question"))
    assert question["anatomy"] == {"row": second} != question["lesion"] and mixed != by_both
    page.key("c")
    page.wait("!document.getElementById('compare').hidden")
    page.key("f")
    page.key("x")
    page.key("Escape")
    page.click("#save-session")
    page.wait("saved.length")
    session = page.run("saved[0].text()")
    assert set(json.loads(session)) >= {"model", "bank", "state"} and len(json.loads(session)["state"]["log"]) == 4
    (tmp_path / "session.json").write_text(session)
    page.click("#save-hits")
    hits = page.run("saved[1].text()").split("\r\n")
    assert [int(line.split(",")[1].strip('"')) for line in hits[1:-1]] == mixed
    page.click("#save-sheet")
    page.wait("saved.length > 2")
    assert page.run("saved[2].type") == "image/png" and page.run("saved[2].size") > 10_000
    page.open("about:blank")
    enter(page, address)
    page.choose("#session-file", tmp_path / "session.json")
    page.wait(f"{STATUS}.includes('questions asked again')")
    assert "4 questions asked again, all with the same answers" in page.run(STATUS)
    assert sorted(shown(page)) == sorted(mixed)


def test_anatomy_of_this_and_lesion_of_that_by_the_mouse(page: Browser) -> None:
    page.click(".patients li:nth-child(2) button")
    page.wait("document.querySelector('canvas[data-tile=image]')")
    page.drag("#tiles .tile:first-child .caption", "[data-key=lesion]")
    page.wait("document.querySelector('[data-key=lesion].full')")
    own = page.run(STATE.format(".question.lesion"))
    rows = ask(page, "3")
    page.drag(f"[data-key=hit-{rows[1]}]", "[data-key=anatomy]")
    page.wait(STATE.format(f".question.anatomy.row === {rows[1]}"))
    question = page.run(STATE.format(".question"))
    assert question["lesion"] == own == page.run(STATE.format(".shown")) and question["share"] == 0.5
    page.run("document.activeElement.blur()")
    mixed = ask(page, "Enter")
    assert page.run(STATE.format(".log.at(-1).question.anatomy")) == {"row": rows[1]} and mixed != rows
    page.drag(".strip .thumb.chosen", "[data-key=anatomy]")
    page.wait(STATE.format(f".question.anatomy.row === {own['row']}"))
    page.drag(f"[data-key=hit-{mixed[0]}]", "#answers .tabs")  # no place for it
    assert page.run(STATE.format(".question.anatomy")) == own and not page.run("document.querySelector('.over')")


def test_a_scan_is_brought_and_asked_with_for_slices_and_patients(page: Browser, address: str, tmp_path: Path) -> None:
    affine = np.diag([2.0, 2, 4, 1])
    affine[2, 3] = -40
    nib.save(nib.Nifti1Image(brain(), affine), tmp_path / "mine.nii.gz")
    page.choose("#file", tmp_path / "mine.nii.gz")
    page.wait("document.querySelector('#tiles .note')?.innerText.startsWith('mine, ')")
    scan = page.run(STATE.format(".shown"))
    page.key("PageUp")
    page.wait(f"document.querySelector('#tiles .note')?.innerText.startsWith('mine, {int(scan['name'][6:]) + 1}')")
    assert len(ask(page, "1")) > 10
    page.key("4")
    page.wait("document.querySelectorAll('#answers canvas[data-slice]').length == 6")
    asked = page.run(STATE.format(".log.at(-1)"))
    assert asked["patients"] == {"scan": scan["scan"], "share": 0} and len(asked["ids"]) == 6
    page.wait("document.querySelectorAll('#answers .thumb[data-key]').length > 6")
    page.key("ArrowRight")
    page.wait("document.querySelector('.detail')")
    page.click("#save-session")
    page.wait("saved.length")
    (tmp_path / "session.json").write_text(page.run("saved[0].text()"))
    page.open("about:blank")
    enter(page, address)
    page.choose("#session-file", tmp_path / "session.json")
    page.wait(f"{STATUS}.includes('questions asked again')")
    assert "2 questions asked again, all with the same answers" in page.run(STATUS)


def brain() -> np.ndarray:
    x, y, z = np.mgrid[-1:1:70j, -1:1:80j, -1:1:24j]
    values = np.random.default_rng(0).integers(80, 120, x.shape).astype(np.int16)
    return np.where((x / 0.9) ** 2 + (y / 0.95) ** 2 + z**2 < 1, values, 0).astype(np.int16)


TWO_MODALITIES = """
from decomp_jax.data.schema import Settings
from decomp_jax.errors import run_program
from decomp_jax.retrieval import CodeBank
from decomp_jax.room.serve import serve_room
from decomp_jax.room.session import Room
from tests.inference.networks import random_network
from tests.room.test_session import Noise
settings = Settings("brats", 16, modalities=("t1ce", "flair"))
network, noise = random_network(settings), Noise(settings)
bank = CodeBank.from_arrays(**vars(network.encode(noise.fields["image"])), rows=noise.rows,
                            normal_codebook=network.normal_codebook, abnormal_codebook=network.abnormal_codebook)
Room.warm_up = lambda self: []
run_program(lambda: serve_room(Room(network, bank, noise, bank_digest=""), 0))
"""
PICTURE = "document.querySelector('canvas[data-tile=image]').toDataURL()"


def test_modalities_are_told_apart_by_name_or_by_the_reader(tmp_path: Path, series: list[bytes]) -> None:
    """Two NIfTI files, and the same scan as a DICOM series and a NIfTI file, whose names tell nothing."""
    for kind in ("t1ce", "flair"):
        image = nib.Nifti1Image(getattr(patient(0), kind), AFFINE)
        image.header.set_qform(AFFINE, 1)
        nib.save(image, tmp_path / f"p_{kind}.nii.gz")
    (tmp_path / "p_flair.nii.gz").replace(tmp_path / "p_t2f.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "p_t2f.nii.gz").read_bytes())
    files = []
    for i, data in enumerate(series):
        files.append(tmp_path / f"IM{i}")
        files[-1].write_bytes(data)
    process = start_python("-c", TWO_MODALITIES)
    try:
        with Browser() as page:
            enter(page, process.stdout.readline().strip())
            page.choose("#file", tmp_path / "p_t2f.nii.gz", tmp_path / "p_t1ce.nii.gz")
            page.wait("document.querySelector('#tiles .note')?.innerText.startsWith('p_t1ce, ')", 60)
            first, scan = page.run(PICTURE), page.run(STATE.format(".shown.scan"))
            page.key("h")
            page.wait(f"document.querySelector('[data-key=channel]').value === '1' && {PICTURE} !== '{first}'")
            (tmp_path / "folder" / "flair").mkdir(parents=True)
            for i, file in enumerate(files):
                (tmp_path / "folder" / "flair" / f"IM{i}").write_bytes(file.read_bytes())
            (tmp_path / "folder" / ".DS_Store").write_text("of the folder")
            page.drop(tmp_path / "folder", tmp_path / "p_t1ce.nii.gz")
            page.wait(STATE.format(f".shown.scan !== '{scan}'"))
            assert page.run(STATE.format(".shown.name")).startswith("p_t1ce, ")
            page.choose("#file", *files)
            page.wait("document.getElementById('bring').open")
            assert page.run("document.querySelector('[data-key=take]').disabled")
            page.choose("[data-key=choose-t1ce] input", *files)
            page.wait("document.getElementById('bring').innerText.includes('5 files')")
            page.choose("[data-key=choose-flair] input", tmp_path / "b.nii.gz")
            page.click("[data-key=take]:not([disabled])")
            page.wait("document.querySelector('#tiles .note')?.innerText.startsWith('DICOM, ')", 60)
            assert page.run(STATE.format(".shown.scan")) == scan, "the same scan"
            state = json.dumps(page.run(STATE.format("")))
            assert not page.problems and not [path.name for path in files if path.name in state]
            # A network that allows for missing modalities, the first one missing; here the server still refuses.
            page.run("import('/state.js').then(({facts}) => { facts.incomplete = true; })")
            page.choose("#file", tmp_path / "b.nii.gz")
            page.wait("document.getElementById('bring').open")
            page.choose("[data-key=choose-flair] input", tmp_path / "b.nii.gz")
            page.click("[data-key=take]:not([disabled])")
            page.wait("document.querySelector('#status.error')")
            assert "bring all of them" in page.run(STATUS)
    finally:
        process.terminate()
        process.communicate(timeout=200)


def test_what_can_not_be_read_is_told_by_its_name(page: Browser, tmp_path: Path) -> None:
    (tmp_path / "mine.nii").write_text("nothing")
    page.choose("#file", tmp_path / "mine.nii")
    page.wait("document.querySelector('#status.error')")
    assert page.run(STATUS) == "“mine.nii”: is no NIfTI file; copy or download it again"
    page.key("Escape")
    page.wait("!document.querySelector('#status.error')")
    (tmp_path / "session.json").write_text('{"format": 1, "state": null}')
    page.choose("#session-file", tmp_path / "session.json")
    page.wait("document.querySelector('#status.error')")
    assert "is no session of a reading room" in page.run(STATUS)
    assert [problem for problem in page.problems if "400" not in problem] == []
    page.problems.clear()


def test_a_click_is_not_lost_when_images_arrive(page: Browser) -> None:
    """The page is drawn anew between a button's press and its release."""
    page.click(".patients li:nth-child(2) button")
    page.wait("document.querySelector('canvas[data-tile=image]')")
    x, y, width, height = page.box("[data-key=view-codes]")
    page.mouse("mousePressed", x + width / 2, y + height / 2)
    page.run("import('/state.js').then(({change}) => change())")
    page.run("new Promise((done) => setTimeout(done, 200))")
    page.mouse("mouseReleased", x + width / 2, y + height / 2)
    page.wait(STATE.format(".view.codes"))
    page.wait("document.querySelector('[data-key=view-codes]').getAttribute('aria-pressed') === 'true'")


def test_more_hits_are_shown_when_asked_for(page: Browser) -> None:
    page.click(".patients li:nth-child(2) button")
    page.wait("document.querySelector('canvas[data-tile=image]')")
    assert len(ask(page, "2")) == 60
    page.click("[data-key=more-hits]")
    page.wait("document.querySelectorAll('#answers .thumb').length > 60")
    assert page.run("Boolean(document.querySelector('[data-key=more-hits]'))") is False
    page.click("#save-sheet")
    page.wait("saved.length")
    lines = -(-(len(shown(page)) + 2) // 6)
    size = page.run("createImageBitmap(saved[0]).then((sheet) => [sheet.width, sheet.height])")
    assert size == [1270, 86 + 250 * lines]


def test_strokes_have_no_gaps_and_end_anywhere(page: Browser) -> None:
    page.click(".patients li:nth-child(1) button")
    page.wait("document.querySelector('canvas[data-tile=image]')")
    page.key("d")
    left, top, width, height = page.box("canvas[data-tile=image]")
    points = [(0.3, 0.3), (0.7, 0.35), (0.35, 0.6), (1.3, 1.4)]  # far apart, and out of the image
    places = [(left + x * width, top + y * height) for x, y in points]
    page.mouse("mousePressed", *places[0])
    for place in places[1:]:
        page.mouse("mouseMoved", *place)
    page.mouse("mouseReleased", *places[-1])
    page.wait("document.getElementById('tiles').innerText.includes('Painted with the drawn lesion')")
    runs = page.run(STATE.format(".drawing"))
    drawn = np.repeat(runs[::2], runs[1::2]).reshape(64, 64)
    assert ndimage.label(drawn)[1] == 1 and (drawn > 0).sum() > 150
    for place in places:  # the pen is up
        page.mouse("mouseMoved", *place)
    assert page.run(STATE.format(".drawing")) == runs
    by_drawing = ask(page, "3")
    assert page.run(STATE.format(".log.at(-1).question.lesion.drawing")) == runs and by_drawing
    page.key("z", modifiers=2)  # the share
    page.key("z", modifiers=2)  # the stroke
    assert page.run(STATE.format(".drawing")) is None


def test_a_lesion_is_drawn_by_keys_alone(page: Browser) -> None:
    page.click(".patients li:nth-child(1) button")
    page.wait("document.querySelector('canvas[data-tile=image]')")
    for key in ("d", " ", *["ArrowRight"] * 6, *["ArrowDown"] * 4, " "):
        page.key(key)
    runs = page.run(STATE.format(".drawing"))
    drawn = np.repeat(runs[::2], runs[1::2]).reshape(64, 64)
    assert ndimage.label(drawn)[1] == 1 and drawn[32, 38] and drawn[36, 38] and not drawn[36, 30]


def test_what_a_file_says_is_text(tmp_path: Path) -> None:
    """A patient id and a column's value that are HTML."""
    program = PROGRAM.replace("decomposer =", f"""
kinds = heads.rows.dtype
heads.rows = heads.rows.astype([(name, "U64" if kinds[name].kind == "U" else kinds[name]) for name in kinds.names])
heads.rows["patient_id"][3:] = heads.rows["tumour"][3:] = {EVIL!r}
decomposer =""")
    process = start_python("-c", program)
    try:
        address = process.stdout.readline().strip()
        with Browser() as page:
            enter(page, address)
            page.run("[...document.querySelectorAll('.patients button')].find((b) => b.innerText.includes('<img'))"
                     ".click()")
            page.wait("document.querySelector('canvas[data-tile=image]')")
            ask(page, "1")
            page.click("[data-key=others]")
            ask(page, "Enter")
            page.key("m")
            page.click("[data-key=tab-marked]")
            assert EVIL in page.run("document.body.innerText")
            assert page.run("document.images.length") == 0 and page.run("window.pwned") is None
            assert not page.problems
            page.run("document.body.append(Object.assign(document.createElement('script'),"
                     " {textContent: 'window.pwned=1'}))")
            assert page.run("window.pwned") is None, "and were it not, the policy holds"
    finally:
        process.terminate()
        process.communicate(timeout=200)


def test_a_bank_without_its_images_says_so(bank: Path, tmp_path: Path) -> None:
    CodeBank.concat([CodeBank.load(bank)] * 2).save(tmp_path / "bank")
    process = start_python("evaluate.py", "serve", "--workdir=models/phantom64", f"--bank={tmp_path / 'bank'}")
    try:
        address = process.stdout.readline().strip()
        with Browser() as page:
            enter(page, address)
            assert "images not at hand" in page.run("document.getElementById('archive-name').innerText")
            page.click(".patients li:nth-child(1) button")
            page.wait("document.getElementById('tiles').innerText.includes('Painted from its codes')")
            assert len(ask(page, "2")) > 10 and not page.problems
    finally:
        process.terminate()
        process.communicate(timeout=200)
