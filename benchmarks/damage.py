"""Damages a file of an input at random, as disks, copies, editors and other programs do; `fuzz.py` uses it."""

import copy
import gzip
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

Rng = np.random.Generator
JSON = ("metadata", "_METADATA", "_sharding", "process_0")  # of checkpoints


def damage(rng: Rng, folder: Path, sibling: Path, files: str) -> str:
    """Damages one file of `folder` -> what was done to it."""
    paths = sorted(path for path in folder.rglob(files) if path.is_file())
    path = paths[rng.integers(len(paths))]
    ways = [flip, flip, cut, replace_by_sibling, remove, garbage]
    if path.suffix == ".json" or path.name in JSON:
        ways += [change_json] * 4
    if path.suffix == ".npy":
        ways += [change_array] * 3
    if ".nii" in path.name:
        ways += [change_header] * 4
    if path.suffix == ".csv":
        ways += [change_table] * 6
    if path.suffix in (".png", ".jpg"):
        ways += [change_picture] * 3
    way = ways[rng.integers(len(ways))]
    more = way(rng, path, sibling / path.relative_to(folder))
    return f"{way.__name__} {path.relative_to(folder)} {more or ''}"


def flip(rng: Rng, path: Path, _: Path) -> str:
    data = bytearray(path.read_bytes())
    places = rng.integers(len(data), size=rng.integers(1, 5)).tolist() if data else []
    for place in places:
        data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return f"at {places}"


def cut(rng: Rng, path: Path, _: Path) -> str:
    data = path.read_bytes()
    size = int(rng.integers(max(len(data), 1)))
    path.write_bytes(data[:size])
    return f"to {size}"


def garbage(rng: Rng, path: Path, _: Path) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(2000))))


def remove(rng: Rng, path: Path, _: Path) -> None:
    path.unlink()


def replace_by_sibling(rng: Rng, path: Path, other: Path) -> None:
    """With the same file of another input, or with another file of the same suffix of this one."""
    candidates = [one for one in sorted(path.parent.glob(f"*{path.suffix}")) if one.is_file() and one != path]
    if other.is_file() and (not candidates or rng.random() < 0.6):
        shutil.copy(other, path)
    elif candidates:
        chosen = candidates[rng.integers(len(candidates))]
        path.write_bytes(chosen.read_bytes())


ODD = (None, -1, 0, 1, 3.5, 1e400, -1e400, float("nan"), "", "text", [], {}, [1, 2], {"a": 1}, True, 10**30, "\0", [[]])


def change_json(rng: Rng, path: Path, _: Path) -> str:
    values = json.loads(path.read_text())
    what = change_tree(rng, values)
    path.write_text(json.dumps(values))
    return what


def change_tree(rng: Rng, tree: Any) -> str:
    """Removes or renames a key of nested values, exchanges two values, or gives one another value or type."""
    nodes = [(node, key) for node, key in _nodes(tree)]
    node, key = nodes[rng.integers(len(nodes))]
    other_node, other_key = nodes[rng.integers(len(nodes))]
    way = rng.integers(4)
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif way == 2:
        node[key], other_node[other_key] = copy.deepcopy(other_node[other_key]), copy.deepcopy(node[key])
    else:
        node[key] = ODD[rng.integers(len(ODD))]
    return f"{('del', 'rename', 'exchange', 'value')[way]} {key}"


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _nodes(tree[key])


def change_array(rng: Rng, path: Path, _: Path) -> str:
    array = np.load(path)
    if array.dtype.names:
        changes = {
            "sort": lambda: np.sort(array, order=array.dtype.names[-1]), "reverse": lambda: array[::-1],
            "drop": lambda: array[:-1], "plain": lambda: np.zeros(len(array)),
            "column": lambda: array[list(array.dtype.names[1:])],
        }
    else:
        changes = {
            "float": lambda: array.astype(np.float64), "wide": lambda: array.astype(np.int64), "reverse": lambda: array[::-1],
            "drop": lambda: array[:-1], "transpose": lambda: array.T, "big": lambda: array.astype(array.dtype.newbyteorder(">")),
            "flat": lambda: array.ravel(), "complex": lambda: array.astype(complex), "objects": lambda: array.astype(object),
            "text": lambda: array.astype("U8"), "nan": lambda: np.where(array == array.flat[0], np.nan, array),
        }
    how = list(changes)[rng.integers(len(changes))]
    np.save(path, changes[how](), allow_pickle=True)
    if rng.random() < 0.1:
        how = "npz"
        with path.open("wb") as file:
            np.savez(file, array)
    return how


FIELDS = ("dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter", "qform_code", "sform_code",
          "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "srow_x", "srow_y", "srow_z", "magic", "sizeof_hdr")


def change_header(rng: Rng, path: Path, _: Path) -> str:
    """A field of the header, as a program that wrote it wrongly leaves it: the file's checksum holds."""
    data = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    kind = nib.Nifti1Header.template_dtype
    name = FIELDS[rng.integers(len(FIELDS))]
    field, offset = kind.fields[name][:2]
    size = field.base.itemsize
    at = offset + size * int(rng.integers(field.itemsize // size))
    odd = [0, 1, 2, 4, 16, 64, 128, 255, -1, -2, 32767, float("nan"), float("inf"), 1e-9, 1e9, 0.5]
    value = odd[rng.integers(len(odd))]
    if field.base.kind == "S":
        data[at : at + size] = rng.bytes(size)
    else:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data[at : at + size] = np.array(value, float).astype(field.base).tobytes()
    path.write_bytes(gzip.compress(bytes(data), 1) if path.suffix == ".gz" else bytes(data))
    return f"{name} {value}"


def change_table(rng: Rng, path: Path, _: Path) -> str:
    text = path.read_bytes().decode("utf-8-sig")
    lines = text.splitlines()
    i, j = sorted(rng.integers(len(lines), size=2).tolist())
    cells = lines[i].split(",")
    c = int(rng.integers(len(cells)))
    odd = ("", "x", "../x", "\0", '"', '"a', "a;b", "NaN", "-1", "99999999999999999999", " ", "é", "\u2028", "a,b", "query")
    changes = {
        "semicolons": lambda: [line.replace(",", ";") for line in lines], "tabs": lambda: [line.replace(",", "\t") for line in lines],
        "no line": lambda: lines[:i] + lines[i + 1 :], "line twice": lambda: lines[:i] + [lines[i]] + lines[i:],
        "exchange lines": lambda: [*lines[:i], lines[j], *lines[i + 1 : j], lines[i], *lines[j + 1 :]] if i < j else lines,
        "blank": lambda: [*lines[:i], "", *lines[i:]], "cell": lambda: [*lines[:i], ",".join(
            [*cells[:c], odd[rng.integers(len(odd))], *cells[c + 1 :]]), *lines[i + 1 :]],
        "no cell": lambda: [*lines[:i], ",".join(cells[:c] + cells[c + 1 :]), *lines[i + 1 :]],
        "column": lambda: [",".join(line.split(",")[::-1]) for line in lines], "spaces": lambda: [line.replace(",", " , ") for line in lines],
        "index": lambda: [f"{n - 1 if n else ''},{line}" for n, line in enumerate(lines)],
    }
    how = list(changes)[rng.integers(len(changes))]
    encoding = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")[rng.integers(5)]
    end = ("\n", "\r\n", "\r")[rng.integers(3)]
    path.write_bytes((end.join(changes[how]()) + end).encode(encoding, errors="replace"))
    return f"{how} {encoding} {end!r}"


def change_picture(rng: Rng, path: Path, _: Path) -> str:
    """Another mode, size or format under the same name, as other programs export it."""
    with Image.open(path) as image:
        image.load()
    modes = ("L", "P", "1", "RGB", "RGBA", "LA", "I", "CMYK")
    mode, kind = modes[rng.integers(len(modes))], ("PNG", "JPEG", "GIF", "TIFF", "BMP")[rng.integers(5)]
    changed = image.convert(mode)
    if rng.random() < 0.3:
        changed = changed.resize((int(rng.integers(1, 80)), int(rng.integers(1, 80))))
    try:
        changed.save(path, format=kind)
    except (OSError, ValueError):  # a mode that the format has not
        changed.convert("L").save(path, format="PNG")
    return f"{mode} {kind}"
